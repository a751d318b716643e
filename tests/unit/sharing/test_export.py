"""The learned map on small modules that load as vLLM's do: what is found, and every trap that must not fool it.

Each test is one load: a checkpoint passes by, `load` copies it into a module, something happens afterwards; then the
map is resolved and compared. The danger is always the same: a view that is called shared and is not what is served.
"""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from hogwild.tensors import BackgroundDigests, digest
from hogwild.vllm_plugin import cuda_export, export
from hogwild.vllm_plugin.arena import Prefault, rehome
from hogwild.vllm_plugin.trace import Landing, LoadTrace

logger = logging.getLogger("test")
Checkpoint = dict[str, torch.Tensor]


class Loading:
    """Loads a checkpoint into a module under the trace, as the hooks do."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.arena = rehome(model, "test")
        self.places, self.layouts = export.places_by_storage(model), export.layouts_of(model)
        self.digests = BackgroundDigests()
        self.trace = LoadTrace(self._landed)

    def _landed(self, landing: Landing, source: torch.Tensor) -> None:
        landing.digest = self.digests.submit(source)

    def run(self, checkpoint: Checkpoint, load: Callable[[str, torch.Tensor], None],
            after: Callable[[], Any] = lambda: None) -> None:
        """`after` is vLLM's post-processing."""
        with torch.no_grad(), self.trace:
            for name, tensor in checkpoint.items():
                self.trace.seen(name, tensor)
                load(name, tensor)
            self.trace.loaded()
            after()

    def resolve(self) -> dict[str, export.Resolved]:
        self.digests.close()
        assert self.trace.failed is None
        with torch.no_grad():
            return export.resolve(self.model, self.trace, self.places, self.layouts, logger)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield


