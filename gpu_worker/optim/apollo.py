"""APOLLO and APOLLO-Mini, written from the paper: arXiv 2412.05270, algorithm 1.

AdamW's element-wise rates are redundant: one factor per channel (APOLLO) or per matrix (Mini) does as well. The factors
come from an AdamW that lives in a random low-rank projection of the gradient: state of 2 · r · n instead of 2 · m · n.

    R = P G                         P ~ N(0, 1/r), r × m, m ≤ n: the smaller side is projected
    R~ = AdamW moments of R         bias-corrected
    s_j = ‖R~[:, j]‖ / ‖R[:, j]‖    (Mini: s = ‖R~‖ / ‖R‖)
    W ← W - lr · α · G diag(s) - lr · λ · W

with the norm-growth limiter: ‖G diag(s)‖ may grow by at most a factor γ from one step to the next.

What the paper leaves open, and what is done here:
- Vectors (norms, biases) are treated with AdamW: their state is negligible.
- α is √(m / r) for each matrix. By the paper's theorem the factors found in r dimensions are √(r / m) of AdamW's: this
  gives every matrix the update norm that AdamW would, at any width, and rates carry over from AdamW. The constants of
  the paper's experiments (1 for APOLLO, 128 for Mini) are within a few times of it at their widths; `scale` sets one.
- Embeddings and heads: plain AdamW, as in the authors' experiments, would cost 8 bytes for each of their weights, 10 GB
  for two matrices of 150,000 tokens at width 4,096. They are projected like the rest, with the tokens as channels. In
  Mini they are channel-wise too, with rank 16: the gradient of a head is spread over all tokens but large in few rows,
  and one common factor, made by the many, moves those few far too much. Memory: 128 bytes for each token.
- A stack of experts (B, m, n) is B matrices: each has its own moments and factors; they share one projection.
- A side that is not larger than the rank is not projected at all: R = G is exact and not dearer.
- The limiter starts afresh with each job. Another job's last gradients say nothing about this one's first.
- A zero gradient keeps the limiter's last norm: limiting against zero would hold the matrix at zero for ever.
"""

import hashlib
import math
from collections.abc import Collection

import torch
from torch import Tensor

from hogwild.gpu_worker.inplace import scaled_update_, use_kernels
from hogwild.gpu_worker.optim.adamw import BETAS, EPS, adamw_step
from hogwild.gpu_worker.optim.base import Optimizer, State

# Section 5 and appendix of the paper: projection re-drawn every 200 steps, growth limit 1.01.
UPDATE_PROJECTION_EVERY = 200
NORM_GROWTH = 1.01
# Rank of Mini's embeddings and heads: a factor from 16 random directions is right within about a quarter.
TOKEN_RANK = 16


