# mypy: ignore-errors
"""Triton kernels for the update of live weights on CUDA; the same arithmetic as the torch code in `inplace.py`.

Everything stays on the device: whether a gradient is finite is a flag in memory that the writing kernel reads, so the
host never waits inside a step. Tensors are (B, m, n) with any strides; a block of the grid is a tile of one matrix.

Arguments that change from step to step are not specialised on: a kernel for keys "divisible by 16" is another kernel.

mypy is off for this file: a kernel's arguments are pointers and compile-time constants, not what their names say.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hogwild.gpu_worker.inplace import MIX_1, MIX_2

# Elements of a tile: enough loads in flight for each thread to hide memory latency, few enough to stay in registers.
TILE = 4096
# Of the measuring kernel, by the direction in which memory runs: rows and columns of a tile, tiles under way at once,
# and about how many programs. Tried out on an H100, whose memory they keep busy to two thirds.
MEASURE_BY_ROWS = (8, 512, 2, 528)
MEASURE_BY_COLUMNS = (256, 16, 4, 1056)
# Elements of a vector up to which one program does all of its update.
VECTOR = 8192


@triton.jit
def _random_bits(index, key_low, key_high, MIX_A: tl.constexpr, MIX_B: tl.constexpr):
    """`inplace.random_bits`: uint32 from an element index."""
    x = index.to(tl.uint32) ^ key_low.to(tl.uint32)
    x = x ^ (x >> 16)
    x = x * MIX_A
    x = x ^ key_high.to(tl.uint32)
    x = x ^ (x >> 15)
    x = x * MIX_B
    return x ^ (x >> 16)


@triton.jit
def _rounded(new, old, index, key_low, key_high, STOCHASTIC: tl.constexpr, MIX_A: tl.constexpr, MIX_B: tl.constexpr):
    """float32 as it will be stored: rounded stochastically to bf16, or the old value where it is not finite."""
    stored = new
    if STOCHASTIC:
        bits = _random_bits(index, key_low, key_high, MIX_A, MIX_B) & 0xFFFF
        stored = ((new.to(tl.uint32, bitcast=True) + bits) & 0xFFFF0000).to(tl.float32, bitcast=True)
    # Not finite: the difference with itself is nan, which equals nothing. Before the rounding, which can carry a nan's
    # pattern over to that of -0, and after it.
    return tl.where((new - new == 0.0) & (stored - stored == 0.0), stored, old)


@triton.jit(do_not_specialize=["decay", "key_low", "key_high"])
def _scaled_update(
    p, g, c, ok, decay, key_low, key_high, m, n,
    p_b, p_m, p_n, g_b, g_m, g_n, c_b, c_m, c_n,
    ROWS: tl.constexpr, COLS: tl.constexpr, BY_ROW: tl.constexpr, BY_COLUMN: tl.constexpr,
    STOCHASTIC: tl.constexpr, MIX_A: tl.constexpr, MIX_B: tl.constexpr,
):  # fmt: skip
    if tl.load(ok) == 0:
        return
    tiles_n = tl.cdiv(n, COLS)
    tiles = tl.cdiv(m, ROWS) * tiles_n
    b = (tl.program_id(0) // tiles).to(tl.int64)
    t = tl.program_id(0) % tiles
    rows = ((t // tiles_n) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    cols = ((t % tiles_n) * COLS + tl.arange(0, COLS)).to(tl.int64)[None, :]
    inside = (rows < m) & (cols < n)
    at = p + b * p_b + rows * p_m + cols * p_n
    old = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    slope = tl.load(g + b * g_b + rows * g_m + cols * g_n, mask=inside, other=0.0).to(tl.float32)
    # One load for each row, column or tile: a load for each element would cost more than those of p and g.
    factors = c + b * c_b
    if BY_ROW and BY_COLUMN:
        scale = tl.load(factors + rows * c_m + cols * c_n, mask=inside, other=0.0)
    elif BY_ROW:
        scale = tl.load(factors + rows * c_m, mask=rows < m, other=0.0)
    elif BY_COLUMN:
        scale = tl.load(factors + cols * c_n, mask=cols < n, other=0.0)
    else:
        scale = tl.load(factors)
    new = old * (1.0 - decay) - slope * scale
    index = (b * m + rows) * n + cols
    new = _rounded(new, old, index, key_low, key_high, STOCHASTIC, MIX_A, MIX_B)
    tl.store(at, new.to(p.dtype.element_ty), mask=inside)


@triton.jit
def _adamw(old, slope, mean, square, taken, lr, beta1, beta2, eps, decay):
    """New weight and moments, float32, in the step that `taken` counts already."""
    mean = mean + (1.0 - beta1) * (slope - mean)
    square = beta2 * square + (1.0 - beta2) * slope * slope
    bias1 = 1.0 - tl.exp2(taken * tl.log2(beta1))
    bias2 = 1.0 - tl.exp2(taken * tl.log2(beta2))
    new = old * (1.0 - decay) - (lr / bias1) * mean / (tl.sqrt(square) / tl.sqrt(bias2) + eps)
    return new, mean, square


@triton.jit(do_not_specialize=["lr", "decay", "key_low", "key_high"])
def _adamw_update(
    p, g, first, second, step, ok, lr, beta1, beta2, eps, decay, key_low, key_high, m, n,
    p_b, p_m, p_n, g_b, g_m, g_n,
    ROWS: tl.constexpr, COLS: tl.constexpr, STOCHASTIC: tl.constexpr, MIX_A: tl.constexpr, MIX_B: tl.constexpr,
):  # fmt: skip
    if tl.load(ok) == 0:
        return
    tiles_n = tl.cdiv(n, COLS)
    tiles = tl.cdiv(m, ROWS) * tiles_n
    b = (tl.program_id(0) // tiles).to(tl.int64)
    t = tl.program_id(0) % tiles
    rows = ((t // tiles_n) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    cols = ((t % tiles_n) * COLS + tl.arange(0, COLS)).to(tl.int64)[None, :]
    inside = (rows < m) & (cols < n)
    at = p + b * p_b + rows * p_m + cols * p_n
    index = (b * m + rows) * n + cols  # the moments are contiguous: their offset is the element's index
    old = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    slope = tl.load(g + b * g_b + rows * g_m + cols * g_n, mask=inside, other=0.0).to(tl.float32)
    mean = tl.load(first + index, mask=inside, other=0.0)
    square = tl.load(second + index, mask=inside, other=0.0)
    new, mean, square = _adamw(old, slope, mean, square, tl.load(step), lr, beta1, beta2, eps, decay)
    tl.store(first + index, mean, mask=inside)
    tl.store(second + index, square, mask=inside)
    new = _rounded(new, old, index, key_low, key_high, STOCHASTIC, MIX_A, MIX_B)
    tl.store(at, new.to(p.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["lr", "decay", "key_low", "key_high"])
def _adamw_vector(
    p, g, first, second, step, total, lr, beta1, beta2, eps, decay, key_low, key_high, n, p_n, g_n,
    BLOCK: tl.constexpr, STOCHASTIC: tl.constexpr, MIX_A: tl.constexpr, MIX_B: tl.constexpr,
):  # fmt: skip
    """All of a vector's update, the check of its gradient included, by one program."""
    index = tl.arange(0, BLOCK)
    inside = index < n
    slope = tl.load(g + index.to(tl.int64) * g_n, mask=inside, other=0.0).to(tl.float32)
    squares = tl.sum(slope * slope, 0)
    good = squares - squares == 0.0
    tl.store(total, squares)
    taken = tl.load(step) + tl.where(good, 1.0, 0.0)
    tl.store(step, taken)
    inside = inside & good
    at = p + index.to(tl.int64) * p_n
    old = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    mean = tl.load(first + index, mask=inside, other=0.0)
    square = tl.load(second + index, mask=inside, other=0.0)
    new, mean, square = _adamw(old, slope, mean, square, taken, lr, beta1, beta2, eps, decay)
    tl.store(first + index, mean, mask=inside)
    tl.store(second + index, square, mask=inside)
    new = _rounded(new, old, index, key_low, key_high, STOCHASTIC, MIX_A, MIX_B)
    tl.store(at, new.to(p.dtype.element_ty), mask=inside)