class Layer(nn.Module):
    """Fused qkv, an embedding with padding, a norm: what every vLLM model has."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.empty(12, 8), requires_grad=False)
        self.embed = nn.Parameter(torch.empty(64, 8), requires_grad=False)
        self.norm = nn.Parameter(torch.ones(8), requires_grad=False)

    def load(self, name: str, tensor: torch.Tensor) -> None:
        if name in "qkv":
            self.qkv.data.narrow(0, 4 * "qkv".index(name), 4).copy_(tensor)
        elif name == "embed":
            self.embed.data[: tensor.shape[0]].copy_(tensor)
            self.embed.data[tensor.shape[0] :].fill_(0)
        elif name == "norm":
            self.norm.data.copy_(tensor)


def checkpoint() -> Checkpoint:
    return {"q": random(4, 8), "k": random(4, 8), "v": random(4, 8), "embed": random(50, 8), "norm": random(8)}


def test_fused_padded_and_plain_tensors_are_found_bit_for_bit() -> None:
    model, tensors = Layer(), checkpoint()
    loading = Loading(model)

    loading.run(tensors, model.load)
    found = loading.resolve()

    assert {name: entry.record.status for name, entry in found.items()} == dict.fromkeys(tensors, "shared")
    for name, tensor in tensors.items():
        entry = found[name]
        assert entry.view is not None
        assert torch.equal(entry.view, tensor)
        assert entry.record.hash == digest(tensor)
        assert loading.arena.offset_of(entry.view.data_ptr()) is not None
    assert found["k"].record.parameter == "qkv"
    assert found["embed"].record.shape == (50, 8)


def test_a_write_through_the_view_is_a_write_to_the_parameter() -> None:
    model, tensors = Layer(), checkpoint()
    loading = Loading(model)
    loading.run(tensors, model.load)
    view = loading.resolve()["k"].view
    assert view is not None

    view.fill_(7)

    assert model.qkv[4:8].eq(7).all()
    assert not model.qkv[:4].eq(7).any()


def test_transposed_and_square_tensors_hash_in_the_checkpoints_order() -> None:
    model = nn.Module()
    model.register_parameter("w", nn.Parameter(torch.empty(6, 6), requires_grad=False))
    loading = Loading(model)
    tensor = random(6, 6)

    loading.run({"w": tensor}, lambda _, t: model.w.data.copy_(t.t()))
    entry = loading.resolve()["w"]

    assert entry.record.status == "shared"
    assert entry.view is not None
    assert torch.equal(entry.view, tensor)
    assert entry.record.hash == digest(tensor)


def test_experts_that_are_fused_in_vllm_are_found_one_by_one() -> None:
    model = nn.Module()
    model.register_parameter("w13", nn.Parameter(torch.empty(3, 8, 4), requires_grad=False))
    loading = Loading(model)
    tensors = {f"{e}.{half}": random(4, 4) for e in range(3) for half in (0, 1)}

    def load(name: str, tensor: torch.Tensor) -> None:
        expert, half = map(int, name.split("."))
        model.w13.data[expert].narrow(0, 4 * half, 4).copy_(tensor)

    loading.run(tensors, load)
    found = loading.resolve()
    for name, tensor in tensors.items():
        view = found[name].view
        assert view is not None and torch.equal(view, tensor)


def test_experts_that_are_fused_in_the_checkpoint_are_put_together() -> None:
    model = nn.Module()
    model.register_parameter("w13", nn.Parameter(torch.empty(3, 8, 4), requires_grad=False))
    loading = Loading(model)
    tensor = random(3, 4, 8)  # experts, in, gate and up

    def load(name: str, whole: torch.Tensor) -> None:
        gate, up = whole.chunk(2, dim=-1)
        for expert in range(3):
            model.w13.data[expert, :4].copy_(gate[expert].t())
            model.w13.data[expert, 4:].copy_(up[expert].t().contiguous())

    loading.run({"w": tensor}, load)
    entry = loading.resolve()["w"]
    assert entry.record.status == "shared", entry.record.reason
    assert entry.view is not None and torch.equal(entry.view, tensor)


# --- traps -----------------------------------------------------------------------------------------------------------


def status(model: nn.Module, tensors: Checkpoint, load: Callable[[str, torch.Tensor], None],
           after: Callable[[], Any] = lambda: None) -> dict[str, tuple[str, str | None]]:
    """Load, do `after`, resolve: name → (status, reason)."""
    loading = Loading(model)
    loading.run(tensors, load, after)
    return {name: (e.record.status, e.record.reason) for name, e in loading.resolve().items()}


def one(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = nn.Module()
    model.register_parameter("w", nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False))
    return model


def test_cast_on_the_way() -> None:
    model = one(4, 4)
    found = status(model, {"w": random(4, 4, dtype=torch.bfloat16)}, lambda _, t: model.w.data.copy_(t))
    assert found["w"] == ("derived", "cast from bfloat16 to float32 while loading")


def test_cast_before_the_copy() -> None:
    model = one(4, 4)
    found = status(model, {"w": random(4, 4, dtype=torch.bfloat16)}, lambda _, t: model.w.data.copy_(t.float()))
    assert found["w"] == ("derived", "cast from bfloat16 to float32 while loading")


def test_arithmetic_on_the_way() -> None:
    model = one(4)
    found = status(model, {"A_log": random(4)}, lambda _, t: model.w.data.copy_(-torch.exp(t.float())))
    assert found["A_log"] == ("derived", "computed by exp while loading")


def test_arithmetic_that_changes_nothing_here_is_still_derived() -> None:
    """Zeros scaled are zeros: equal bits alone don't make a view."""
    model = one(4)
    found = status(model, {"w": torch.zeros(4)}, lambda _, t: model.w.data.copy_(t * 2))
    assert found["w"] == ("derived", "computed by mul while loading")


def test_changed_in_place_before_the_copy() -> None:
    model = one(4)
    found = status(model, {"w": torch.zeros(4)}, lambda _, t: model.w.data.copy_(t.mul_(3)))
    assert found["w"] == ("derived", "changed in place by mul_ while loading")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t[4:].mul_(2), "changed in place by mul_"),
        (lambda t: t[2:4].copy_(torch.ones(2)), "overwritten in place"),
        (lambda t: torch.exp(t[:2], out=t[6:]), "changed in place by exp"),
    ],
)
def test_changed_in_part_before_the_copy(change: Callable[[torch.Tensor], Any], says: str) -> None:
    model = one(8)

    def load(_: str, tensor: torch.Tensor) -> None:
        change(tensor)
        model.w.data.copy_(tensor)

    assert status(model, {"w": random(8)}, load)["w"] == ("derived", f"{says} while loading")


def test_only_the_tensor_that_was_changed_in_a_storage_of_many() -> None:
    """A whole file in memory, of which the middle tensor is written to; nothing is written at the first one's end."""
    model, flat = Layer(), torch.randn(4 * 8 * 3)
    tensors = {name: flat[32 * i : 32 * (i + 1)].view(4, 8) for i, name in enumerate("qkv")}
    loading = Loading(model)
    with torch.no_grad(), loading.trace:
        for name, tensor in tensors.items():
            loading.trace.seen(name, tensor)
        tensors["k"][2:].neg_()
        tensors["q"][3:, 4:4].copy_(torch.empty(1, 0))
        for name in "vqk":
            model.load(name, tensors[name])
    found = {name: entry.record.status for name, entry in loading.resolve().items()}
    assert found == {"q": "shared", "k": "derived", "v": "shared"}


