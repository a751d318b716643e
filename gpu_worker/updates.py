"""Gradients on their way from autograd to the optimizer.

A hook on each parameter applies the optimizer as soon as autograd has summed that parameter's gradient, and frees it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hogwild.gpu_worker.optim import Optimizer, StepStats


class Updates:
    """The hooks of one run, installed while it is entered.

    While gradients are only being accumulated nothing happens; between `begin` and `end` each gradient is applied as
    it appears, and freed.

    Args:
        trained: parameters of this run, by name.
        known: all trainable parameters of the model: those that this run freezes get their flag back afterwards.
    """

    def __init__(self, trained: Mapping[str, Tensor], known: Mapping[str, Tensor], optimizer: Optimizer) -> None:
        self.trained = trained
        self.known = known
        self.optimizer = optimizer
        self.touched = 0
        """Parameters handed to the optimizer in this step; `abort` counts anew."""
        self._applying = False
        self._stream: torch.cuda.Stream | None = None
        self._handles: list[Any] = []

    def __enter__(self) -> "Updates":
        for name, p in self.known.items():
            p.requires_grad_(name in self.trained)
            p.grad = None
        for name, p in self.trained.items():
            self._handles.append(p.register_post_accumulate_grad_hook(self._hook(name)))
        return self

    def __exit__(self, *exc: object) -> None:
        self.abort()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for p in self.known.values():
            p.requires_grad_(True)

    def begin(self, rate: float, seed: int) -> None:
        device = next((p.device for p in self.trained.values() if p.is_cuda), None)
        self._stream = None if device is None else torch.cuda.current_stream(device)
        self.optimizer.begin_step(rate, seed=seed)
        self._applying = True

    def end(self) -> StepStats:
        # A parameter that took part in earlier packs but not in the last one still has its gradient here.
        for name, p in self.trained.items():
            if p.grad is not None:
                self._apply(name, p)
        self._applying = False
        return self.optimizer.end_step()

    def abort(self) -> None:
        """Back to rest, with no gradient left; harmless after `end`."""
        self.touched = 0
        self._applying = False
        self.optimizer.abort_step()
        for p in self.trained.values():
            p.grad = None

    def _hook(self, name: str) -> Any:
        def apply(p: Tensor) -> None:
            if not self._applying:
                return
            mine, here = self._stream, torch.cuda.current_stream(p.device) if p.is_cuda else None
            if mine is None or here is None or mine == here:
                self._apply(name, p)
                return
            # Autograd's stream here is the one that was current when the leaf was first used, maybe steps ago.
            mine.wait_stream(here)
            if p.grad is not None:
                p.grad.record_stream(mine)
            with torch.cuda.stream(mine):
                self._apply(name, p)

        return apply

    def _apply(self, name: str, p: Tensor) -> None:
        grad, p.grad = p.grad, None
        if grad is not None:
            self.touched += 1
            self.optimizer.step_param(name, p, grad)
