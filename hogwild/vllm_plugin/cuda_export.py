"""CUDA allocations as handles that another process can open (raw CUDA IPC, through `cuda-bindings`).

Not torch's own sharing: that keeps a reference count for a single consumer, so a restarted worker could free live
memory.
"""

from typing import Any

import torch

from hogwild.errors import AttachRefused
from hogwild.manifest import Allocation


class CudaAllocations:
    """Finds the allocation that an address lies in; each is exported once."""

    def __init__(self) -> None:
        from cuda.bindings import driver, runtime

        self._driver: Any = driver
        self._runtime: Any = runtime
        self.allocations: list[Allocation] = []
        self._index: dict[int, int] = {}  # base address → index in allocations

    def locate(self, tensor: torch.Tensor) -> tuple[int, int]:
        """Index of the allocation and byte offset in it of the tensor's first element.

        Raises:
            AttachRefused: the memory can't be exported (cumem allocator, expandable segments, managed memory).
        """
        address = tensor.data_ptr()
        error, base, size = self._driver.cuMemGetAddressRange(address)
        if int(error):
            raise AttachRefused(f"the driver knows no allocation at this address ({error})")
        base = int(base)
        if base not in self._index:
            error, handle = self._runtime.cudaIpcGetMemHandle(base)
            if int(error):
                raise AttachRefused(
                    f"CUDA gives no IPC handle for vLLM's memory ({error}). Memory of the sleep mode (cumem) allocator "
                    f"and of expandable segments has none: start vLLM without --enable-sleep-mode and without "
                    f"expandable_segments in PYTORCH_CUDA_ALLOC_CONF"
                )
            self._index[base] = len(self.allocations)
            self.allocations.append(Allocation(kind="cuda_ipc", size=int(size), handle=bytes(handle.reserved).hex()))
        return self._index[base], address - base


def gpu_uuid(device: torch.device) -> str:
    """UUID of a CUDA device as nvidia-smi prints it, `GPU-...`: the same in every process and container."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"
