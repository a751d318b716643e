"""Training on a part of the card: its matrix products leave multiprocessors to vLLM, which serves on all of them.

Under MPS a kernel of vLLM's that finds every multiprocessor taken by training's waits for one of them, some hundred
times for each token. Matrix products are what takes them all for long, two thirds of a step. cuBLASLt can be told how
many multiprocessors to plan a product for (`CUBLASLT_MATMUL_DESC_SM_COUNT_TARGET`); torch passes that on
(`_set_sm_carveout_experimental`: how many to leave out). The short kernels between them go on using the whole card,
below vLLM's priority. That costs serving less for as much training than full rate for a part of the time, and than a
green context (a stream whose kernels all run on some of the multiprocessors): bench/interference.py.

The next product obeys, on whatever stream: training can go to another part before any layer, as the governor says.
"""

import logging
import math
from functools import cache
from typing import Any

import torch

logger = logging.getLogger(__name__)

PARTS = (0.25, 0.5, 0.75)
"""Shares of the multiprocessors, besides all."""
GRAIN = 4  # multiprocessors: thread block clusters of two or four have to fit


class NoParts(RuntimeError):
    """This card, driver or torch can't do it."""


class Placement:
    """How much of the card training's matrix products use; as `hogwild.gpu_worker.governor.Place`.

    Args:
        multiprocessors: of the card; 0: it can't be divided.
    """

    def __init__(self, multiprocessors: int = 0) -> None:
        self.share = 1.0
        self.parts: tuple[float, ...] = PARTS if multiprocessors else ()
        self._multiprocessors = multiprocessors
        if multiprocessors:
            self.move(1.0)  # an earlier one of this process may have stopped anywhere

    @classmethod
    def on(cls, device: torch.device, *, wanted: bool = True) -> "Placement":
        """The parts of `device`, where this process shares it under MPS; otherwise, and if not wanted, none."""
        if not wanted or device.type != "cuda":
            return cls()
        try:
            return cls(_multiprocessors(torch.cuda.current_device() if device.index is None else device.index))
        except (NoParts, AttributeError) as error:  # AttributeError: a cuda-bindings or torch without what is used here
            logger.info("training always runs on the whole card: %s", error)
            return cls()

    def move(self, share: float) -> None:
        """Take this part, one of `parts` or all (1.0), with the next matrix product."""
        self.share = share
        kept = math.ceil(share * self._multiprocessors / GRAIN) * GRAIN
        left = max(0, self._multiprocessors - kept)
        usual = _usual_library()
        torch.backends.cuda.preferred_blas_library("cublaslt" if left else usual)  # only cuBLASLt heeds the number
        torch._C._set_sm_carveout_experimental(left or None)


@cache
def _usual_library() -> Any:
    """What torch multiplies matrices with where nobody chooses: asked once, before we do."""
    return torch.backends.cuda.preferred_blas_library()


@cache
def _multiprocessors(index: int) -> int:
    """How many this process has of a card that it shares under MPS. Raises NoParts, AttributeError."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise NoParts("cuda-bindings is missing: pip install 'hogwild[cuda]'") from error

    def ask(function: Any, *arguments: Any) -> Any:
        try:
            code, answer = function(*arguments)
        except RuntimeError as error:  # a driver that is too old to have the function
            raise NoParts(str(error)) from None
        if code != driver.CUresult.CUDA_SUCCESS:
            raise NoParts(f"{function.__name__}: {code.name}")
        return answer

    torch._C._set_sm_carveout_experimental(None)  # AttributeError now rather than in the middle of a step
    torch.cuda.init()
    card = ask(driver.cuDeviceGet, index)
    if not ask(driver.cuDeviceGetAttribute, driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MPS_ENABLED, card):
        raise NoParts("without MPS vLLM's kernels and training's take turns")
    count = torch.cuda.get_device_properties(index).multi_processor_count
    if count * PARTS[0] < GRAIN:
        raise NoParts(f"there are only {count} multiprocessors")
    logger.info("beside traffic, training's matrix products leave some of the card's %d multiprocessors to vLLM", count)
    return count
