"""Shared memory of a vLLM on CPU, as one tensor of bytes.

The exporter's anonymous file is opened through `/proc/<pid>/fd/<n>`, which the kernel allows to processes of the same
user (and to no others). The mapping stays good when vLLM dies.
"""

import mmap
import os
import stat
from pathlib import Path

import torch

from hogwild.errors import AttachRefused, ExporterGone, ManifestError
from hogwild.manifest import Allocation


def open_memory(allocation: Allocation) -> torch.Tensor:
    """Map an allocation of kind `memfd`; returns uint8[size] on it. Freed with the last tensor on it.

    Raises:
        ExporterGone: the exporter died, or closed the file.
        AttachRefused: the kernel doesn't let us look into the exporter.
        ManifestError: the file is not the one that the manifest describes.
    """
    path = Path(f"/proc/{allocation.pid}/fd/{allocation.fd}")
    try:
        # O_NONBLOCK: should a hostile manifest name a pipe, opening it must not wait for its other end.
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except FileNotFoundError as error:
        raise ExporterGone(f"vLLM (pid {allocation.pid}) does not hold its shared memory any more") from error
    except OSError as error:
        raise AttachRefused(
            f"can't open vLLM's memory at {path}: {error.strerror}. The worker must run as vLLM's user, and containers "
            f'must share the PID namespace (pid: "service:vllm" in compose)'
        ) from error
    try:
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode) or info.st_ino != allocation.inode or info.st_uid != os.getuid():
            raise ManifestError(f"{path} is not the shared memory that the manifest describes")
        if info.st_size < allocation.size:
            raise ManifestError(f"{path} holds {info.st_size} bytes, the manifest says {allocation.size}")
        mapping = mmap.mmap(descriptor, allocation.size)
    finally:
        os.close(descriptor)
    return torch.frombuffer(mapping, dtype=torch.uint8)
