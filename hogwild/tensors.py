"""What the plugin and the worker both ask of a tensor: its layout, its storage, a hash of its contents.

The hash is xxh3_128 over the row-major bytes. It is no cryptographic hash and needs not be: it tells copies from
non-copies, not friends from foes, and runs at memory speed.
"""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import BoundedSemaphore
from typing import Any

import torch
import xxhash

from hogwild.strided import Layout

# Bytes hashed at a time where a tensor has to be made contiguous or brought from the GPU first: enough for a copy at
# full speed (50 GB/s through page-locked memory), and small beside any model.
CHUNK_BYTES = 8 << 20
# Threads that hash tensors side by side: one does not keep up with a GPU's bus.
HASHERS = min(4, os.cpu_count() or 1)
# How many sources may wait for their hash; each is kept in memory (or mapped) until then.
WAITING = 8


def layout_of(tensor: torch.Tensor) -> Layout:
    """Where a tensor lies in its storage, in elements."""
    return Layout(int(tensor.storage_offset()), tuple(tensor.shape), tuple(tensor.stride()))


def storage_key(tensor: torch.Tensor) -> int:
    """Identity of the tensor's storage while that is alive."""
    return int(tensor.untyped_storage()._cdata)


def digest(tensor: torch.Tensor) -> str:
    """xxh3_128 of the tensor's row-major bytes, 32 hexadecimal digits."""
    state = xxhash.xxh3_128()
    for chunk in _chunks(tensor.detach()):
        state.update(_on_host(chunk).numpy().data)
    return str(state.hexdigest())


def _chunks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Contiguous tensors on the same device that are `tensor` when concatenated row-major, small or already there."""
    if tensor.numel() == 0:
        return
    if tensor.nbytes <= CHUNK_BYTES or (tensor.is_contiguous() and tensor.device.type == "cpu"):
        yield tensor.contiguous()
        return
    if tensor.is_contiguous():
        yield from tensor.view(-1).split(CHUNK_BYTES // tensor.element_size())
        return
    rows = CHUNK_BYTES // (tensor.nbytes // tensor.shape[0])
    for part in tensor.split(max(1, rows)):
        if rows:
            yield part.contiguous()
        else:
            yield from _chunks(part[0])


_staging = threading.local()


def _on_host(chunk: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor in host memory; valid until the next call of this thread."""
    flat = chunk.reshape(-1).view(torch.uint8)
    if flat.device.type == "cpu":
        return flat
    if not hasattr(_staging, "memory"):
        _staging.memory = torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=True)
    memory: torch.Tensor = _staging.memory[: flat.numel()]
    return memory.copy_(flat)


@contextmanager
def hashers() -> Iterator[ThreadPoolExecutor]:
    """Threads to call `digest` from. At the end what they have not begun is dropped, and their page-locked memory."""
    pool = ThreadPoolExecutor(HASHERS, thread_name_prefix="hogwild-digest")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


class BackgroundDigests:
    """Hashes on one thread while the caller goes on (hashing releases the GIL). Close it when the load is over."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="hogwild-digest")
        self._slots = BoundedSemaphore(WAITING)

    def submit(self, tensor: torch.Tensor) -> "Future[str]":
        """A future of `digest(tensor)`; waits when too many tensors are on their way, so that memory stays bounded."""
        self._slots.acquire()
        future = self._pool.submit(digest, tensor.detach())
        future.add_done_callback(self._done)
        return future

    def _done(self, future: "Future[Any]") -> None:
        self._slots.release()

    def close(self) -> None:
        """Wait for what is under way and end the thread."""
        self._pool.shutdown(wait=True)
