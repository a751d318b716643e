"""From the trace of a load to the manifest: which live view shows which checkpoint tensor, compared bit for bit.

Runs once, after vLLM has loaded and post-processed a model and before it serves: the only moment when live weights and
checkpoint must be equal.
"""

import logging
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Literal

import torch

from hogwild.errors import AttachRefused
from hogwild.manifest import Allocation, TensorRecord
from hogwild.strided import Fitted, Layout, fit
from hogwild.vllm_plugin.arena import Arena
from hogwild.digests import digest
from hogwild.vllm_plugin.trace import Landing, LoadTrace, layout_of, storage_key

PROGRESS_S = 5.0  # how often a long comparison says where it is

Place = tuple[str, str]  # (module, name of its parameter)


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A record without its address, and the live view when there is one."""

    record: TensorRecord
    view: torch.Tensor | None = None


def places_by_storage(model: torch.nn.Module) -> dict[int, list[Place]]:
    """Storage → the (module, parameter) names that hold it, taken before a load: post-processing may rebind them."""
    places: dict[int, list[Place]] = defaultdict(list)
    for name, module in model.named_modules():
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and tensor.device.type != "meta":
                places[storage_key(tensor)].append((name, key))
    return dict(places)


def resolve(
    model: torch.nn.Module,
    trace: LoadTrace,
    places: Mapping[int, list[Place]],
    layouts: Mapping[Place, Layout],
    logger: logging.Logger,
) -> dict[str, Resolved]:
    """For every checkpoint tensor that passed by: its live view if it has one, its status and, if not shared, why.

    `places`, `layouts`: where parameters were, and in which layout, while the trace was taken. Must run in no_grad.
    """
    by_name: dict[str, list[Landing]] = defaultdict(list)
    for landing in trace.landings:
        by_name[landing.name].append(landing)
    private = private_copies(model)
    resolved: dict[str, Resolved] = {}
    started = said = time.monotonic()
    for count, (name, seen) in enumerate(trace.tensors.items()):
        if time.monotonic() - said > PROGRESS_S:
            said = time.monotonic()
            logger.info(
                "hogwild: comparing weights with the checkpoint: %d of %d tensors, %.0f s",
                count,
                len(trace.tensors),
                said - started,
            )
        shape, dtype = seen.shape, str(seen.dtype).removeprefix("torch.")

        def refused(
            status: str,
            reason: str,
            parameter: str | None = None,
            *,
            _shape: tuple[int, ...] = shape,
            _dtype: str = dtype,
        ) -> Resolved:
            return Resolved(
                record=TensorRecord(
                    status=status,
                    reason=reason,
                    shape=_shape,
                    dtype=_dtype,  # type: ignore[arg-type]
                    parameter=parameter,
                    full_shape=_shape,
                )
            )

        if name in trace.duplicates:
            resolved[name] = refused("unequal", "is in the checkpoint more than once")
            continue
        resolved[name] = _resolve_one(model, shape, by_name.get(name, []), places, layouts, private, refused)
    return resolved


def _resolve_one(
    model: torch.nn.Module,
    shape: tuple[int, ...],
    landings: list[Landing],
    places: Mapping[int, list[Place]],
    layouts: Mapping[Place, Layout],
    private: Mapping[str, str],
    refused: Callable[..., Resolved],
) -> Resolved:
    served: dict[int, tuple[str, torch.Tensor, list[Landing]]] = {}  # live storage → (parameter, tensor, landings)
    lost: list[str] = []
    for landing in landings:
        homes = places.get(landing.storage)
        if not homes:
            lost.append("a tensor that is no parameter")
            continue
        for place in homes:
            live = _live(model, place)
            label = ".".join(filter(None, place))
            if live is None or layout_of(live).shape != layouts[place].shape:
                lost.append(f"{label}, which was replaced after loading")
                continue
            entry = served.setdefault(storage_key(live), (label, live, []))
            if landing not in entry[2]:
                entry[2].append(landing)
    if not landings:
        return refused("ignored", "vLLM read it and loaded it nowhere")
    if not served:
        return refused("derived", f"went into {', '.join(sorted(set(lost)))}")
    label = min(entry[0] for entry in served.values())
    changed = sorted({landing.changed for _, _, group in served.values() for landing in group if landing.changed})
    if changed:
        return refused("derived", f"{', '.join(changed)} while loading", label)
    if len(served) > 1:
        return refused(
            "derived", f"is in several places: {', '.join(sorted(entry[0] for entry in served.values()))}", label
        )

    label, live, group = next(iter(served.values()))
    pieces = [landing.piece for landing in group if landing.piece is not None]
    fitted = fit(shape, pieces) if len(pieces) == len(group) else None
    if fitted is None:
        return refused("derived", "rearranged while loading: no strided view of the live memory has its shape", label)
    moved = _moved(live, group[0], places, layouts)
    if moved is None:
        return refused("unequal", "laid out anew after loading", label)
    if label in private:
        return refused("derived", private[label], label)
    view = _view(live, fitted, moved)
    if view is None or view.dtype != group[0].dtype:
        return refused("unequal", "laid out anew after loading", label)
    return _compare(shape, view, fitted, group, live, moved, label)


def _live(model: torch.nn.Module, place: Place) -> torch.Tensor | None:
    """The tensor that serves under this name now."""
    try:
        module = model.get_submodule(place[0])
    except AttributeError:
        return None
    tensor = module._parameters.get(place[1])
    if tensor is None:
        tensor = module._buffers.get(place[1])
    return tensor


def _moved(
    live: torch.Tensor, landing: Landing, places: Mapping[int, list[Place]], layouts: Mapping[Place, Layout]
) -> int | None:
    """By how many elements a parameter's contents moved within its storage since the load; None: other strides."""
    if storage_key(live) == landing.storage:
        return 0
    for place in places[landing.storage]:
        before = layouts[place]
        if before.shape == tuple(live.shape) and before.stride == tuple(live.stride()):
            return live.storage_offset() - before.offset
    return None


