"""Cross-entropy of the positions that predict continuation tokens, without ever holding vocabulary × length.

Logits are made for a few rows at a time. With a plain linear head the gradients of those rows are computed at once, in
the forward pass, and the logits are gone before the next rows: three matrix products in all, nothing recomputed. Heads
that do more (soft-capping, scaling) run through the model's own code, chunk by chunk under checkpointing.

Replayed positions have no target token but a distribution to stay at: the k likeliest tokens of the model as it was
when the job began, and the mass of the rest. Their loss is the Kullback-Leibler divergence over these k + 1 events; its
gradient is zero where nothing has changed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Bytes of float32 logits in one chunk: large enough for full-speed matrix products, small beside any model.
CHUNK_BYTES = 256 << 20


# Least mass of the rest: 1 - Σp is a difference of float32 numbers near 1.
REST = 1e-6


@dataclass(frozen=True)
class Anchor:
    """What the model said at Q replayed positions."""

    ids: Tensor  # (Q, k) int64: the likeliest tokens
    probabilities: Tensor  # (Q, k) float32
    weight: float
    """Factor of each position's divergence in the loss."""


def chunk_rows(vocabulary: int) -> int:
    """Rows of logits made at a time."""
    return max(1, CHUNK_BYTES // (4 * vocabulary))


def chunks(targets: int, anchors: int, rows: int) -> Iterator[tuple[int, int]]:
    """(start, end) of each chunk; none holds rows of both kinds."""
    for first, last in ((0, targets), (targets, targets + anchors)):
        for start in range(first, last, rows):
            yield start, min(start + rows, last)


def divergence(log_probabilities: Tensor, ids: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """KL(then ‖ now) of each row, over `ids` and the rest.

    Args:
        log_probabilities: (R, V) float32, of the model now.
        ids, probabilities: (R, k), of the model then.

    Returns:
        (R,) nats; (R, k) probabilities now; (R,) mass of the rest then, divided by now.
    """
    log_now = log_probabilities.gather(1, ids)
    now = log_now.exp()
    rest_then = (1.0 - probabilities.sum(-1)).clamp_min(REST)
    rest = rest_then / (1.0 - now.sum(-1)).clamp_min(REST)
    among = (torch.xlogy(probabilities, probabilities) - probabilities * log_now).sum(-1)
    return among + rest_then * rest.log(), now, rest


class _LinearLosses(torch.autograd.Function):
    """(Σ weightᵢ · CE(hiddenᵢ · Wᵀ + b, targetᵢ), weight · Σ KL at the anchored rows), gradients of their sum computed
    on the way forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (P + Q, H)
        weight: Tensor,  # (V, H)
        bias: Tensor | None,  # (V,)
        targets: Tensor,  # (P,)
        weights: Tensor,  # (P,) float32
        anchor: Anchor | None,  # of the last Q rows
        rows: int,
    ) -> Tensor:
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        # In the weight's own precision: a float32 buffer would double the largest gradient there is. Each product is
        # summed in float32 and rounded once per chunk.
        grad_weight = torch.zeros_like(weight, memory_format=torch.contiguous_format) if need_weight else None
        grad_bias = torch.zeros_like(bias) if need_bias and bias is not None else None
        totals = torch.zeros(2, dtype=torch.float32, device=hidden.device)
        n = targets.shape[0]
        for start, end in chunks(n, hidden.shape[0] - n, rows):
            h = hidden[start:end]
            logits = F.linear(h, weight, bias).float()
            logits.sub_(logits.logsumexp(-1, keepdim=True))
            # d loss / d logits: w · (softmax - one-hot) with a target token; with an anchor w · (now - then) on its
            # tokens and w · softmax · (1 - rest then / rest now) elsewhere. Made where the logits stood.
            if start < n:
                t, w = targets[start:end, None], weights[start:end]
                totals[0] -= (logits.gather(1, t)[:, 0] * w).sum()
                slope = logits.exp_()
                slope.scatter_add_(1, t, torch.full_like(t, -1.0, dtype=slope.dtype)).mul_(w[:, None])
            elif anchor is not None:
                ids, then = anchor.ids[start - n : end - n], anchor.probabilities[start - n : end - n]
                kl, now, rest = divergence(logits, ids, then)
                totals[1] += anchor.weight * kl.sum()
                slope = logits.exp_().mul_((1.0 - rest)[:, None])
                slope.scatter_(1, ids, now - then).mul_(anchor.weight)
            if grad_hidden is None and grad_weight is None and grad_bias is None:
                continue
            if grad_bias is not None:
                grad_bias += slope.sum(0).to(grad_bias.dtype)
            slope = slope.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(slope, weight, out=grad_hidden[start:end])
            if grad_weight is not None:
                grad_weight.addmm_(slope.T, h)
        ctx.gradients = (grad_hidden, grad_weight, grad_bias)
        return totals

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        scale = grad_outputs[0][0]  # both losses are differentiated with the same factor
        gradients = [g if g is None else g.mul_(scale.to(g.dtype)) for g in ctx.gradients]
        ctx.gradients = None  # the largest tensor of the step: don't keep it until the graph dies
        return (*gradients, None, None, None, None)


def linear_losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    weights: Tensor,
    anchor: Anchor | None,
    rows: int | None = None,
) -> Tensor:
    """Both losses behind a linear head, differentiable once and with one common factor (sum them).

    Args:
        hidden: (P + Q, H): hidden states of the P positions that predict a target token, then of the Q that `anchor` is
            about.
        weight: (V, H) head.
        bias: (V,) or None.
        targets: (P,) token ids.
        weights: (P,) float32 factors.
        rows: rows of logits at a time; None: by `CHUNK_BYTES`.

    Returns:
        float32 (2,): weighted cross-entropy, weighted divergence; in nats.
    """
    rows = rows or chunk_rows(weight.shape[0])
    losses: Tensor = _LinearLosses.apply(hidden, weight, bias, targets, weights, anchor, rows)  # type: ignore[no-untyped-call]
    return losses


def chunked_losses(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    targets: Tensor,
    weights: Tensor,
    anchor: Anchor | None,
    vocabulary: int,
    rows: int | None = None,
) -> Tensor:
    """`linear_losses` behind any head, (rows, H) → logits (rows, V). Each chunk is recomputed in backward."""
    n = targets.shape[0]

    def part(h: Tensor, start: int, end: int) -> Tensor:
        if start < n:
            return target_loss(head(h), targets[start:end], weights[start:end])
        assert anchor is not None
        at = slice(start - n, end - n)
        return anchor_loss(head(h), Anchor(anchor.ids[at], anchor.probabilities[at], anchor.weight))

    losses = [torch.zeros((), dtype=torch.float32, device=hidden.device) for _ in range(2)]
    for start, end in chunks(n, hidden.shape[0] - n, rows or chunk_rows(vocabulary)):
        losses[start >= n] = losses[start >= n] + checkpoint(
            part, hidden[start:end], start, end, use_reentrant=False, preserve_rng_state=False
        )
    return torch.stack(losses)


def target_loss(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of cross-entropies of whole logits (P, V)."""
    return (F.cross_entropy(logits.float(), targets, reduction="none") * weights).sum()


def anchor_loss(logits: Tensor, anchor: Anchor) -> Tensor:
    """Weighted sum of divergences of whole logits (Q, V)."""
    kl, _, _ = divergence(logits.float().log_softmax(-1), anchor.ids, anchor.probabilities)
    return anchor.weight * kl.sum()
