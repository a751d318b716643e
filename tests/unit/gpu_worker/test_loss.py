"""The fused and chunked losses against torch's cross-entropy on whole logits."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import VOCAB, build
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hogwild.gpu_worker import loss
from hogwild.gpu_worker.batch import Replayed, Sample, collate
from hogwild.gpu_worker.engine import Trainer
from hogwild.gpu_worker.loss import Anchor, chunk_rows, chunked_losses, linear_losses

P, H, V = 13, 8, 29
Q, K = 6, 5  # replayed positions, tokens kept at each


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(P, H, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=g).to(dtype).requires_grad_()
    bias = torch.randn(V, generator=g).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (P,), generator=g)
    return hidden, weight, bias, targets, torch.rand(P, generator=g)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor, rows: int | None = None
) -> Tensor:
    """The first of `linear_losses`, alone."""
    return linear_losses(hidden, weight, bias, targets, weights, None, rows)[0]


def reference(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor) -> Tensor:
    logits = F.linear(hidden, weight, bias).float()
    return (F.cross_entropy(logits, targets, reduction="none") * weights).sum()


@pytest.mark.parametrize("rows", [1, 4, 13, 100])
@pytest.mark.parametrize("with_bias", [False, True])
def test_fused_loss_and_gradients_equal_those_of_whole_logits(rows: int, with_bias: bool) -> None:
    hidden, weight, bias, targets, weights = inputs()
    leaves = [hidden, weight, *([bias] if with_bias else [])]
    fused = linear_cross_entropy(hidden, weight, bias if with_bias else None, targets, weights, rows)
    whole = reference(hidden, weight, bias if with_bias else None, targets, weights)
    torch.testing.assert_close(fused, whole)
    # An upstream factor other than 1 must reach the gradients that were made on the way forward.
    got, wanted = torch.autograd.grad(3.0 * fused, leaves), torch.autograd.grad(3.0 * whole, leaves)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_bf16_gradients_stay_close_when_chunks_are_summed() -> None:
    hidden, weight, _, targets, weights = inputs(torch.bfloat16)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    fused = torch.autograd.grad(linear_cross_entropy(hidden, weight, None, targets, weights, 3), [hidden, weight])
    logits = exact[0] @ exact[1].T
    whole = (F.cross_entropy(logits, targets, reduction="none") * weights.double()).sum()
    for a, b in zip(fused, torch.autograd.grad(whole, exact), strict=True):
        assert torch.linalg.vector_norm(a.double() - b) / torch.linalg.vector_norm(b) < 0.02


def test_frozen_head_costs_no_gradient() -> None:
    hidden, weight, _, targets, weights = inputs()
    weight.requires_grad_(False)
    linear_cross_entropy(hidden, weight, None, targets, weights).backward()
    assert weight.grad is None
    assert hidden.grad is not None


def test_loss_without_gradient_is_the_same() -> None:
    hidden, weight, _, targets, weights = inputs()
    with torch.no_grad():
        value = linear_cross_entropy(hidden, weight, None, targets, weights)
    torch.testing.assert_close(value, reference(hidden, weight, None, targets, weights).detach())


@pytest.mark.parametrize("rows", [1, 5, 50])
def test_head_with_more_than_a_matrix_is_run_in_chunks(rows: int) -> None:
    hidden, weight, _, targets, weights = inputs()

    def head(h: Tensor) -> Tensor:
        return torch.tanh(h @ weight.T / 5.0) * 5.0

    chunked = chunked_losses(hidden, head, targets, weights, None, V, rows)[0]
    whole = (F.cross_entropy(head(hidden), targets, reduction="none") * weights).sum()
    torch.testing.assert_close(chunked, whole)
    got, wanted = (torch.autograd.grad(x, [hidden, weight]) for x in (chunked, whole))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_logits_of_a_chunk_stay_within_256_mb() -> None:
    assert 4 * 151_936 * chunk_rows(151_936) <= 256 << 20
    assert chunk_rows(10**12) == 1


class LargestLogits(TorchDispatchMode):
    """Remembers the most elements of a tensor with a vocabulary's side that is no weight's or its gradient's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, Tensor) and VOCAB in t.shape and self.width not in t.shape:
                self.largest = max(self.largest, t.numel())
        return out


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma2"])
def test_logits_of_a_whole_row_never_exist(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given chunks of 7 rows, and a row of 60 positions with a target token and 40 replayed ones
    rows = 7
    monkeypatch.setattr(loss, "CHUNK_BYTES", 4 * VOCAB * rows + 3)
    forward = Trainer(build(name)).forward
    ids, k = list(range(60)), 5
    said = torch.rand(40, VOCAB).softmax(-1).topk(k)
    text = Replayed(ids[:40], said.indices, said.values)
    batch = collate([Sample(ids[:30], ids)], forward.device, [text])
    # When both losses are made and differentiated
    with LargestLogits(width=32) as seen:
        forward.losses([batch], 60.0, 1.0).sum().backward()
    # Then there were logits, and at no time more of them than a chunk's
    assert seen.largest == rows * VOCAB


def anchored(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Anchor]:
    """P positions with targets, then Q with an anchor that is off from what the model says now."""
    hidden, weight, _, targets, weights = inputs(dtype)
    g = torch.Generator().manual_seed(2)
    then = torch.randn(Q, V, generator=g).softmax(-1).topk(K)
    more = torch.randn(P + Q, H, generator=g).to(dtype).requires_grad_()
    return more, weight, targets, weights, hidden, Anchor(then.indices, then.values, 0.7)


def whole_divergence(logits: Tensor, anchor: Anchor) -> Tensor:
    """KL over k + 1 events, from its definition."""
    now = logits.double().softmax(-1)
    q = now.gather(1, anchor.ids)
    q = torch.cat([q, 1 - q.sum(-1, keepdim=True)], -1)
    p = anchor.probabilities.double()
    p = torch.cat([p, 1 - p.sum(-1, keepdim=True)], -1)
    return (p * (p / q).log()).sum()


@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize("head", ["linear", "own"])
def test_divergence_and_its_gradients_equal_the_definition(rows: int, head: str) -> None:
    hidden, weight, targets, weights, _, anchor = anchored()
    if head == "linear":
        got = linear_losses(hidden, weight, None, targets, weights, anchor, rows)
    else:
        got = chunked_losses(hidden, lambda h: h @ weight.T, targets, weights, anchor, V, rows)
    logits = hidden @ weight.T
    ce = (F.cross_entropy(logits[:P], targets, reduction="none") * weights).sum()
    kl = 0.7 * whole_divergence(logits[P:], anchor)
    torch.testing.assert_close(got, torch.stack([ce, kl.float()]), rtol=1e-4, atol=1e-5)
    for a, b in zip(
        torch.autograd.grad(3.0 * got.sum(), [hidden, weight]),
        torch.autograd.grad(3.0 * (ce + kl), [hidden, weight]),
        strict=True,
    ):
        torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-5)


def test_a_model_that_has_not_moved_has_no_divergence_and_no_gradient() -> None:
    hidden, weight, *_ = inputs()
    then = (hidden @ weight.T).softmax(-1).topk(K)
    anchor = Anchor(then.indices, then.values.detach(), 1.0)
    none = torch.empty(0, dtype=torch.int64)
    losses = linear_losses(hidden, weight, None, none, torch.empty(0), anchor)
    assert losses.tolist() == pytest.approx([0.0, 0.0], abs=1e-5)
    for gradient in torch.autograd.grad(losses.sum(), [hidden, weight]):
        assert gradient.abs().max() < 1e-5


def test_a_token_that_was_certain_leaves_finite_numbers() -> None:
    hidden, weight, *_ = inputs()
    ids = torch.arange(K).repeat(P, 1)
    certain = torch.zeros(P, K)
    certain[:, 0] = 1.0
    none = torch.empty(0, dtype=torch.int64)
    losses = linear_losses(hidden, weight, None, none, torch.empty(0), Anchor(ids, certain, 1.0))
    assert torch.isfinite(losses).all()
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(losses.sum(), [hidden, weight]))
