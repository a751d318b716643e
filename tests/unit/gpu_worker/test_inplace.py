"""Updates written into live weights: unbiased rounding, guarded, strided, the same on every path."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hogwild.gpu_worker import inplace
from hogwild.gpu_worker.inplace import adamw_update_, random_bits, rounding_key, scaled_update_, stochastic_round

YES, NO = torch.tensor(True), torch.tensor(False)


def rate(value: float) -> Tensor:
    return torch.full((1, 1, 1), value)


def test_random_bits_are_uniform_and_uncorrelated_between_steps() -> None:
    index = torch.arange(1 << 16)
    now, then = (random_bits(index, rounding_key(0, step, "w")) for step in (1, 2))
    assert int(now.min()) >= 0
    assert int(now.max()) < 2**32
    # Each bit is set half the time: 65,536 draws, five standard deviations are 0.0098.
    for bit in range(32):
        assert abs(float((now >> bit & 1).double().mean()) - 0.5) < 0.01
    correlation = torch.corrcoef(torch.stack([(x & 0xFFFF).double() for x in (now, then)]))[0, 1]
    assert abs(float(correlation)) < 0.02


def test_random_bits_and_what_is_rounded_with_them_are_those_on_record() -> None:
    # A replay of a job on another version must write the same weights: these numbers never change
    key = rounding_key(3, 7, "model.norm.weight")
    assert key == 2692166982197296853
    index = torch.tensor([0, 1, 2, 1000, 2**32 + 1, 10**12])
    bits = random_bits(index, key)
    assert bits.tolist() == [1087035156, 3602274236, 1404920730, 493655045, 3602274236, 2398738949]
    # 1 + 2**-9 lies a quarter of the way to bf16's next number, 1 + 2**-7: the low 16 bits decide, from 0xC000 up
    x = torch.tensor([1.0, -1.0]).repeat_interleave(4) * (1 + 2**-9)
    given = torch.tensor([0, 0xBFFF, 0xC000, 0x1FFFF] * 2)
    high = 1 + 2**-7
    assert stochastic_round(x, given).tolist() == [1.0, 1.0, high, high, -1.0, -1.0, -high, -high]
    assert stochastic_round(x[:1].repeat(6), bits).tolist() == [high, 1.0, 1.0, 1.0, 1.0, high]


@pytest.mark.parametrize("value", [1.00001, -1.003, 3.14159e-3, -7.77e20, 1e-39])
def test_stochastic_rounding_is_right_on_average(value: float) -> None:
    # Given one value between two bf16 neighbours, rounded 200,000 times
    x = torch.full((200_000,), value)
    rounded = stochastic_round(x, random_bits(torch.arange(x.numel()), rounding_key(0, 1, "w")))
    low, high = float(rounded.min()), float(rounded.max())
    # Then only the two neighbours occur, and the mean is the value: five standard deviations of the mean
    assert low <= float(x[0]) <= high
    assert len(rounded.unique()) == 2
    mean = float(rounded.double().mean())
    assert abs(mean - float(x[0].double())) <= 5 * (high - low) * 0.5 / x.numel() ** 0.5


def test_values_that_bf16_holds_are_not_moved_by_rounding() -> None:
    x = torch.randn(10_000).bfloat16().float()
    assert torch.equal(stochastic_round(x, random_bits(torch.arange(10_000), 5)).float(), x)


def test_updates_too_small_for_rounding_to_nearest_still_add_up() -> None:
    # Given bf16 weights of 1.5 and updates of |w| / 2000 a step, 400 of them
    steps, update = 400, 1.5 / 2000
    p = torch.full((1, 64, 256), 1.5, dtype=torch.bfloat16)
    nearest = p.clone()
    for step in range(steps):
        scaled_update_(p, torch.ones_like(p), rate(update), 0.0, rounding_key(0, step, "w"), YES)
        nearest -= update
    # Then rounding to nearest has not moved at all, and ours has moved by the right amount:
    # the standard error over 16,384 weights is far below 1 % of it.
    assert torch.equal(nearest, torch.full_like(nearest, 1.5))
    moved = 1.5 - float(p.double().mean())
    assert moved == pytest.approx(steps * update, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_that_is_not_finite_leaves_every_bit(dtype: torch.dtype) -> None:
    p = torch.randn(1, 33, 17).to(dtype)
    before = p.clone()
    bad = torch.full_like(p, float("nan"))
    scaled_update_(p, bad.clone(), rate(0.0), 0.5, 1, NO)  # 0 · nan is nan: the flag decides, not the rate
    m, v = torch.zeros(p.shape), torch.zeros(p.shape)
    adamw_update_(p, bad, m, v, torch.tensor(1.0), lr=0.1, betas=(0.9, 0.99), eps=1e-8, decay=0.5, key=1, ok=NO)
    assert torch.equal(p, before)
    assert not m.any()
    assert not v.any()


def test_update_that_would_overflow_keeps_the_old_value() -> None:
    p = torch.tensor([[[3e38, 1.0]]]).bfloat16()
    before = p.clone()
    scaled_update_(p, torch.tensor([[[-3e38, 1.0]]]).bfloat16(), rate(2.0), 0.0, 1, YES)
    assert p[0, 0, 0] == before[0, 0, 0]
    assert p[0, 0, 1] == -1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", [0x7FFFFFFF, 0x7FC00000, 0x7F800000])  # the nan that CUDA makes, x86's, infinity
def test_update_that_is_not_finite_keeps_the_old_value(dtype: torch.dtype, pattern: int) -> None:
    p = torch.randn(1, 20, 30).to(dtype)
    before = p.clone()
    bad = torch.full((1, 20, 30), pattern, dtype=torch.int32).view(torch.float32)
    bad[0, 0, 0] = 1.0
    for key in range(5):
        scaled_update_(p, torch.ones_like(p), bad, 0.0, key, YES)
    assert not torch.equal(p[0, 0, 0], before[0, 0, 0])
    p[0, 0, 0] = before[0, 0, 0]
    assert torch.equal(p, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_of_fused_weights_are_written_where_they_lie(dtype: torch.dtype) -> None:
    # Given a view into a larger tensor, as a slice of a fused projection is
    fused = torch.randn(40, 24).to(dtype)
    before = fused.clone()
    view = fused[8:24, 4:20]
    g = torch.randn(16, 16).to(dtype)
    copy = view.clone()[None]
    scaled_update_(view[None], g.clone()[None], rate(0.1), 0.01, 7, YES)
    scaled_update_(copy, g.clone()[None], rate(0.1), 0.01, 7, YES)
    # Then the slice has changed as its own copy did, and nothing around it has
    assert torch.equal(view, copy[0])
    assert not torch.equal(view, before[8:24, 4:20])
    fused[8:24, 4:20] = before[8:24, 4:20]
    assert torch.equal(fused, before)


def test_result_does_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.randn(2, 30, 50).bfloat16()
    results = []
    for chunk in (1 << 20, 64):
        monkeypatch.setattr(inplace, "CHUNK", chunk)
        p = torch.ones(2, 30, 50, dtype=torch.bfloat16)
        scaled_update_(p, g.clone(), rate(1e-3), 0.0, 99, YES)
        results.append(p)
    assert torch.equal(*results)


def test_steps_and_names_draw_different_bits_and_replays_the_same() -> None:
    keys = {rounding_key(seed, step, name) for seed in (0, 1) for step in (1, 2) for name in ("a", "b")}
    assert len(keys) == 8
    assert rounding_key(0, 1, "a") == rounding_key(0, 1, "a")


@pytest.mark.timeout(610)
@pytest.mark.parametrize(("script", "says"), [("interpreted_kernels", "compared"), ("compiled_kernels", "compiled")])
def test_cuda_kernels_compute_what_the_torch_code_does_and_compile(script: str, says: str) -> None:
    # Given no GPU here: Triton's interpreter runs the same kernels, in a process that starts with it switched on; and
    # its compiler, which knows what the interpreter lets pass, takes them for an H100
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / f"{script}.py")],
        env=os.environ | {"TRITON_INTERPRET": "1" if script == "interpreted_kernels" else "0"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert says in done.stdout
