"""The Hugging Face model over live memory where transformers rebuilds the checkpoint: experts, ties, constants.

The live memory is laid out here as vLLM lays it out on a GPU, so that mixtures of experts are covered without one.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from hogwild.errors import AttachRefused
from hogwild.gpu_worker.attach import Attachment, Memory
from hogwild.gpu_worker.model import build_model, empty_model
from hogwild.manifest import Allocation, Manifest, TensorRecord

SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 50, "max_position_embeddings": 64, "head_dim": 8,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def save(path: Path, kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SMALL, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(path)
    return path


Place = Callable[[str, torch.Tensor], torch.Tensor | None]


def attachment(path: Path, place: Place = lambda name, tensor: None, **status: str) -> Attachment:
    """Checkpoint tensors in one block of memory: each on its own, or where `place` says (a view of the fused ones)."""
    tensors = load_file(path / "model.safetensors")
    block = torch.zeros(sum(t.nbytes + 64 for t in tensors.values()) * 2, dtype=torch.uint8)
    used = 0

    def take(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        nonlocal used
        used = -(-used // 64) * 64
        count = torch.Size(shape).numel() * dtype.itemsize
        used += count
        return block[used - count : used].view(dtype).view(shape)

    fused: dict[str, torch.Tensor] = {}
    records: dict[str, TensorRecord] = {}
    attachment.take, attachment.fused = take, fused  # type: ignore[attr-defined]
    for name, tensor in tensors.items():
        home = place(name, tensor)
        if home is None:
            home = take(tuple(tensor.shape), tensor.dtype)
        home.copy_(tensor)
        assert home.untyped_storage().data_ptr() == block.untyped_storage().data_ptr()
        said = status.get(name.replace(".", "_"), "shared")
        records[name] = TensorRecord(
            status=cast(Any, said), shape=tuple(tensor.shape), stride=tuple(home.stride()),
            full_shape=tuple(tensor.shape),
            dtype=str(tensor.dtype).removeprefix("torch."), allocation=0 if said == "shared" else None,
            offset=home.data_ptr() - block.data_ptr(), reason=None if said == "shared" else "in a test",
        )  # fmt: skip
    manifest = Manifest(
        export_id="0" * 32, model_path=str(path), served_model_name="m", vllm_version="", pid=1, process_start_time=0,
        boot_id="", device="cpu", max_model_len=64, vocab_size=50,
        dtype=json.loads((path / "config.json").read_text())["dtype"],
        allocations=(Allocation(kind="memfd", size=block.numel(), pid=1),), tensors=records,
    )  # fmt: skip
    memory = Memory.__new__(Memory)
    memory.manifest, memory.device, memory._blocks, memory._ipc = manifest, torch.device("cpu"), [block], None
    found = SimpleNamespace(manifest=manifest, memory=memory, views=memory.views(), device=memory.device)
    return cast(Attachment, found)


def same_logits(model: Any, path: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=model.dtype).eval()
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, reference(ids).logits)


def fused_experts(name: str, tensor: torch.Tensor, gate: str, up: str, down: str, experts: int) -> torch.Tensor | None:
    """vLLM's layout of experts: w13 [experts, 2 * intermediate, hidden], w2 [experts, hidden, intermediate]."""
    if ".experts." not in name:
        return None
    layer, _, rest = name.partition(".experts.")
    expert, part = rest.split(".")[:2]
    take, fused = attachment.take, attachment.fused  # type: ignore[attr-defined]
    rows, columns = tensor.shape
    if part == down:
        home = fused.setdefault(f"{layer}.w2", None)
        if home is None:
            home = fused[f"{layer}.w2"] = take((experts, rows, columns), tensor.dtype)
        return cast(torch.Tensor, home[int(expert)])
    home = fused.get(f"{layer}.w13")
    if home is None:
        home = fused[f"{layer}.w13"] = take((experts, 2 * rows, columns), tensor.dtype)
    return cast(torch.Tensor, home[int(expert), :rows] if part == gate else home[int(expert), rows:])


@pytest.mark.parametrize(
    ("kind", "names", "changes"),
    [
        ("mixtral", ("w1", "w3", "w2"), {"num_local_experts": 4, "num_experts_per_tok": 2}),
        ("qwen3_moe", ("gate_proj", "up_proj", "down_proj"),
         {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1}),
        ("olmoe", ("gate_proj", "up_proj", "down_proj"), {"num_experts": 4, "num_experts_per_tok": 2}),
    ],
)  # fmt: skip
def test_experts_are_one_view_each_on_vllms_fused_memory(
    kind: str, names: tuple[str, str, str], changes: dict[str, Any], tmp_path: Path
) -> None:
    path = save(tmp_path / kind, kind, **changes)
    gate, up, down = names
    live = attachment(path, lambda name, tensor: fused_experts(name, tensor, gate, up, down, 4))

    model = build_model(live)

    same_logits(model, path)
    assert all(parameter.requires_grad for parameter in model.parameters())
    name = next(n for n, _ in model.named_parameters() if n.endswith("experts.gate_up_proj"))
    parameter = model.get_parameter(name)
    assert len(model.hogwild_sources[name]) == 8  # gate and up of four experts
    # A write to the parameter is a write to each expert's own tensor.
    parameter.data[2, -1] = 9
    written = [n for n in model.hogwild_sources[name] if live.views[n][-1].eq(9).all()]
    assert len(written) == 1
    assert ".2." in written[0]