def test_parameter_copied_to_parameter_after_loading() -> None:
    """Both are served, so writing to one is not enough."""
    model = one(4, 4)
    model.register_parameter("copy", nn.Parameter(torch.empty(4, 4), requires_grad=False))

    def load(_: str, tensor: torch.Tensor) -> None:
        model.w.data.copy_(tensor)
        model.copy.data.copy_(model.w.data)

    found = status(model, {"w": random(4, 4)}, load)
    assert found["w"] == ("derived", "is in several places: copy, w")


def test_parameter_computed_from_a_parameter_after_loading() -> None:
    model = one(4)
    model.register_parameter("A", nn.Parameter(torch.empty(4), requires_grad=False))

    def load(_: str, tensor: torch.Tensor) -> None:
        model.w.data.copy_(tensor)
        model.A.data.copy_(-model.w.data.exp())

    found = status(model, {"A_log": random(4)}, load)
    assert found["A_log"] == ("derived", "computed by exp while loading")


def test_new_parameter_computed_from_one_after_loading() -> None:
    """`-exp(A_log)` under a name of its own: A_log itself is intact and read by nobody."""
    model = one(4)

    def compute() -> None:
        model.A = nn.Parameter(-torch.exp(model.w.data), requires_grad=False)

    found = status(model, {"A_log": random(4)}, lambda _, t: model.w.data.copy_(t), compute)
    assert found["A_log"] == ("derived", "vLLM serves it through A, computed by exp")


def test_new_buffer_copied_from_a_parameter_after_loading() -> None:
    model = one(4)

    def keep() -> None:
        model.register_buffer("kept", torch.empty(4))
        model.kept.copy_(model.w.data)

    found = status(model, {"w": random(4)}, lambda _, t: model.w.data.copy_(t), keep)
    assert found["w"] == ("derived", "vLLM serves it through kept, a copy of it")


def test_parameter_written_by_an_operation_with_an_out_argument_after_loading() -> None:
    model = one(4)
    model.register_parameter("A", nn.Parameter(torch.zeros(4), requires_grad=False))
    found = status(model, {"A_log": random(4)}, lambda _, t: model.w.data.copy_(t),
                   lambda: torch.exp(model.w.data, out=model.A.data))
    assert found["A_log"] == ("derived", "vLLM serves it through A, computed by exp")


def test_every_tensor_of_a_fused_parameter_that_another_is_computed_from() -> None:
    model = Layer()

    def absorb() -> None:
        model.absorbed = nn.Parameter((model.qkv.data * 2).t().contiguous(), requires_grad=False)

    found = status(model, checkpoint(), model.load, absorb)
    assert {name for name, (state, _) in found.items() if state == "derived"} == set("qkv")
    assert found["k"][1] == "vLLM serves it through absorbed, computed by mul"


def test_copy_in_the_object_that_a_layer_computes_with() -> None:
    """vLLM's attention layers have an `impl`, no module, that keeps what it made of the weights; here of a vector."""
    model = one(4, dtype=torch.bfloat16)
    model.impl = Attention()

    def cast() -> None:
        model.impl.sinks = model.w.data.float()

    found = status(model, {"sinks": random(4, dtype=torch.bfloat16)}, lambda _, t: model.w.data.copy_(t), cast)
    assert found["sinks"] == ("derived", "vLLM serves it through impl.sinks, cast from bfloat16 to float32")


class Attention:
    sinks: torch.Tensor


def test_new_parameter_computed_from_the_checkpoint_tensor_itself() -> None:
    model = one(4)

    def load(_: str, tensor: torch.Tensor) -> None:
        model.w.data.copy_(tensor)
        model.A = nn.Parameter(-torch.exp(tensor), requires_grad=False)

    found = status(model, {"A_log": random(4)}, load)
    assert found["A_log"] == ("derived", "vLLM serves it through A, computed by exp")


