"""Gradients on their way from autograd to the optimizer.

A hook on each parameter applies the optimizer as soon as autograd has summed that parameter's gradient, and frees it.
In all packs of a step but the last it adds the gradient to those of the packs before, in float32: a sum in bf16 has 8
significant bits, and after some hundred packs the next one is lost in rounding.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hogwild.gpu_worker.optim import Optimizer, StepStats


class Updates:
    """The hooks of one run, installed while it is entered.

    Gradients are held until `begin`; between `begin` and `end` each is applied, with what is held of it, as it appears,
    and freed.

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
        self._held: dict[str, Tensor] = {}  # sums of the step's earlier packs, float32
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
        # A parameter that took part in earlier packs but not in the last one is still held.
        for name in list(self._held):
            self._take(name, self.trained[name])
        self._applying = False
        return self.optimizer.end_step()

    def abort(self) -> None:
        """Back to rest, with no gradient left; harmless after `end`."""
        self.touched = 0
        self._applying = False
        self.optimizer.abort_step()
        self._held.clear()
        for p in self.trained.values():
            p.grad = None

    def _hook(self, name: str) -> Any:
        def take(p: Tensor) -> None:
            mine, here = self._stream, torch.cuda.current_stream(p.device) if p.is_cuda else None
            if not self._applying or mine is None or here is None or mine == here:
                self._take(name, p)
                return
            # Autograd's stream here is the one that was current when the leaf was first used, maybe steps ago.
            mine.wait_stream(here)
            for grad in (p.grad, self._held.get(name)):
                if grad is not None:
                    grad.record_stream(mine)
            with torch.cuda.stream(mine):
                self._take(name, p)

        return take

    def _take(self, name: str, p: Tensor) -> None:
        """Apply, or hold, the sum of a parameter's gradient and what is held of it."""
        grad, held = p.grad, self._held.pop(name, None)
        p.grad = None
        if held is not None:
            grad = held if grad is None else held.add_(grad)
        if grad is None:
            return
        if self._applying:
            self.touched += 1
            self.optimizer.step_param(name, p, grad)
        else:
            self._held[name] = grad.float()