@triton.jit
def _measure(
    g, projection, squares, dots, m, n, g_b, g_m, g_n, rows_each,
    ROWS: tl.constexpr, COLS: tl.constexpr, STAGES: tl.constexpr, PROJECT: tl.constexpr,
):  # fmt: skip
    """One pass over G (B, m, n): partial column sums of g² and of P g, for a slice of the rows.

    Partial sums go to memory and are added by the caller in a fixed order: atomics would make a replay differ.
    """
    column_tile, part, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    parts = tl.num_programs(1)
    cols = column_tile * COLS + tl.arange(0, COLS)
    wide = cols.to(tl.int64)[None, :]
    square = tl.zeros((ROWS, COLS), tl.float32)
    dot = tl.zeros((ROWS, COLS), tl.float32)
    for start in tl.range(0, rows_each, ROWS, num_stages=STAGES):
        rows = part * rows_each + start + tl.arange(0, ROWS)
        inside = (start + tl.arange(0, ROWS) < rows_each)[:, None] & (rows < m)[:, None] & (cols < n)[None, :]
        slope = tl.load(g + b * g_b + rows.to(tl.int64)[:, None] * g_m + wide * g_n, mask=inside, other=0.0)
        slope = slope.to(tl.float32)
        square += slope * slope
        if PROJECT:
            dot += slope * tl.load(projection + rows, mask=rows < m, other=0.0)[:, None]
    out = (b * parts + part) * n + cols
    tl.store(squares + out, tl.sum(square, 0), mask=cols < n)
    if PROJECT:
        tl.store(dots + out, tl.sum(dot, 0), mask=cols < n)


