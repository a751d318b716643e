"""Many small reads or writes of a file in one system call.

Blocks that changed lie scattered. Reading or writing them one by one gives the interpreter's lock up for every 4 KB and
then waits for it again: up to 5 ms each time that another thread computes, and training does. Linux' native AIO
(io_submit, io_uring's predecessor, which containers are commonly allowed where io_uring is not) takes a list. On
buffered files it does them in order, in the caller's thread, with the lock given up once; nothing here relies on that.
What it does not do, or where there is no such call, is left to the caller, who does it one by one.
"""

import ctypes
import errno
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hogwild.checkpoint.fingerprints import Bytes, Indices

READ, WRITE = 0, 1
"""IOCB_CMD_PREAD, IOCB_CMD_PWRITE of linux/aio_abi.h."""

DEPTH = 256
"""Requests of one call: 1 MiB of single blocks. A system has 65,536 for all (fs.aio-max-nr)."""

FEW = 8
"""Pieces below which one by one is as fast."""

_NUMBERS = {"x86_64": (206, 209, 208), "aarch64": (0, 2, 4)}  # of io_setup, io_submit, io_getevents
_CALLS = _NUMBERS.get(platform.machine()) if sys.platform == "linux" else None
_LIBC = ctypes.CDLL(None, use_errno=True)
_REQUEST = np.dtype(
    [("data", "u8"), ("key", "u4"), ("flags", "u4"), ("code", "u2"), ("priority", "i2"), ("fd", "u4"), ("buffer", "u8"),
     ("nbytes", "u8"), ("offset", "i8"), ("reserved", "u8"), ("options", "u4"), ("eventfd", "u4")]
)  # fmt: skip
"""struct iocb, little-endian."""
_EVENT = np.dtype([("data", "u8"), ("request", "u8"), ("result", "i8"), ("result2", "i8")])
"""struct io_event."""


@dataclass(frozen=True)
class Pieces:
    """Where parts of a buffer lie in a file, in ascending order."""

    starts: Indices  # (n,) in the buffer, bytes
    sizes: Indices  # (n,) bytes
    offsets: Indices  # (n,) in the file, bytes

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        return zip(self.starts.tolist(), self.sizes.tolist(), self.offsets.tolist(), strict=True)


def _call(number: int, *arguments: int) -> int:
    return int(_LIBC.syscall(ctypes.c_long(number), *map(ctypes.c_long, arguments)))


class _Queue:
    """One of the kernel's queues and what is handed over by it; for one thread at a time. Raises OSError."""

    def __init__(self) -> None:
        if _CALLS is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        self._setup, self._submit, self._getevents = _CALLS
        self.requests = np.zeros(DEPTH, _REQUEST)
        self._pointers = self.requests.ctypes.data + _REQUEST.itemsize * np.arange(DEPTH, dtype=np.uint64)
        self._events = np.zeros(DEPTH, _EVENT)
        number = ctypes.c_ulong(0)
        if _call(self._setup, DEPTH, ctypes.addressof(number)):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        self._number = number.value

    def run(self, count: int) -> Indices:  # (count,)
        """Do the first `count` requests: bytes done of each, negative: the error, or it was not begun."""
        begun = _call(self._submit, self._number, count, self._pointers.ctypes.data)
        results = np.full(count, -errno.EAGAIN, np.int64)
        done = 0
        while done < begun:  # until the last: the kernel has the addresses of the buffers
            got = _call(self._getevents, self._number, begun - done, begun - done, self._events.ctypes.data, 0)
            if got < 0 and ctypes.get_errno() != errno.EINTR:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            events = self._events[: max(0, got)]
            results[events["data"].astype(np.int64)] = events["result"]
            done += len(events)
        return results


_idle: list[_Queue] = []  # kept: to remove one takes the kernel longer than to use it


def together(fd: int, code: int, buffer: Bytes, pieces: Pieces, flags: int = 0) -> Pieces:
    """Read or write `pieces` of a contiguous buffer; those that were not done, or only in part: do them again."""
    count = len(pieces.sizes)
    if count < FEW:
        return pieces
    try:
        queue = _idle.pop() if _idle else _Queue()
    except (OSError, IndexError):
        return pieces
    base, done = buffer.ctypes.data, np.zeros(count, bool)
    for start in range(0, count, DEPTH):
        part = slice(start, min(start + DEPTH, count))
        size = part.stop - start
        requests = queue.requests[:size]
        requests["data"] = np.arange(size)
        requests["code"], requests["fd"], requests["flags"] = code, fd, flags
        requests["buffer"] = base + pieces.starts[part]
        requests["nbytes"] = pieces.sizes[part]
        requests["offset"] = pieces.offsets[part]
        done[part] = queue.run(size) == pieces.sizes[part]
    _idle.append(queue)
    return pieces if not done.any() else Pieces(pieces.starts[~done], pieces.sizes[~done], pieces.offsets[~done])
