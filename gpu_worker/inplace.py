"""Writing updates into live weights: in place, in one pass, never a value that is not finite.

vLLM samples from these tensors while they are written, so they are only ever mutated in place, never replaced.
bf16 has 8 significant bits: rounding to nearest loses every update below |w|/512, which at fine-tuning rates is nearly
all of them. So the new value is computed in float32 and rounded *stochastically*: up or down with probabilities that
make the expectation exact.

The random bits are a counter-based hash of (key, element index), the key a hash of (seed, step, parameter name). They
are the same on every device and whatever the strides or chunks, so a replay is exact.

Matrices are seen as (B, m, n): B stacked matrices of m rows and n columns, any strides. On CUDA the work is done by the
Triton kernels in `kernels.py`; this module's torch code is the same arithmetic for every other device.
"""

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

# Elements handled at a time by the torch code: bounds its temporaries to a few MB whatever the size of the tensor.
CHUNK = 1 << 20

# Multipliers of a 32-bit integer mixer (xor-shift-multiply); odd, so that each multiplication is a bijection.
MIX_1 = 0x7FEB352D
MIX_2 = 0x846CA68B
_LOW32 = 0xFFFFFFFF

SUPPORTED_DTYPES = (torch.float32, torch.bfloat16)


def rounding_key(seed: int, step: int, name: str) -> int:
    """Key of one parameter's random bits in one optimizer step: two halves of 31 bits, each a positive int32."""
    digest = hashlib.blake2b(f"{seed}/{step}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & 0x7FFFFFFF_7FFFFFFF


def random_bits(index: Tensor, key: int) -> Tensor:
    """32 random bits for each element index: int64 in, int64 in [0, 2**32) out."""
    x = (index & _LOW32) ^ (key & _LOW32)
    x = x ^ (x >> 16)
    x = (x * MIX_1) & _LOW32
    x = x ^ (key >> 32 & _LOW32)
    x = x ^ (x >> 15)
    x = (x * MIX_2) & _LOW32
    return x ^ (x >> 16)


def stochastic_round(x: Tensor, bits: Tensor) -> Tensor:
    """float32 to bf16 with E[result] = x.

    bf16 is float32 without its low 16 bits, and sign-magnitude, so adding 16 random bits to the pattern before cutting
    them off carries into the kept part with exactly the probability that the lost part is worth.

    Args:
        x: float32.
        bits: int64, same shape; the low 16 are used.
    """
    pattern = x.view(torch.int32) + (bits & 0xFFFF).to(torch.int32)
    return (pattern & -65536).view(torch.float32).to(torch.bfloat16)


def as_matrices(t: Tensor) -> Tensor:
    """View of a tensor as (B, m, n): a vector is one row, a stack of experts stays a stack."""
    if t.ndim == 2:
        return t[None]
    if t.ndim == 3:
        return t
    if t.ndim <= 1:
        return t.reshape(1, 1, -1)
    return t.flatten(0, -3)


def scaled_update_(p: Tensor, g: Tensor, coefficient: Tensor, decay: float, key: int, ok: Tensor) -> None:
    """p ← p · (1 - decay) - coefficient · g, rounded as `p` needs it. Does nothing unless `ok`.

    Args:
        p: (B, m, n) live weight, float32 or bf16, any strides.
        g: (B, m, n) its gradient; overwritten.
        coefficient: float32, broadcasts to (B, m, n): learning rate times the optimizer's scaling.
        decay: learning rate times weight decay.
        key: of `rounding_key`.
        ok: bool scalar on the device; False: the gradient holds something that is not finite.
    """
    if use_kernels(p):
        from hogwild.gpu_worker import kernels

        kernels.scaled_update_(p, g, coefficient, decay, key, ok)
        return
    if not bool(ok):
        return
    coefficient = coefficient.expand(p.shape)
    if p.dtype == torch.float32 and g.dtype == torch.float32:
        # No temporaries: the gradient is ours to spend.
        if decay:
            p.mul_(1.0 - decay)
        g.mul_(coefficient)
        if not torch.isfinite(torch.linalg.vector_norm(g)):
            g.nan_to_num_(0.0, 0.0, 0.0)
        p.sub_(g)
        return
    for at, index in _chunks(p):
        new = p[at].float().mul_(1.0 - decay).sub_(g[at].float().mul_(coefficient[at]))
        _store(p, at, new, index, key)


def adamw_update_(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: Tensor, *, lr: float, betas: tuple[float, float], eps: float,
    decay: float, key: int, ok: Tensor,
) -> None:  # fmt: skip
    """One AdamW step (arXiv 1711.05101, algorithm 2) of (B, m, n) tensors in place. Does nothing unless `ok`.

    Args:
        m, v: float32 first and second moments, contiguous, of p's shape.
        step: float32 scalar, already counting this step.
        decay: learning rate times weight decay.
    """
    if use_kernels(p):
        from hogwild.gpu_worker import kernels

        kernels.adamw_update_(p, g, m, v, step, lr=lr, betas=betas, eps=eps, decay=decay, key=key, ok=ok)
        return
    if not bool(ok):
        return
    t = float(step)
    rate, root = lr / (1.0 - betas[0] ** t), (1.0 - betas[1] ** t) ** 0.5
    for at, index in _chunks(p):
        gf = g[at].float()
        mean, square = m[at], v[at]
        mean.lerp_(gf, 1.0 - betas[0])
        square.mul_(betas[1]).addcmul_(gf, gf, value=1.0 - betas[1])
        denominator = square.sqrt().div_(root).add_(eps)
        new = p[at].float()
        new = (new * (1.0 - decay) if decay else new).addcdiv(mean, denominator, value=-rate)
        _store(p, at, new, index, key)


def sum_of_squares(g: Tensor) -> Tensor:
    """Σ g² in float32, a scalar on g's device: finite exactly when the gradient can be used.

    A finite gradient whose squares overflow float32 (a norm above 1.8e19) counts as not finite: nothing good is in it.
    """
    norm: Tensor = torch.linalg.vector_norm(g, dtype=torch.float32)
    return norm * norm


def use_kernels(p: Tensor) -> bool:
    """Whether the Triton kernels handle this tensor."""
    return bool(p.is_cuda)


def _chunks(p: Tensor) -> Iterator[tuple[tuple[int, slice], Tensor]]:
    """Index tuples that cut (B, m, n) into blocks of whole rows of about CHUNK elements, with their element indices."""
    stacked, rows, columns = p.shape
    block = max(1, CHUNK // max(1, columns))
    for b in range(stacked):
        for r in range(0, rows, block):
            end = min(rows, r + block)
            first = (b * rows + r) * columns
            index = torch.arange(first, first + (end - r) * columns, device=p.device).view(end - r, columns)
            yield (b, slice(r, end)), index


def _store(p: Tensor, at: tuple[int, slice], new: Tensor, index: Tensor, key: int) -> None:
    old = p[at]
    stored = stochastic_round(new, random_bits(index, key)) if p.dtype == torch.bfloat16 else new
    # A rate far too high can overflow, before the rounding or by it: those elements stay as they were. Looked at before
    # too, because the random bits carry a NaN's pattern over to that of -0.
    old.copy_(torch.where(torch.isfinite(new) & torch.isfinite(stored), stored, old))