def test_experts_that_lie_apart_are_refused_by_name(tmp_path: Path) -> None:
    path = save(tmp_path / "mixtral", "mixtral", num_local_experts=4, num_experts_per_tok=2)
    with pytest.raises(AttachRefused, match="parts lie apart in vLLM's memory") as caught:
        build_model(attachment(path))  # every expert's matrix somewhere else
    assert all("experts" in name for name in caught.value.details["tensors"])


def test_experts_in_another_order_than_in_the_model_are_refused(tmp_path: Path) -> None:
    """up before gate: all parts are there, but no view shows them as the model wants them."""
    path = save(tmp_path / "mixtral", "mixtral", num_local_experts=4, num_experts_per_tok=2)
    live = attachment(path, lambda name, tensor: fused_experts(name, tensor, "w3", "w1", "w2", 4))
    with pytest.raises(AttachRefused, match="gate_up_proj"):
        build_model(live)


def test_tied_embeddings_are_one_parameter(tmp_path: Path) -> None:
    path = save(tmp_path / "tied", "llama", tie_word_embeddings=True)
    model = build_model(attachment(path))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    same_logits(model, path)


def test_untied_tensors_that_share_memory_are_one_parameter(tmp_path: Path) -> None:
    """vLLM ties a head that equals the embedding: two Parameters there would be trained twice a step."""
    path = save(tmp_path / "equal", "llama")
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    homes: dict[str, torch.Tensor] = {}

    def place(name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        if name not in ("lm_head.weight", "model.embed_tokens.weight"):
            return None
        take = attachment.take  # type: ignore[attr-defined]
        if "one" not in homes:
            homes["one"] = take(tuple(tensor.shape), tensor.dtype)
        return homes["one"]

    model = build_model(attachment(path, place))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(list(model.parameters())) == len(tensors) - 1
    same_logits(model, path)


def test_a_tied_checkpoints_own_copy_of_the_head_needs_no_sharing(tmp_path: Path) -> None:
    path = save(tmp_path / "tied", "llama", tie_word_embeddings=True)
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    model = build_model(attachment(path, lm_head_weight="ignored"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    same_logits(model, path)


@pytest.mark.parametrize("said", ["derived", "unequal"])
def test_a_head_that_vllm_serves_apart_is_not_taken_for_the_embedding(said: str, tmp_path: Path) -> None:
    """The configuration ties them, the checkpoint has another head, and vLLM serves that one."""
    path = save(tmp_path / "tied", "llama", tie_word_embeddings=True)
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AttachRefused, match=f"lm_head.weight is {said}"):
        build_model(attachment(path, lm_head_weight=said))


def test_padded_and_strided_memory_gives_the_same_logits(tmp_path: Path) -> None:
    path = save(tmp_path / "qwen2", "qwen2")

    def place(name: str, tensor: torch.Tensor) -> torch.Tensor | None:
        if tensor.dim() != 2:
            return None
        take = attachment.take  # type: ignore[attr-defined]
        rows, columns = tensor.shape
        if "down_proj" in name:
            return cast(torch.Tensor, take((columns, rows), tensor.dtype).t())
        return cast(torch.Tensor, take((rows, columns + 4), tensor.dtype)[:, :columns])

    model = build_model(attachment(path, place))
    assert model.model.layers[0].mlp.down_proj.weight.stride() == (1, 32)
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():  # another memory layout may sum in another order
        assert torch.allclose(model.eval()(ids).logits, reference(ids).logits, atol=1e-6)


def test_bfloat16_gives_the_same_logits(tmp_path: Path) -> None:
    path = save(tmp_path / "gemma2", "gemma2", torch.bfloat16, query_pre_attn_scalar=8, sliding_window=32)
    model = build_model(attachment(path))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    same_logits(model, path)


def test_a_derived_vector_is_a_constant_with_the_checkpoints_values(tmp_path: Path) -> None:
    path = save(tmp_path / "llama", "llama")
    model = build_model(attachment(path, model_norm_weight="derived"))
    assert not model.model.norm.weight.requires_grad
    assert list(model.hogwild_constants) == ["model.norm.weight"]
    same_logits(model, path)


def test_a_part_of_a_matrix_is_refused(tmp_path: Path) -> None:
    """A view with the whole matrix's shape would reach into what lies beside it."""
    path = save(tmp_path / "llama", "llama")
    live, name = attachment(path), "model.layers.0.mlp.gate_proj.weight"
    records = cast(dict[str, TensorRecord], live.manifest.tensors)
    rows, columns = records[name].shape
    records[name] = replace(records[name], shape=(2, columns), slices=((0, 0, 2),), full_shape=(rows, columns))
    with pytest.raises(AttachRefused, match=r"holds only \[2, 32\] of .*gate_proj.weight's \[48, 32\]"):
        build_model(live)


def test_a_matrix_that_nothing_fills_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "llama", "llama")
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AttachRefused, match="nothing in the checkpoint fills it"):
        build_model(attachment(path))


def test_a_config_that_does_not_belong_to_the_checkpoint_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "llama", "llama")
    live = attachment(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    with pytest.raises(AttachRefused, match=r"does the checkpoint's config\.json belong to it"):
        build_model(live)


@pytest.mark.parametrize("text", ["{", "{}", '{"model_type": "nonesuch"}'])
def test_a_directory_that_transformers_does_not_know_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(AttachRefused, match="can't build a causal language model"):
        empty_model(tmp_path, torch.float32)


def test_parameters_on_meta_buffers_for_real(tmp_path: Path) -> None:
    path = save(tmp_path / "llama", "llama")
    model = empty_model(path, torch.float32)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    buffers = dict(reference.named_buffers())
    assert buffers
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name])
