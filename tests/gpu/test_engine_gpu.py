"""The training step on a CUDA device: kernels, packed flash attention, memory. Skipped where there is none.

pytest tests/gpu/test_engine_gpu.py
"""

import math
from typing import Any

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Qwen3Config, Qwen3ForCausalLM  # noqa: E402

from hogwild.errors import DoesNotFit  # noqa: E402
from hogwild.gpu_worker import attention, inplace, kernels  # noqa: E402
from hogwild.gpu_worker.batch import Sample, collate, with_frozen_context  # noqa: E402
from hogwild.gpu_worker.config import TrainConfig  # noqa: E402
from hogwild.gpu_worker.engine import Trainer  # noqa: E402
from hogwild.gpu_worker.optim import ApolloMini, build_optimizer  # noqa: E402

VOCAB = 1000
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 4096,
}  # fmt: skip
MODELS: dict[str, Any] = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE)),
    "qwen3-tied": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, tie_word_embeddings=True)),
    # Three sliding layers to one full one.
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE, sliding_window=16, sliding_window_pattern=4)),
}


def build(name: str, dtype: Any = None) -> Any:
    torch.manual_seed(0)
    with torch.device("cuda"):
        return MODELS[name]().to(dtype or torch.bfloat16).train()


def samples(lengths: list[int]) -> list[Sample]:
    g = torch.Generator().manual_seed(0)
    return [
        Sample(torch.randint(0, VOCAB, (n,), generator=g).tolist(), torch.randint(0, VOCAB, (8,), generator=g).tolist())
        for n in lengths
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 64, 200), (1, 200, 64), (3, 33, 65), (1, 1, 1000), (1, 4096, 1024)])
@pytest.mark.parametrize("transposed", [False, True])
def test_kernels_write_the_bits_that_the_torch_code_does(dtype: Any, shape: Any, transposed: bool) -> None:
    torch.manual_seed(0)
    b, m, n = shape
    base = torch.randn(b, n + 3, m + 5).to(dtype) if transposed else torch.randn(b, m + 3, n + 5).to(dtype)
    there = base.cuda()
    here, live = ((t[:, 1 : n + 1, 2 : m + 2].mT if transposed else t[:, 1 : m + 1, 2 : n + 2]) for t in (base, there))
    g, c = torch.randn(shape).to(dtype), torch.rand(b, 1, n) * 1e-2
    key = inplace.rounding_key(0, 1, "w")
    inplace.scaled_update_(here, g.clone(), c, 1e-3, key, torch.tensor(True))
    kernels.scaled_update_(live, g.cuda(), c.cuda(), 1e-3, key, torch.tensor(True, device="cuda"))
    # A multiply-add may be fused there: float32 may differ in the last bit, and bf16 then in one place, rarely.
    torch.testing.assert_close(there.cpu(), base, rtol=1e-6 if dtype == torch.float32 else 8e-3, atol=1e-7)
    assert (there.cpu() != base).float().mean() < (0.3 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("shape", [(1, 64, 200), (2, 200, 64), (1, 4096, 1024), (1, 50_000, 256)])
def test_mini_factor_is_that_of_the_torch_code(shape: Any) -> None:
    torch.manual_seed(0)
    optimizer = ApolloMini()
    optimizer.steps = 1
    a, b = (optimizer.new_state("w", torch.empty(shape, device="cuda")) for _ in range(2))
    for _ in range(3):
        g = torch.randn(shape, device="cuda").bfloat16()
        columns = g.mT if shape[1] > shape[2] else g
        r = optimizer.projection("w", columns.shape[1], g) @ columns.float()
        total = optimizer._squares_of("w", columns)
        expected = optimizer._coefficient(r, total, a, torch.tensor(True, device="cuda"))
        got, squares, ok = optimizer._kernel_coefficient("w", columns, b, 1.0)
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=0)
        torch.testing.assert_close(squares, inplace.sum_of_squares(g), rtol=1e-4, atol=0)
        assert bool(ok)


@pytest.mark.parametrize("kind", ["sgd", "adamw", "apollo", "apollo-mini"])
def test_gradient_that_is_not_finite_leaves_every_bit(kind: str) -> None:
    optimizer = build_optimizer(TrainConfig(optimizer=kind), {"e"})
    params = {
        "m": torch.randn(300, 500),
        "v": torch.randn(500),
        "e": torch.randn(2000, 300),
        "x": torch.randn(4, 64, 32),
    }
    params = {n: p.cuda().bfloat16() for n, p in params.items()}
    for round_ in range(2):
        before = {n: p.clone() for n, p in params.items()}
        state = {n: {k: t.clone() for k, t in s.items()} for n, s in optimizer.state.items()}
        optimizer.begin_step(0.01)
        for n, p in params.items():
            g = torch.randn_like(p)
            if round_:
                g.view(-1)[-1] = float("nan")
            optimizer.step_param(n, p, g)
        stats = optimizer.end_step()
        assert set(stats.nonfinite) == (set(params) if round_ else set())
        assert all(torch.equal(p, before[n]) == bool(round_) for n, p in params.items())
    assert all(torch.equal(t, state[n][k]) for n, s in optimizer.state.items() for k, t in s.items())