@triton.jit(do_not_specialize=["rate"])
def _mini_moments(
    dots, squares, first, second, norm, step, total, ok, coefficient, n, rate, beta1, beta2, eps, growth,
    BLOCK: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    """Rank-1, tensor-wise APOLLO for one matrix of the stack: moments, factor, limiter. All sums in a fixed order.

    ALONE: the only matrix; whether its gradient is finite is found out here, and the step is counted.
    """
    b = tl.program_id(0).to(tl.int64)
    taken = tl.load(step)
    if ALONE:
        summed = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, n, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            summed += tl.load(squares + cols, mask=cols < n, other=0.0)
        everything = tl.sum(summed, 0)
        good = everything - everything == 0.0
        taken += tl.where(good, 1.0, 0.0)
        tl.store(total, everything)
        tl.store(ok, good)
        tl.store(step, taken)
    else:
        good = tl.load(ok).to(tl.int32) != 0
    readable = tl.where(good, n, 0)  # a bad gradient is not even looked at
    bias1 = 1.0 - tl.exp2(taken * tl.log2(beta1))
    bias2 = 1.0 - tl.exp2(taken * tl.log2(beta2))
    before = tl.zeros((BLOCK,), tl.float32)
    after = tl.zeros((BLOCK,), tl.float32)
    own = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < readable
        at = b * n + cols
        r = tl.load(dots + at, mask=inside, other=0.0)
        mean = tl.load(first + at, mask=inside, other=0.0)
        square = tl.load(second + at, mask=inside, other=0.0)
        mean = mean + (1.0 - beta1) * (r - mean)
        square = square + (1.0 - beta2) * (r * r - square)
        tl.store(first + at, mean, mask=inside)
        tl.store(second + at, square, mask=inside)
        adapted = (mean / bias1) / (tl.sqrt(square / bias2) + eps)
        before += r * r
        after += adapted * adapted
        own += tl.load(squares + at, mask=inside, other=0.0)
    before_norm = tl.sqrt(tl.sum(before, 0))
    factor = tl.where(before_norm > 0, tl.sqrt(tl.sum(after, 0)) / before_norm, 0.0)
    now = factor * tl.sqrt(tl.sum(own, 0))
    last = tl.load(norm + b)
    limit = tl.where((last > 0) & (now > growth * last), growth * last / now, 1.0)
    tl.store(norm + b, tl.where(now > 0, now * limit, last), mask=good)
    tl.store(coefficient + b, factor * limit * rate)


def scaled_update_(p: Tensor, g: Tensor, coefficient: Tensor, decay: float, key: int, ok: Tensor) -> None:
    """See `inplace.scaled_update_`."""
    c = coefficient.expand(p.shape)
    rows, cols, grid = _tiles(p)
    _scaled_update[grid](
        p, g, c, ok, decay, key & 0xFFFFFFFF, key >> 32, p.shape[1], p.shape[2],
        *p.stride(), *g.stride(), *c.stride(),
        ROWS=rows, COLS=cols, BY_ROW=c.stride(1) != 0, BY_COLUMN=c.stride(2) != 0,
        STOCHASTIC=p.dtype == torch.bfloat16, MIX_A=MIX_1, MIX_B=MIX_2, num_warps=8,
    )  # fmt: skip


def adamw_update_(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: Tensor, *, lr: float, betas: tuple[float, float], eps: float,
    decay: float, key: int, ok: Tensor,
) -> None:  # fmt: skip
    """See `inplace.adamw_update_`."""
    rows, cols, grid = _tiles(p)
    _adamw_update[grid](
        p, g, m, v, step, ok, lr, betas[0], betas[1], eps, decay, key & 0xFFFFFFFF, key >> 32, p.shape[1], p.shape[2],
        *p.stride(), *g.stride(),
        ROWS=rows, COLS=cols, STOCHASTIC=p.dtype == torch.bfloat16, MIX_A=MIX_1, MIX_B=MIX_2, num_warps=8,
    )  # fmt: skip


def adamw_vector_(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: Tensor, *, lr: float, betas: tuple[float, float], eps: float,
    decay: float, key: int,
) -> Tensor:  # fmt: skip
    """A whole guarded AdamW update of a (1, 1, n) vector, n up to `VECTOR`; returns Σ g² (scalar)."""
    total = torch.empty((), dtype=torch.float32, device=p.device)
    n = p.shape[2]
    _adamw_vector[(1,)](
        p, g, m, v, step, total, lr, betas[0], betas[1], eps, decay, key & 0xFFFFFFFF, key >> 32, n,
        p.stride(2), g.stride(2), BLOCK=triton.next_power_of_2(n), STOCHASTIC=p.dtype == torch.bfloat16,
        MIX_A=MIX_1, MIX_B=MIX_2, num_warps=8,
    )  # fmt: skip
    return total


def column_sums(g: Tensor, projection: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Σᵢ g² and Σᵢ Pᵢ g for each column of (B, m, n), in one read of g.

    Args:
        projection: (1, m) float32, or None.

    Returns:
        (B, n) float32 each; the second is None without a projection.
    """
    stacked, m, n = g.shape
    rows, cols, stages, programs = MEASURE_BY_ROWS if g.stride(2) <= g.stride(1) else MEASURE_BY_COLUMNS
    column_tiles = triton.cdiv(n, cols)
    parts = max(1, min(triton.cdiv(m, rows), programs // max(1, column_tiles * stacked)))
    rows_each = triton.cdiv(triton.cdiv(m, parts), rows) * rows
    parts = triton.cdiv(m, rows_each)
    project = projection is not None
    partial = torch.empty(1 + project, stacked, parts, n, dtype=torch.float32, device=g.device)
    _measure[(column_tiles, parts, stacked)](
        g, projection if project else partial, partial[0], partial[-1], m, n, *g.stride(), rows_each,
        ROWS=rows, COLS=cols, STAGES=stages, PROJECT=project, num_warps=4,
    )  # fmt: skip
    sums = partial.sum(2)
    return sums[0], sums[1] if project else None


def mini_coefficient(
    g: Tensor, projection: Tensor | None, state: dict[str, Tensor], *, betas: tuple[float, float], eps: float,
    growth: float, rate: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """APOLLO-Mini's limited factor for (B, m, n) gradients, times `rate`; updates the state.

    Args:
        projection: (1, m) float32; None: m is 1 and G is its own projection.

    Returns:
        factors (B, 1, 1); Σ g² (scalar); whether that is finite (bool scalar).
    """
    stacked, _, n = g.shape
    squares, dots = column_sums(g, projection)
    if stacked == 1:  # the usual case takes three launches, which hundreds of tensors a step do notice
        total = torch.empty((), dtype=torch.float32, device=g.device)
        ok = torch.empty((), dtype=torch.bool, device=g.device)
    else:
        total = squares.sum()
        ok = total.isfinite()
        state["step"].add_(ok)
    coefficient = torch.empty(stacked, 1, 1, dtype=torch.float32, device=g.device)
    _mini_moments[(stacked,)](
        g.float().contiguous() if dots is None else dots, squares, state["m"], state["v"], state["norm"],
        state["step"], total, ok, coefficient, n, rate, betas[0], betas[1], eps, growth,
        BLOCK=4096, ALONE=stacked == 1, num_warps=8,
    )  # fmt: skip
    return coefficient, total, ok


def _tiles(p: Tensor) -> tuple[int, int, tuple[int]]:
    """Rows and columns of a tile, and the grid, for a (B, m, n) tensor."""
    stacked, m, n = p.shape
    if p.stride(2) > p.stride(1) and m > 1:
        rows = min(TILE, triton.next_power_of_2(m), 1024)
        cols = min(TILE // rows, triton.next_power_of_2(n))
    else:
        cols = min(TILE, triton.next_power_of_2(n), 1024)
        rows = min(TILE // cols, triton.next_power_of_2(m))
    return rows, cols, (stacked * triton.cdiv(m, rows) * triton.cdiv(n, cols),)
