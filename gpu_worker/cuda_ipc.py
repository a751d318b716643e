"""CUDA allocations of a running vLLM, opened by their IPC handles (`cuda-bindings`).

Each handle is opened once in this process and closed when the attachment is: raw handles carry no reference count, so a
worker that dies or comes back leaves vLLM's memory as it is.
"""

from typing import Any, Self

import torch

from hogwild.errors import AttachRefused, ExporterGone
from hogwild.manifest import Allocation


def local_device(gpu_uuid: str) -> torch.device:
    """The CUDA device of this process that is the GPU with this UUID, whatever CUDA_VISIBLE_DEVICES says here or there.

    Raises:
        AttachRefused: this process doesn't see that GPU.
    """
    if not torch.cuda.is_available():
        raise AttachRefused(f"the weights are on {gpu_uuid}, but the worker sees no CUDA device")
    seen = [f"GPU-{torch.cuda.get_device_properties(i).uuid}" for i in range(torch.cuda.device_count())]
    if gpu_uuid not in seen:
        raise AttachRefused(
            f"the weights are on {gpu_uuid}, but the worker sees only {', '.join(seen)}: set its "
            f"CUDA_VISIBLE_DEVICES to vLLM's GPU"
        )
    return torch.device("cuda", seen.index(gpu_uuid))


class _DevicePointer:
    """Memory at an address, in the shape torch takes it: `__cuda_array_interface__` version 3."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {"data": (address, False), "shape": (size,), "typestr": "|u1", "version": 3}


class IpcMemory:
    """Opened handles. Every tensor on them must be gone before `close`."""

    def __init__(self, device: torch.device) -> None:
        try:
            from cuda.bindings import runtime
        except ImportError as error:
            raise AttachRefused("cuda-bindings is missing: pip install 'hogwild[cuda]'") from error
        self._runtime: Any = runtime
        self._device = device
        self._addresses: list[int] = []
        torch.cuda.init()

    def open(self, allocation: Allocation) -> torch.Tensor:
        """Map one allocation; returns uint8[size] on it.

        Raises:
            ExporterGone: the exporter has freed it, or died.
            AttachRefused: CUDA refuses, e.g. in a container that doesn't share the host's or vLLM's IPC namespace.
        """
        runtime = self._runtime
        handle = runtime.cudaIpcMemHandle_t()
        handle.reserved = bytes.fromhex(allocation.handle)
        with torch.cuda.device(self._device):
            error, pointer = runtime.cudaIpcOpenMemHandle(handle, runtime.cudaIpcMemLazyEnablePeerAccess)
        if int(error):
            gone = error in (
                runtime.cudaError_t.cudaErrorInvalidResourceHandle,
                runtime.cudaError_t.cudaErrorInvalidValue,
            )
            kind = ExporterGone if gone else AttachRefused
            raise kind(
                f"CUDA can't open vLLM's memory ({error}): vLLM may just have gone; containers must share vLLM's IPC "
                f"and PID namespaces, and the worker must run as its user"
            )
        self._addresses.append(int(pointer))
        self._check_size(int(pointer), allocation.size)
        memory: torch.Tensor = torch.as_tensor(_DevicePointer(int(pointer), allocation.size), device=self._device)
        return memory

    def _check_size(self, address: int, size: int) -> None:
        """A view must not reach beyond what was really mapped, whatever the manifest says."""
        from cuda.bindings import driver

        error, _, real = driver.cuMemGetAddressRange(address)
        if not int(error) and int(real) < size:
            raise AttachRefused(f"an allocation holds {int(real)} bytes, the manifest says {size}")

    def close(self) -> None:
        """Unmap everything."""
        if not self._addresses:
            return
        torch.cuda.synchronize(self._device)
        for address in self._addresses:
            self._runtime.cudaIpcCloseMemHandle(address)
        self._addresses.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()