def test_copied_out_and_back_after_loading_stays_shared() -> None:
    model = Layer()

    def round_trip() -> None:
        model.qkv.data.copy_(model.qkv.data.clone())
        model.norm = nn.Parameter(model.norm.data.clone(), requires_grad=False)
        model.embed.data.abs().max()

    found = status(model, {n: t for n, t in checkpoint().items() if n != "norm"}, model.load, round_trip)
    assert set(found.values()) == {("shared", None)}


def test_contents_permuted_in_place_after_loading() -> None:
    model = one(4, 6)
    found = status(model, {"w": random(4, 6)}, lambda _, t: model.w.data.copy_(t),
                   lambda: model.w.data.copy_(model.w.data.flip(0).clone()))
    assert found["w"][0] == "unequal"
    assert "permuted, packed" in str(found["w"][1])


def test_one_element_changed_after_loading() -> None:
    model = one(4, 6)
    found = status(model, {"w": random(4, 6)}, lambda _, t: model.w.data.copy_(t),
                   lambda: model.w.data[2, 3].add_(1e-6))
    assert found["w"][0] == "unequal"


def test_parameter_replaced_by_a_packed_one() -> None:
    model = one(4, 6)

    def pack() -> None:
        model.w = nn.Parameter(model.w.data.reshape(2, 12).clone(), requires_grad=False)

    found = status(model, {"w": random(4, 6)}, lambda _, t: model.w.data.copy_(t), pack)
    assert found["w"] == ("derived", "went into w, which was replaced after loading")


def test_parameter_emptied_after_a_private_copy_was_packed() -> None:
    model = one(4, 6)

    def pack() -> None:
        model.w = nn.Parameter(torch.empty(0), requires_grad=False)

    found = status(model, {"w": random(4, 6)}, lambda _, t: model.w.data.copy_(t), pack)
    assert found["w"][0] == "derived"


def test_new_parameter_on_the_same_storage_stays_shared() -> None:
    model = one(4, 6)

    def rewrap() -> None:
        model.w = nn.Parameter(model.w.data, requires_grad=False)

    found = status(model, {"w": random(4, 6)}, lambda _, t: model.w.data.copy_(t), rewrap)
    assert found["w"] == ("shared", None)


def test_private_copy_kept_in_an_attribute() -> None:
    """Absorbed MLA projections: the parameter is intact, yet another tensor is served."""
    model = nn.Module()
    model.inner = one(4, 6)

    def absorb() -> None:
        model.W_UK = model.inner.w.data.t().contiguous()

    found = status(model, {"w": random(4, 6)}, lambda _, t: model.inner.w.data.copy_(t), absorb)
    assert found["w"][0] == "derived"
    assert "W_UK, a copy made after loading" in str(found["w"][1])


def test_private_copy_kept_in_a_list() -> None:
    model = one(4, 6)

    def pack() -> None:
        model.packed = [{"w": model.w.data.t().contiguous()}]

    found = status(model, {"w": random(4, 6)}, lambda _, t: model.w.data.copy_(t), pack)
    assert "packed, a copy made after loading" in str(found["w"][1])


def test_scratch_space_in_an_attribute_is_no_copy() -> None:
    model = one(4, 6)

    def reserve() -> None:
        model.hidden = torch.zeros(16, 6)

    found = status(model, {"w": random(4, 6)}, lambda _, t: model.w.data.copy_(t), reserve)
    assert found["w"] == ("shared", None)


def test_hundreds_of_experts_in_one_parameter_cost_little() -> None:
    import time

    model = nn.Module()
    model.register_parameter("w13", nn.Parameter(torch.empty(512, 8, 4), requires_grad=False))
    loading = Loading(model)
    tensors = {f"{e}.{half}": random(4, 4) for e in range(512) for half in (0, 1)}

    def load(name: str, tensor: torch.Tensor) -> None:
        expert, half = map(int, name.split("."))
        model.w13.data[expert].narrow(0, 4 * half, 4).copy_(tensor)

    started = time.thread_time()
    loading.run(tensors, load)
    assert time.thread_time() - started < 2  # 1,024 tensors: no scan of all landings for each operation
    assert all(entry.record.status == "shared" for entry in loading.resolve().values())


def test_view_of_a_parameter_in_an_attribute_is_no_copy() -> None:
    model = one(4, 6)

    def keep() -> None:
        model.alias = model.w.data.t()

    found = status(model, {"w": random(4, 6)}, lambda _, t: model.w.data.copy_(t), keep)
    assert found["w"] == ("shared", None)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = one(8, 4)
        self.head = one(8, 4)

    def load(self, name: str, tensor: torch.Tensor) -> None:
        getattr(self, name).w.data.copy_(tensor)


