"""A Hugging Face model whose parameters are the served weights themselves.

    config.json ──▶ the model, parameters on the meta device, buffers real
                       │   compose.learn: which boxes of which checkpoint tensors make each parameter
    attachment  ──▶    │   each parameter becomes one strided view on vLLM's memory
                       ▼
                    eval mode; a parameter that shares memory with another *is* the other one

A matrix that can't be shared stops it, with the list of all such. A vector or scalar that vLLM serves in another form
(Mamba's A, for instance) is loaded from the checkpoint as a constant: right as long as nobody trains it, and nobody
does.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hogwild.errors import AttachRefused
from hogwild.gpu_worker.attach import Attachment
from hogwild.gpu_worker.compose import Composition, Live, learn
from hogwild.manifest import ITEM_BYTES, Manifest
from hogwild.strided import Layout


def build_model(attachment: Attachment) -> Any:
    """The served model as a `transformers.PreTrainedModel` in eval mode (no dropout), on the live weights.

    Parameters that can be trained have `requires_grad`; constants don't. `model.hogwild_constants` names those with the
    reason, `model.hogwild_sources` maps each trainable parameter to the checkpoint tensors in it.

    Raises:
        AttachRefused: a matrix can't be shared, or transformers can't build the model from this checkpoint.
    """
    manifest = attachment.manifest
    dtype: torch.dtype = getattr(torch, manifest.dtype)
    model = empty_model(Path(manifest.model_path), dtype, trust_remote_code=manifest.trust_remote_code)
    shapes = {name: record.full_shape or record.shape for name, record in manifest.tensors.items()}
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    with default_dtype(dtype):
        recipe = learn(model, shapes)

    where = live_tensors(manifest)
    filled: dict[str, torch.Tensor] = {}
    sources: dict[str, tuple[str, ...]] = {}
    constants: dict[str, str] = {}
    refused: dict[str, str] = {}
    state = dict(model.state_dict(keep_vars=True))
    for name, part in recipe.parts.items():
        reason = _why_not(part, manifest)
        live = part.live(where) if part is not None and reason is None else None
        if live is not None and part is not None:
            filled[name] = attachment.memory.view(live.allocation, live.dtype, live.layout)
            sources[name] = part.names
            continue
        reason = reason or "its parts lie apart in vLLM's memory: no strided view shows them together"
        if name in tied and tied[name] in recipe.parts and part is not None and _ignored(part, manifest):
            continue  # the checkpoint's own copy of a tied tensor: vLLM did not load it, so it ties as well
        if sum(n > 1 for n in state[name].shape) >= 2:
            refused[name] = reason
        else:
            constants[name] = reason
    missing = [n for n in recipe.missing if n not in tied and n not in tied.values() and not _ties_to(n, tied, filled)]
    for name in missing:
        refused[name] = "nothing in the checkpoint fills it"
    if refused:
        listed = "; ".join(f"{name}: {reason}" for name, reason in sorted(refused.items())[:8])
        more = f"; and {len(refused) - 8} more" if len(refused) > 8 else ""
        raise AttachRefused(
            f"{len(refused)} of {len(state)} tensors of the model can't be shared: {listed}{more}",
            tensors=dict(sorted(refused.items())),
        )
    _fill(model, filled, tied, attachment)
    _load_constants(model, constants, recipe.parts, manifest, attachment.device, dtype)
    model.hogwild_constants = constants
    model.hogwild_sources = sources
    return model.eval()


def empty_model(path: Path, dtype: torch.dtype, *, trust_remote_code: bool = False) -> Any:
    """The model of a checkpoint directory: parameters on the meta device, buffers computed as `from_pretrained` does.

    Raises:
        AttachRefused: transformers doesn't know this kind of model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        with meta_parameters():
            return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError, ImportError) as error:
        raise AttachRefused(f"transformers can't build a causal language model from {path}: {error}") from error


