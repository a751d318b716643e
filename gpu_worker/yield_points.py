"""Yield points inside a training step: before every layer, forward and backward, on whatever device training runs.

A step of a large model takes half a second, in which vLLM would make seventy tokens; a yield between steps comes too
late for all of them. So the governor is also called before each decoder layer runs and, within backward, by a hook on
the layer's parameters, with the first gradient that comes. A yield inside backward, where updates are applied layer by
layer, leaves the weights between two versions for its length (a second at most): the mixture that serving tolerates
anyway, a little longer.

CUDA executes late: Python has often queued a whole forward pass when the first layer of it runs, and sleeping then
would stop nothing. `CudaQueue` keeps training at most two yield points ahead of the device at full speed, and waits
for the device before a yield. Waiting is done by blocking events, which leave the CPU core to vLLM.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from hogwild.gpu_worker.governor import Governor, NoQueue

AHEAD = 2  # layers queued beyond the one that runs: enough to hide launch latency, a few milliseconds to wait out


class CudaQueue:
    """Bounds and drains training's stream. One thread at a time, as the governor's own rule.

    Args:
        stream: training's, which autograd's thread need not have as its own.
    """

    def __init__(self, stream: torch.cuda.Stream, ahead: int = AHEAD) -> None:
        self._stream = stream
        self._ahead = ahead
        self._pending: deque[torch.cuda.Event] = deque()
        self._free: list[torch.cuda.Event] = []

    def bound(self) -> None:
        """Wait until at most `ahead` yield points are between Python and the device."""
        self._record()
        while len(self._pending) > self._ahead:
            self._wait_oldest()

    def drain(self) -> None:
        """Wait until the device has done everything that training has queued so far."""
        self._record()
        while self._pending:
            self._wait_oldest()

    def _record(self) -> None:
        event = self._free.pop() if self._free else torch.cuda.Event(blocking=True)
        event.record(self._stream)
        self._pending.append(event)

    def _wait_oldest(self) -> None:
        event = self._pending.popleft()
        event.synchronize()
        self._free.append(event)


def device_queue(device: torch.device) -> CudaQueue | NoQueue:
    """What the governor needs to know about the work queued on `device`."""
    return CudaQueue(torch.cuda.default_stream(device)) if device.type == "cuda" else NoQueue()


def layers_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The blocks to yield between: the longest ModuleList whose members are alike, which is a transformer's layers."""
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module) > 0
             and len({type(child) for child in module}) == 1]
    return list(max(lists, key=_weight, default=()))


def _weight(layers: torch.nn.ModuleList) -> int:
    return sum(p.numel() for p in layers.parameters())  # by parameters: a layer's many small experts are a longer list


def install_yield_points(model: torch.nn.Module, governor: Governor) -> Callable[[], None]:
    """Call `governor.yield_point` before each layer's forward and within its backward; returns what undoes that.

    A model without recognisable layers gets none; the yield points between micro-steps remain.
    """
    handles = []
    for layer in layers_of(model):
        backward = _OnceAPass(governor)
        handles.append(layer.register_forward_pre_hook(governor.yield_point))
        handles.append(layer.register_forward_pre_hook(backward.arm))
        # On all of them: which ones a job trains, and which gradient comes first, is not known here.
        handles += [p.register_post_accumulate_grad_hook(backward.yield_point) for p in layer.parameters()
                    if p.requires_grad]  # fmt: skip

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove


class _OnceAPass:
    """The yield point of a layer's backward pass: with the first gradient after a forward pass of the layer."""

    def __init__(self, governor: Governor) -> None:
        self._governor = governor
        self._armed = False

    def arm(self, *_: Any) -> None:
        self._armed = True

    def yield_point(self, *_: Any) -> None:
        if self._armed:
            self._armed = False
            self._governor.yield_point()