@pytest.mark.parametrize("name", MODELS)
def test_packed_flash_attention_isolates_and_agrees_with_masks(name: str) -> None:
    model = build(name)
    trainer = Trainer(model)
    assert trainer.forward.abilities.packs
    assert model.config._attn_implementation == attention.NAME
    data = samples([40, 7, 90, 21])
    total = sum(s.total_weight for s in data)
    packed = trainer.forward.loss(collate(data, trainer.device), total)
    separate = sum(trainer.forward.loss(collate([s], trainer.device), total) for s in data)
    torch.testing.assert_close(packed, separate, rtol=2e-3, atol=0)
    params = list(model.parameters())
    got, wanted = (torch.autograd.grad(x, params) for x in (packed, separate))
    trainer.close()
    model.set_attn_implementation("sdpa")
    masks = Trainer(model)
    model.set_attn_implementation("sdpa")
    masked = masks.forward.loss(collate(data, trainer.device), total)
    torch.testing.assert_close(packed, masked, rtol=2e-3, atol=0)
    for a, b in zip(got, wanted, strict=True):
        assert torch.linalg.vector_norm((a - b).float()) < 0.05 * torch.linalg.vector_norm(b.float()) + 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_frozen_context_agrees_with_masks(name: str) -> None:
    model = build(name)
    trainer = Trainer(model)
    sample = samples([50])[0]
    batch = with_frozen_context(sample, trainer.device)
    flash = trainer.forward.loss(batch, 1.0)
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(flash, trainer.forward.loss(batch, 1.0), rtol=2e-3, atol=0)


@pytest.mark.parametrize("kind", ["sgd", "adamw", "apollo", "apollo-mini"])
@pytest.mark.parametrize("compiled", [False, True])
def test_bf16_model_learns_in_place(kind: str, compiled: bool) -> None:
    model = build("qwen3-tied")
    places = {n: p.data_ptr() for n, p in model.named_parameters()}
    trainer = Trainer(model, compile_layers=compiled)
    rate = 0.05 if kind == "sgd" else 1e-3
    plan = trainer.plan(samples([20, 30, 25]), TrainConfig(optimizer=kind, learning_rate=rate, steps=40))
    losses = trainer.run(plan).losses
    assert losses[-1] < 0.6 * losses[0]
    assert all(math.isfinite(x) for x in losses)
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == places
    trainer.close()


def test_replay_is_bit_exact() -> None:
    runs = []
    for _ in range(2):
        model = build("qwen3")
        trainer = Trainer(model)
        config = TrainConfig(learning_rate=1e-3, steps=4, max_tokens_per_step=64)
        losses = trainer.run(trainer.plan(samples([20, 30, 25]), config)).losses
        runs.append((losses, [p.detach().clone() for p in model.parameters()]))
    # Flash attention's backward adds in the order in which blocks finish unless it is told not to: losses may differ
    # in the last bits after the first step, the first one may not.
    assert runs[0][0][0] == runs[1][0][0]
    torch.testing.assert_close(torch.tensor(runs[0][0]), torch.tensor(runs[1][0]), rtol=1e-2, atol=0)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("limit_mb", [150, 400, None])
def test_peak_memory_stays_within_the_plan(limit_mb: int | None, compiled: bool) -> None:
    model = build("qwen3")
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    limit = None if limit_mb is None else before + (limit_mb << 20)
    trainer = Trainer(model, memory_limit=limit, compile_layers=compiled)
    plan = trainer.plan(samples([1000] * 4), TrainConfig(steps=2))
    result = trainer.run(plan)
    assert result.peak_bytes is not None
    used = result.peak_bytes - before
    assert used <= plan.budget.total
    # and the plan is no wild exaggeration: what it counts beyond is slack and workspaces
    assert used > 0.25 * (plan.budget.total - (64 << 20))


def test_out_of_memory_leaves_the_device_usable() -> None:
    model = build("qwen3")
    trainer = Trainer(model)
    plan = trainer.plan(samples([30]), TrainConfig(steps=2))
    held = torch.cuda.memory_allocated()
    original = trainer.forward.losses

    def greedy(*args: Any) -> Any:
        loss = original(*args)
        return loss + torch.empty(1 << 42, dtype=torch.uint8, device="cuda").sum()

    trainer.forward.losses = greedy  # type: ignore[method-assign]
    with pytest.raises(DoesNotFit) as e:
        trainer.run(plan)
    assert e.value.details["interrupted"] is False
    trainer.forward.losses = original  # type: ignore[method-assign]
    assert torch.cuda.memory_allocated() - held < 8 << 20
    assert trainer.run(plan).n_steps == 2