def live_tensors(manifest: Manifest) -> dict[str, Live]:
    """Where each shared checkpoint tensor is, in elements."""
    found = {}
    for name, record in manifest.tensors.items():
        if record.status == "shared" and record.allocation is not None:
            layout = Layout(record.offset // ITEM_BYTES[record.dtype], record.shape, record.stride)
            found[name] = Live(record.allocation, record.dtype, layout)
    return found


def _why_not(part: Composition | None, manifest: Manifest) -> str | None:
    """Why a parameter of this composition can't be a view; None when nothing is known against it."""
    if part is None or part.regions is None:
        return "transformers computes it from the checkpoint"
    for name in part.names:
        record = manifest.tensors[name]
        if record.status != "shared":
            return f"{name} is {record.status} ({record.reason})"
        if record.slices is not None:
            return f"vLLM holds only {list(record.shape)} of {name}'s {list(record.full_shape or ())}"
    return None


def _ignored(part: Composition, manifest: Manifest) -> bool:
    """Whether vLLM loaded none of the checkpoint tensors that this parameter is made of."""
    return bool(part.names) and all(manifest.tensors[name].status == "ignored" for name in part.names)


def _ties_to(name: str, tied: Mapping[str, str], filled: Mapping[str, torch.Tensor]) -> bool:
    return tied.get(name) in filled or any(target in filled for target, source in tied.items() if source == name)


def _fill(model: Any, filled: Mapping[str, torch.Tensor], tied: Mapping[str, str], attachment: Attachment) -> None:
    """Put the views in; what is one tensor in memory, or tied by the model, becomes one Parameter."""
    made: dict[tuple[Any, ...], nn.Parameter] = {}
    for name, view in filled.items():
        module, _, key = name.rpartition(".")
        owner = model.get_submodule(module)
        if key in owner._buffers:
            owner._buffers[key] = view
            continue
        identity = (view.data_ptr(), tuple(view.shape), tuple(view.stride()))
        if identity not in made:
            made[identity] = nn.Parameter(view, requires_grad=view.is_floating_point())
        owner._parameters[key] = made[identity]
    for target, source in tied.items():
        for empty, full in ((target, source), (source, target)):
            if empty not in filled and full in filled:
                module, _, key = empty.rpartition(".")
                model.get_submodule(module)._parameters[key] = model.get_parameter(full)
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type != "meta" and buffer.device != attachment.device:
                module._buffers[key] = buffer.to(attachment.device)


def _load_constants(
    model: Any,
    constants: Mapping[str, str],
    parts: Mapping[str, Composition | None],
    manifest: Manifest,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Frozen copies of small tensors from the checkpoint's files.

    Raises:
        AttachRefused: one isn't a plain checkpoint tensor, or its file is gone.
    """
    for name in constants:
        part = parts[name]
        if part is None or part.regions is None or len(part.regions) != 1:
            raise AttachRefused(f"{name} can't be shared and is no plain tensor of the checkpoint either")
        tensor = read_tensor(Path(manifest.model_path), part.names[0])
        module, _, key = name.rpartition(".")
        owner = model.get_submodule(module)
        value = tensor.reshape(part.layout.shape).to(device=device)
        if key in owner._buffers:
            owner._buffers[key] = value
        else:
            owner._parameters[key] = nn.Parameter(value.to(dtype), requires_grad=False)


def read_tensor(directory: Path, name: str) -> torch.Tensor:
    """One tensor of a safetensors checkpoint.

    Raises:
        AttachRefused: no file of the directory holds it.
    """
    from safetensors import safe_open

    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118 - a safe_open handle is no mapping
                tensor: torch.Tensor = file.get_tensor(name)
                return tensor
    raise AttachRefused(f"{name} is in none of the safetensors files of {directory}")


@contextmanager
def meta_parameters() -> Iterator[None]:
    """Within it, parameters that modules register are on the meta device; buffers are computed for real."""
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        original(self, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """torch's default dtype, for a while."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
