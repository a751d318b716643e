"""Cross-entropy of the positions that predict continuation tokens, without ever holding vocabulary × length.

Logits are made for a few rows at a time. With a plain linear head the gradients of those rows are computed at once, in
the forward pass, and the logits are gone before the next rows: three matrix products in all, nothing recomputed. Heads
that do more (soft-capping, scaling) run through the model's own code, chunk by chunk under checkpointing.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Bytes of float32 logits in one chunk: large enough for full-speed matrix products, small beside any model.
CHUNK_BYTES = 256 << 20


def chunk_rows(vocabulary: int) -> int:
    """Rows of logits made at a time."""
    return max(1, CHUNK_BYTES // (4 * vocabulary))


class _LinearCrossEntropy(torch.autograd.Function):
    """Σ weightᵢ · CE(hiddenᵢ · Wᵀ + b, targetᵢ), gradients computed on the way forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (P, H)
        weight: Tensor,  # (V, H)
        bias: Tensor | None,  # (V,)
        targets: Tensor,  # (P,)
        weights: Tensor,  # (P,) float32
        rows: int,
    ) -> Tensor:
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        # In the weight's own precision: a float32 buffer would double the largest gradient there is. Each product is
        # summed in float32 and rounded once per chunk.
        grad_weight = torch.zeros_like(weight, memory_format=torch.contiguous_format) if need_weight else None
        grad_bias = torch.zeros_like(bias) if need_bias and bias is not None else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, hidden.shape[0], rows):
            at = slice(start, start + rows)
            h, t, w = hidden[at], targets[at, None], weights[at]
            logits = F.linear(h, weight, bias).float()
            normaliser = logits.logsumexp(-1, keepdim=True)
            total += ((normaliser - logits.gather(1, t))[:, 0] * w).sum()
            if grad_hidden is None and grad_weight is None and grad_bias is None:
                continue
            # d loss / d logits = w · (softmax - one-hot), made where the logits stood.
            slope = logits.sub_(normaliser).exp_()
            slope.scatter_add_(1, t, torch.full_like(t, -1.0, dtype=slope.dtype)).mul_(w[:, None])
            if grad_bias is not None:
                grad_bias += slope.sum(0).to(grad_bias.dtype)
            slope = slope.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(slope, weight, out=grad_hidden[at])
            if grad_weight is not None:
                grad_weight.addmm_(slope.T, h)
        ctx.gradients = (grad_hidden, grad_weight, grad_bias)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        (scale,) = grad_outputs
        gradients = [g if g is None else g.mul_(scale.to(g.dtype)) for g in ctx.gradients]
        ctx.gradients = None  # the largest tensor of the step: don't keep it until the graph dies
        return (*gradients, None, None, None)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor, rows: int | None = None
) -> Tensor:
    """Weighted sum of cross-entropies behind a linear head, differentiable once.

    Args:
        hidden: (P, H) hidden states of the predicting positions.
        weight: (V, H) head.
        bias: (V,) or None.
        targets: (P,) token ids.
        weights: (P,) float32 factors.
        rows: rows of logits at a time; None: by `CHUNK_BYTES`.

    Returns:
        float32 scalar, in nats.
    """
    rows = rows or chunk_rows(weight.shape[0])
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, targets, weights, rows)  # type: ignore[no-untyped-call]
    return loss


def chunked_cross_entropy(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    targets: Tensor,
    weights: Tensor,
    vocabulary: int,
    rows: int | None = None,
) -> Tensor:
    """The same behind any head: `head` maps (rows, H) to logits (rows, V). Each chunk is recomputed in backward."""

    def part(h: Tensor, t: Tensor, w: Tensor) -> Tensor:
        return (F.cross_entropy(head(h).float(), t, reduction="none") * w).sum()

    rows = rows or chunk_rows(vocabulary)
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for start in range(0, hidden.shape[0], rows):
        at = slice(start, start + rows)
        total = total + checkpoint(
            part, hidden[at], targets[at], weights[at], use_reentrant=False, preserve_rng_state=False
        )
    return total