def test_tied_head_rebound_to_the_embedding_after_loading() -> None:
    """Both checkpoint tensors are one tensor in memory, and both are found there."""
    model, tensor = Tied(), random(8, 4)
    loading = Loading(model)
    loading.run({"embed": tensor, "head": tensor.clone()}, model.load)
    model.head.w = model.embed.w

    found = loading.resolve()

    views = [found[name].view for name in ("embed", "head")]
    assert views[0] is not None and views[1] is not None
    assert views[0].data_ptr() == views[1].data_ptr() == model.embed.w.data_ptr()


def test_tied_head_rebound_although_the_checkpoint_differs() -> None:
    model = Tied()

    def tie() -> None:
        model.head.w = model.embed.w

    found = status(model, {"embed": random(8, 4), "head": random(8, 4)}, model.load, tie)
    assert found["embed"] == ("shared", None)
    assert found["head"][0] == "unequal"


def test_tensors_that_vllm_ignores() -> None:
    model, tensors = Layer(), {**checkpoint(), "rotary.inv_freq": random(4)}
    found = status(model, tensors, model.load)
    assert found["rotary.inv_freq"] == ("ignored", "vLLM read it and loaded it nowhere")
    assert found["q"] == ("shared", None)


def test_only_a_part_of_a_tensor_is_loaded() -> None:
    """A tensor-parallel rank, say: the view is that part and the slices say which."""
    model = one(2, 8)
    loading = Loading(model)
    tensor = random(6, 8)
    loading.run({"w": tensor}, lambda _, t: model.w.data.copy_(t.narrow(0, 2, 2)))
    entry = loading.resolve()["w"]
    assert entry.record.status == "shared"
    assert entry.record.slices == ((0, 2, 2),)
    assert entry.record.full_shape == (6, 8)
    assert entry.view is not None and torch.equal(entry.view, tensor[2:4])


def test_the_same_name_twice_in_a_checkpoint() -> None:
    model = one(4, 4)
    loading = Loading(model)
    loading.run({"w": random(4, 4)}, lambda _, t: model.w.data.copy_(t))
    loading.run({"w": random(4, 4)}, lambda _, t: model.w.data.copy_(t))
    assert loading.resolve()["w"].record.status == "unequal"


def test_checkpoint_tensors_that_share_one_storage_are_told_apart() -> None:
    """A whole file in memory: every tensor is a view of the same storage."""
    model, flat = Layer(), torch.randn(4 * 8 * 3)
    tensors = {name: flat[32 * i : 32 * (i + 1)].view(4, 8) for i, name in enumerate("qkv")}
    loading = Loading(model)
    with torch.no_grad(), loading.trace:
        for name, tensor in tensors.items():
            loading.trace.seen(name, tensor)
        for name in "vqk":
            model.load(name, tensors[name])
    found = loading.resolve()
    for name, tensor in tensors.items():
        view = found[name].view
        assert view is not None and torch.equal(view, tensor)


def test_memory_that_is_used_again_for_something_else_is_no_provenance() -> None:
    """A freed checkpoint tensor's address comes back: the new tensor there is not the old one."""
    model = one(64, 64)
    loading = Loading(model)
    with torch.no_grad(), loading.trace:
        for _ in range(50):
            tensor = torch.randn(64, 64)
            loading.trace.seen("w", tensor) if not loading.trace.tensors else None
            del tensor
            model.w.data.copy_(torch.randn(64, 64))
    assert loading.resolve()["w"].record.status == "ignored"


def test_the_trace_keeps_no_checkpoint_tensor_alive() -> None:
    import weakref

    model = one(16, 16)
    loading = Loading(model)
    tensor = random(16, 16)
    alive = weakref.ref(tensor.untyped_storage())
    with torch.no_grad(), loading.trace:
        loading.trace.seen("w", tensor)
        model.w.data.copy_(tensor)
    loading.digests.close()
    loading.trace.landings[0].digest.result()
    del tensor
    assert alive() is None


def test_an_error_of_ours_while_tracing_does_not_end_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tensors = Layer(), checkpoint()
    loading = Loading(model)
    monkeypatch.setattr(LoadTrace, "_find", lambda *a: 1 / 0)

    loading.run(tensors, model.load)

    assert isinstance(loading.trace.failed, ZeroDivisionError)
    assert torch.equal(model.qkv[:4], tensors["q"])
    loading.digests.close()


