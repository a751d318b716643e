"""AdamW (arXiv 1711.05101, algorithm 2): the reference that APOLLO approximates. Eight bytes of state per weight."""

from typing import Any

import torch
from torch import Tensor

from hogwild.gpu_worker.inplace import adamw_update_, use_kernels
from hogwild.gpu_worker.optim.base import Optimizer, State, measured

# The values of the Adam paper and of torch.optim.AdamW, except beta2's: torch has the same 0.999.
BETAS = (0.9, 0.999)
EPS = 1e-8


class AdamW(Optimizer):
    """Element-wise adaptive rates, decoupled weight decay."""

    kind = "adamw"

    def state_shapes(self, name: str, shape: torch.Size) -> dict[str, tuple[int, ...]]:
        return {"m": tuple(shape), "v": tuple(shape), "step": ()}

    def update(self, name: str, p: Tensor, g: Tensor, state: State, key: int, weight_decay: float) -> Tensor:
        return adamw_step(p, g, state, lr=self.lr, weight_decay=weight_decay, key=key)


def adamw_step(p: Tensor, g: Tensor, state: State, *, lr: float, weight_decay: float, key: int) -> Tensor:
    """One guarded AdamW update; also what APOLLO does with vectors. Returns Σ g²."""
    options: Any = {"lr": lr, "betas": BETAS, "eps": EPS, "decay": lr * weight_decay, "key": key}
    if use_kernels(p) and p.shape[0] * p.shape[1] == 1:
        from hogwild.gpu_worker import kernels

        if p.shape[2] <= kernels.VECTOR:
            return kernels.adamw_vector_(p, g, state["m"], state["v"], state["step"], **options)
    squares, ok = measured(g)
    state["step"].add_(ok)
    adamw_update_(p, g, state["m"], state["v"], state["step"], **options, ok=ok)
    return squares
