"""Plain SGD: no momentum, no state. The cheapest reference, and the one whose update is easiest to predict."""

import torch
from torch import Tensor

from hogwild.gpu_worker.inplace import scaled_update_
from hogwild.gpu_worker.optim.base import Optimizer, State, measured


class SGD(Optimizer):
    """w ← w · (1 - lr · weight decay) - lr · g."""

    kind = "sgd"

    def state_shapes(self, name: str, shape: torch.Size) -> dict[str, tuple[int, ...]]:
        return {}

    def update(self, name: str, p: Tensor, g: Tensor, state: State, key: int, weight_decay: float) -> Tensor:
        squares, ok = measured(g)
        rate = torch.full((1, 1, 1), self.lr, dtype=torch.float32, device=p.device)
        scaled_update_(p, g, rate, self.lr * weight_decay, key, ok)
        return squares