class Apollo(Optimizer):
    """APOLLO with channel-wise factors, or tensor-wise ones (Mini).

    Args:
        rank: rows of the projection.
        tensor_wise: one factor per matrix instead of one per channel.
        scale: α; None: √(m / r).
        projection_seed: of the projections; fixed for the life of the state, whatever the jobs' seeds.
    """

    kind = "apollo"

    def __init__(
        self,
        *,
        rank: int = 256,
        tensor_wise: bool = False,
        scale: float | None = None,
        projection_seed: int = 0,
        weight_decay: float = 0.0,
        token_params: Collection[str] = (),
    ) -> None:
        super().__init__(weight_decay=weight_decay, token_params=token_params)
        self.rank = rank
        self.tensor_wise = tensor_wise
        self.scale = scale
        self.projection_seed = projection_seed
        self._drawn: dict[str, tuple[int, Tensor]] = {}  # Mini on CUDA: epoch, P

    @property
    def _epoch(self) -> int:
        """How often projections were drawn anew."""
        return (self.steps - 1) // UPDATE_PROJECTION_EVERY

    def settings(self) -> dict[str, str]:
        return {
            "rank": str(self.rank),
            "scaling": "tensor" if self.tensor_wise else "channel",
            "projection_seed": str(self.projection_seed),
        }

    def follow(self, other: Optimizer) -> None:
        super().follow(other)
        if isinstance(other, Apollo):
            self.scale = other.scale

    def begin_job(self) -> None:
        norms = [state["norm"] for state in self.state.values() if "norm" in state]
        if norms:
            torch._foreach_zero_(norms)

    def rank_of(self, name: str) -> int:
        """Rank of a matrix' projection."""
        return max(self.rank, TOKEN_RANK) if name in self.token_params else self.rank

    def is_tensor_wise(self, name: str) -> bool:
        """Whether a matrix has one factor, rather than one for each channel."""
        return self.tensor_wise and name not in self.token_params

    def state_shapes(self, name: str, shape: torch.Size) -> dict[str, tuple[int, ...]]:
        if self.is_vector(shape):
            return {"m": tuple(shape), "v": tuple(shape), "step": ()}
        stacked, small, large = shape[0], min(shape[1:]), max(shape[1:])
        low_rank = (stacked, min(self.rank_of(name), small), large)
        return {"m": low_rank, "v": low_rank, "norm": (stacked,), "step": ()}

    def update(self, name: str, p: Tensor, g: Tensor, state: State, key: int, weight_decay: float) -> Tensor:
        if self.is_vector(p.shape):
            return adamw_step(p, g, state, lr=self.lr, weight_decay=weight_decay, key=key)
        # Columns are the channels: the larger side. A wide-enough transpose is only another view.
        transposed = p.shape[1] > p.shape[2]
        columns = g.mT if transposed else g
        small = columns.shape[1]
        scale = self.scale if self.scale is not None else math.sqrt(small / min(self.rank_of(name), small))
        rate = self.lr * scale
        if use_kernels(p) and self.is_tensor_wise(name):
            coefficient, total, ok = self._kernel_coefficient(name, columns, state, rate)
        else:
            squares = self._squares_of(name, columns)
            total = squares.sum()
            ok = total.isfinite()  # a sum of squares is finite exactly when the gradient can be used
            if not use_kernels(p) and not bool(ok):
                return total
            coefficient = self._coefficient(self._project(name, columns), squares, state, ok).mul_(rate)
        scaled_update_(p, g, coefficient.mT if transposed else coefficient, self.lr * weight_decay, key, ok)
        return total

    def projection(self, name: str, small: int, like: Tensor) -> Tensor:
        """P, (r, small) float32 on `like`'s device: drawn from its seed, so that it is never saved."""
        seed = hashlib.blake2b(f"{self.projection_seed}/{self._epoch}/{name}".encode(), digest_size=8).digest()
        generator = torch.Generator(like.device).manual_seed(int.from_bytes(seed, "little") >> 1)
        rank = self.rank_of(name)
        return torch.randn(rank, small, generator=generator, device=like.device).mul_(rank**-0.5)

    def _project(self, name: str, g: Tensor) -> Tensor:
        """R = P G for (B, m, n) → (B, r, n), float32. The matrix product runs in the gradient's own precision."""
        if self.rank_of(name) >= g.shape[1]:
            return g.float()
        projection = self.projection(name, g.shape[1], g).to(g.dtype)
        return torch.matmul(projection, g).float()

    def _squares_of(self, name: str, g: Tensor) -> Tensor:
        """Σ g² of (B, m, n), float32, over what has one factor: (B, 1, 1) matrices or (B, 1, n) channels."""
        squares: Tensor
        if self.is_tensor_wise(name):
            squares = torch.linalg.vector_norm(g, dim=(1, 2), keepdim=True, dtype=torch.float32).square_()
        elif use_kernels(g):
            from hogwild.gpu_worker import kernels

            squares = kernels.column_sums(g, None)[0][:, None]
        else:
            squares = torch.linalg.vector_norm(g, dim=1, keepdim=True, dtype=torch.float32).square_()
        return squares

    def _coefficient(self, r: Tensor, squares: Tensor, state: State, ok: Tensor) -> Tensor:
        """Update the moments with R (B, r, n); returns limited factors of `squares`' shape. All guarded by `ok`."""
        m, v, step = state["m"], state["v"], state["step"]
        step.add_(ok)
        # lerp towards itself leaves a value bit for bit as it was: that is how a bad gradient passes by.
        m.lerp_(torch.where(ok, r, m), 1.0 - BETAS[0])
        v.lerp_(torch.where(ok, r * r, v), 1.0 - BETAS[1])
        beta1, beta2 = (torch.full_like(step, b) for b in BETAS)
        adapted = (m / (1.0 - beta1**step)) / ((v / (1.0 - beta2**step)).sqrt_().add_(EPS))
        dims = (1, 2) if squares.shape[2] == 1 else (1,)
        before, after = r.square().sum(dims, keepdim=True).sqrt_(), adapted.square().sum(dims, keepdim=True).sqrt_()
        factor = torch.where(before > 0, after / before, 0.0)
        norm = (factor.square() * squares).sum((1, 2)).sqrt_()
        return factor * self._limit(norm, state["norm"], ok)[:, None, None]

    def _limit(self, norm: Tensor, last: Tensor, ok: Tensor) -> Tensor:
        """Norm-growth limiter for norms (B,): returns the factors and remembers the limited norms in `last`."""
        limited = (last > 0) & (norm > NORM_GROWTH * last)
        factor = torch.where(limited, NORM_GROWTH * last / norm, 1.0)
        last.copy_(torch.where(ok & (norm > 0), norm * factor, last))
        return factor

    def _kernel_coefficient(
        self, name: str, g: Tensor, state: State, rate: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`rate` times the same for Mini on CUDA: the gradient is read once for projection, norm and check."""
        from hogwild.gpu_worker import kernels

        projection = None
        if self.rank < g.shape[1]:
            # One row of a matrix' size: kept while it holds, because drawing it takes as many launches as the update.
            drawn = self._drawn.get(name)
            if drawn is None or drawn[0] != self._epoch:
                drawn = self._drawn[name] = self._epoch, self.projection(name, g.shape[1], g)
            projection = drawn[1]
        return kernels.mini_coefficient(g, projection, state, betas=BETAS, eps=EPS, growth=NORM_GROWTH, rate=rate)


class ApolloMini(Apollo):
    """Rank 1, one factor per matrix: state of the size of SGD's."""

    kind = "apollo-mini"

    def __init__(
        self,
        *,
        scale: float | None = None,
        projection_seed: int = 0,
        weight_decay: float = 0.0,
        token_params: Collection[str] = (),
    ) -> None:
        super().__init__(
            rank=1,
            tensor_wise=True,
            scale=scale,
            projection_seed=projection_seed,
            weight_decay=weight_decay,
            token_params=token_params,
        )