def test_parameter_made_while_loading() -> None:
    """It was not there to be moved into shared memory: found, and left out on a CPU."""
    model = one(4, 6)

    def load(name: str, tensor: torch.Tensor) -> None:
        if name == "bias":
            model.bias = nn.Parameter(torch.empty(4), requires_grad=False)
        getattr(model, name).data.copy_(tensor)

    loading = Loading(model)
    loading.run({"w": random(4, 6), "bias": random(4)}, load)
    resolved = loading.resolve()
    assert resolved["bias"].record.status == "shared"

    memory = export.place(resolved, torch.device("cpu"), loading.arena)

    assert memory.records["w"].status == "shared"
    assert memory.records["bias"].status == "derived"
    assert "outside the shared memory" in str(memory.records["bias"].reason)


def test_parameter_in_host_memory_of_a_model_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """No allocation of the GPU's: it is left out, and the rest is shared."""
    monkeypatch.setattr(cuda_export, "gpu_uuid", lambda device: "GPU-1")
    monkeypatch.setattr(cuda_export, "CudaAllocations", lambda: SimpleNamespace(allocations=[], locate=lambda _: 1 / 0))
    model = one(4, 6)
    loading = Loading(model)
    loading.run({"w": random(4, 6)}, lambda _, t: model.w.data.copy_(t))

    memory = export.place(loading.resolve(), torch.device("cuda"), None)

    assert memory.records["w"].status == "derived"
    assert "in the host's memory" in str(memory.records["w"].reason)


@pytest.mark.parametrize("told", [True, False])
def test_rehoming_copies_what_was_touched_wherever_it_lies(told: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large fresh memory is mostly pages that were never touched; what was written must come along all the same."""
    if not told:
        monkeypatch.setattr("os.pread", lambda *_: b"")  # a kernel that doesn't say
    model, size = nn.Module(), 3_000_001
    for name in "abc":
        model.register_parameter(name, nn.Parameter(torch.empty(size), requires_grad=False))
    model.a[0], model.a[-1], model.a[1_000_003:1_002_000] = 1, 2, 3
    model.b.fill_(4)
    wanted = {name: parameter.clone() for name, parameter in model.named_parameters() if name != "c"}

    rehome(model, "test")

    for name, value in wanted.items():  # bits, not numbers: fresh memory may hold a NaN
        assert torch.equal(getattr(model, name).view(torch.int32), value.view(torch.int32))


@pytest.mark.parametrize("shared", [False, True])
def test_rehoming_brings_along_what_a_file_holds_and_nobody_has_looked_at_yet(tmp_path: Path, shared: bool) -> None:
    """A parameter on a mapped file, as safetensors loads it: no page of it is this process' before it is read."""
    wanted = torch.randn(300_000)
    wanted.numpy().tofile(tmp_path / "w")
    model = nn.Module()
    mapped = torch.from_file(str(tmp_path / "w"), shared=shared, size=300_000)
    model.register_parameter("w", nn.Parameter(mapped, requires_grad=False))
    rehome(model, "test")
    assert torch.equal(model.w, wanted)


def test_pages_provided_beside_a_load_change_nothing_in_them() -> None:
    model = nn.Module()
    model.register_parameter("w", nn.Parameter(torch.randn(3_000_000), requires_grad=False))
    wanted = model.w.clone()
    prefault = Prefault(rehome(model, "test"))
    model.w[:1000].fill_(5)
    prefault.finish()
    assert not prefault.is_alive()
    assert model.w[:1000].eq(5).all()
    assert torch.equal(model.w[1000:], wanted[1000:])


def test_rehoming_keeps_values_identity_ties_and_aliases() -> None:
    model = Tied()
    model.head.w = model.embed.w
    model.alias = model.embed.w.data[2:4]
    model.register_buffer("scale", torch.tensor([1.0, 2.0]))
    model.register_buffer("scratch", torch.ones(3), persistent=False)
    before, scratch = model.embed.w.clone(), model.scratch.data_ptr()
    identity = model.embed.w

    arena = rehome(model, "test")

    assert model.embed.w is identity is model.head.w
    assert torch.equal(model.embed.w, before)
    assert model.alias.data_ptr() == model.embed.w[2:4].data_ptr()
    assert arena.offset_of(model.scale.data_ptr()) is not None
    assert model.scratch.data_ptr() == scratch
    assert arena.offset_of(scratch) is None
