"""What the plugin and the worker both ask of a tensor: its layout, its storage, a hash of its contents.

The hash is xxh3_128 over the row-major bytes. It is no cryptographic hash and needs not be: it tells copies from
non-copies, not friends from foes, and runs at memory speed.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import BoundedSemaphore
from typing import Any

import torch
import xxhash

from hogwild.strided import Layout

# Bytes hashed at a time where a tensor has to be made contiguous or brought from the GPU first.
CHUNK_BYTES = 64 << 20
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
    for chunk in _chunks(tensor):
        state.update(chunk.reshape(-1).view(torch.uint8).numpy().data)
    return str(state.hexdigest())


def _chunks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Contiguous CPU tensors that are `tensor` when concatenated row-major."""
    tensor = tensor.detach()
    if tensor.numel() == 0:
        return
    if tensor.device.type == "cpu" and tensor.is_contiguous():
        yield tensor
        return
    if tensor.nbytes <= CHUNK_BYTES or tensor.dim() == 0:
        yield tensor.contiguous().cpu()
        return
    if tensor.nbytes // tensor.shape[0] > CHUNK_BYTES:
        for row in tensor:
            yield from _chunks(row)
        return
    rows = max(1, CHUNK_BYTES // (tensor.nbytes // tensor.shape[0]))
    for part in tensor.split(rows):
        yield part.contiguous().cpu()


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