def _view(live: torch.Tensor, fitted: Fitted, moved: int) -> torch.Tensor | None:
    layout = fitted.layout
    offset = layout.offset + moved
    item = live.element_size()
    if offset < 0 or (offset + layout.extent) * item > live.untyped_storage().nbytes():
        return None
    return live.detach().as_strided(layout.shape, layout.stride, offset)


def _compare(
    shape: tuple[int, ...],
    view: torch.Tensor,
    fitted: Fitted,
    group: list[Landing],
    live: torch.Tensor,
    moved: int,
    label: str,
) -> Resolved:
    """Bit for bit, by the hash that was taken of each piece when it passed by."""
    for landing in group:
        wanted = landing.digest.result() if isinstance(landing.digest, Future) else landing.digest
        layout = landing.layout
        piece = live.detach().as_strided(layout.shape, layout.stride, layout.offset + moved)
        found = digest(piece)
        if found != wanted:
            record = TensorRecord(
                status="unequal",
                reason="the live contents differ from the checkpoint's: permuted, packed or changed after loading",
                shape=tuple(view.shape),
                parameter=label,
                dtype=str(view.dtype).removeprefix("torch."),
                full_shape=shape,
                slices=fitted.slices,
            )
            return Resolved(record=record)
    whole = group[0].digest if len(group) == 1 and tuple(group[0].layout.shape) == tuple(view.shape) else digest(view)
    whole = whole.result() if isinstance(whole, Future) else whole
    record = TensorRecord(
        status="shared",
        shape=tuple(view.shape),
        stride=tuple(view.stride()),
        parameter=label,
        dtype=str(view.dtype).removeprefix("torch."),
        full_shape=shape,
        slices=fitted.slices,
        hash=whole,
    )
    return Resolved(record=record, view=view)


def private_copies(model: torch.nn.Module) -> dict[str, str]:
    """Parameters that may be served from a private copy made after loading: name → reason.

    A module that keeps, as a plain attribute, a floating tensor of at least two dimensions on a storage of its own, has
    computed something from the parameters in it (absorbed MLA projections, packed weights): writing to the parameter
    would not change what is served.
    """
    own = {storage_key(t) for t in (*model.parameters(), *model.buffers()) if t.device.type != "meta"}
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if not isinstance(value, torch.Tensor) or value.device.type == "meta":
                continue
            if value.is_floating_point() and sum(n > 1 for n in value.shape) >= 2 and storage_key(value) not in own:
                for parameter, _ in module.named_parameters():
                    if parameter.count(".") <= 1:  # its own and its children's: deeper ones are served by their modules
                        found[".".join(filter(None, (name, parameter)))] = (
                            f"vLLM serves it through {name}.{attribute}, a copy made after loading"
                        )
    return found


def layouts_of(model: torch.nn.Module) -> dict[Place, Layout]:
    """Layout of every parameter and buffer, by place."""
    return {
        (name, key): layout_of(tensor)
        for name, module in model.named_modules()
        for key, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None and tensor.device.type != "meta"
    }


@dataclass(frozen=True, kw_only=True)
class Memory:
    """The resolved tensors with addresses that another process can use."""

    device: Literal["cpu", "cuda"]
    gpu_uuid: str | None
    allocations: Sequence[Allocation]
    records: Mapping[str, TensorRecord]


def place(resolved: Mapping[str, Resolved], device: torch.device, arena: Arena | None) -> Memory:
    """Give each live view its allocation and offset."""
    records: dict[str, TensorRecord] = {}
    if device.type == "cpu":
        if arena is None:
            raise AttachRefused("the parameters are not in shared memory")
        for name, entry in resolved.items():
            offset = None if entry.view is None else arena.offset_of(entry.view.data_ptr())
            if entry.view is not None and offset is None:
                records[name] = replace(
                    entry.record,
                    status="derived",
                    stride=(),
                    hash=None,
                    reason="its live values were moved out of the shared memory after loading",
                )
            else:
                records[name] = entry.record if offset is None else replace(entry.record, allocation=0, offset=offset)
        allocation = Allocation(kind="memfd", pid=os.getpid(), fd=arena.fd, inode=arena.inode, size=arena.size)
        return Memory(device="cpu", gpu_uuid=None, allocations=[allocation], records=records)
    from hogwild.vllm_plugin.cuda_export import CudaAllocations, gpu_uuid

    found = CudaAllocations()
    for name, entry in resolved.items():
        if entry.view is None:
            records[name] = entry.record
        else:
            index, offset = found.locate(entry.view)
            records[name] = replace(entry.record, allocation=index, offset=offset)
    return Memory(device="cuda", gpu_uuid=gpu_uuid(device), allocations=found.allocations, records=records)


def summary(records: Mapping[str, TensorRecord]) -> str:
    """One line for the log: how many tensors have which status."""
    counts = Counter(record.status for record in records.values())
    return ", ".join(
        f"{counts[status]} {status}" for status in ("shared", "derived", "unequal", "ignored") if counts[status]
    )
