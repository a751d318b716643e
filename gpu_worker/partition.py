"""Training on a part of the card's multiprocessors, by CUDA's green contexts, while vLLM serves on all of them.

Under MPS a kernel of vLLM's that finds every multiprocessor taken by training's waits for one of them, some hundred
times for each token. That is why training at full rate for a tenth of the time costs serving more than training on a
quarter of the card all the time, which also gets more done. What a process may use under MPS is settled when it
starts; a green context is a part of the process' own context, with the same memory, and a stream in it is as any other.
So training moves from one part to another between two packs, as the governor says.

CUDA driver API, "Green Contexts" (12.4 and later), through `cuda-bindings`.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

logger = logging.getLogger(__name__)

PARTS = (0.25, 0.5, 0.75)
"""Shares of the multiprocessors, besides all."""
GRAIN = 8  # multiprocessors; what CUDA splits off from compute capability 9.0 on, and a multiple of that before


class NoParts(RuntimeError):
    """This card or driver can't be divided."""


class Placement:
    """Where the next pack runs: on a part of the card, or all of it. Chosen between two packs, by one thread.

    Args:
        streams: a stream for each share that there is, the share of 1.0 not among them; none: always the whole card.
    """

    def __init__(self, device: torch.device, streams: dict[float, torch.cuda.Stream] | None = None) -> None:
        self.share = 1.0
        self.parts = tuple(sorted(streams or ()))
        self._device = device
        self._streams = streams or {}

    @classmethod
    def on(cls, device: torch.device, *, wanted: bool = True) -> "Placement":
        """The parts of `device`, where this process shares it under MPS; otherwise, and if not wanted, none."""
        if not wanted or device.type != "cuda":
            return cls(device)
        try:
            streams = _streams(torch.cuda.current_device() if device.index is None else device.index)
        except (NoParts, AttributeError) as error:  # AttributeError: cuda-bindings without one of the names used here
            logger.info("training always runs on the whole card: %s", error)
            return cls(device)
        return cls(device, streams)

    def move(self, share: float) -> None:
        """Take this part, one of `parts` or all (1.0)."""
        self.share = share
        # Cached memory belongs to streams: what the last one has left would be taken a second time for this one.
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()

    def stream(self) -> torch.cuda.Stream:
        """The stream of the present part."""
        return self._streams.get(self.share) or torch.cuda.default_stream(self._device)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """What is queued inside runs on the present part: after what was queued before, and before what comes later."""
        if self._device.type != "cuda":
            yield
            return
        stream, outside = self.stream(), torch.cuda.current_stream(self._device)
        stream.wait_stream(outside)
        with torch.cuda.stream(stream):
            yield
        outside.wait_stream(stream)


@cache
def _streams(index: int) -> dict[float, torch.cuda.Stream]:
    """A stream for each of PARTS. Made once: they last as long as the process, as CUDA's own context does.

    Raises NoParts.
    """
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise NoParts("cuda-bindings is missing: pip install 'hogwild[cuda]'") from error

    def ask(function: Any, *arguments: Any) -> Any:
        try:
            code, *answer = function(*arguments)
        except RuntimeError as error:  # a driver that is too old to have the function
            raise NoParts(str(error)) from None
        if code != driver.CUresult.CUDA_SUCCESS:
            raise NoParts(f"{function.__name__}: {code.name}")
        return answer[0] if len(answer) == 1 else answer

    torch.cuda.init()
    card = ask(driver.cuDeviceGet, index)
    if not ask(driver.cuDeviceGetAttribute, driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MPS_ENABLED, card):
        raise NoParts("without MPS vLLM's kernels and training's take turns")
    torch.zeros((), device=torch.device("cuda", index))  # a context has to be there
    whole = ask(driver.cuDeviceGetDevResource, card, driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM)
    streams: dict[float, torch.cuda.Stream] = {}
    for part in PARTS:
        count = int(part * whole.sm.smCount) // GRAIN * GRAIN
        if count == 0:
            raise NoParts(f"there are only {whole.sm.smCount} multiprocessors")
        groups, _made, _rest = ask(driver.cuDevSmResourceSplitByCount, 1, whole, 0, count)
        described = ask(driver.cuDevResourceGenerateDesc, groups[:1], 1)
        default = driver.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM
        context = ask(driver.cuGreenCtxCreate, described, card, default)
        stream = ask(driver.cuGreenCtxStreamCreate, context, driver.CUstream_flags.CU_STREAM_NON_BLOCKING, 0)
        streams[part] = torch.cuda.ExternalStream(int(stream), device=torch.device("cuda", index))
    logger.info("beside traffic, training runs on parts of the card's %d multiprocessors", whole.sm.smCount)
    return streams
