"""128-bit fingerprints of 4 KB blocks: XXH3-128, the same on the CPU and on CUDA.

A table has one row per block, `(blocks, 2)` uint64, columns low and high half. XXH3-128 is no cryptographic hash: it
answers "did training change this block?", not "did somebody forge it?". Two different contents share a fingerprint with
probability 2^-128; a 16 GB model synced every ten minutes for a century compares 2e13 blocks, so the chance that one
change in all that time goes unnoticed is about 6e-26.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import xxhash

from hogwild.checkpoint.constants import BLOCK

Table = np.ndarray[Any, np.dtype[np.uint64]]
"""(blocks, 2): low and high 64 bits of each fingerprint."""

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Indices = np.ndarray[Any, np.dtype[np.int64]]


def empty_table(blocks: int) -> Table:
    """An uninitialised table."""
    return np.empty((blocks, 2), np.uint64)


def fingerprints(
    data: Bytes | bytes | memoryview,  # contiguous bytes of whole blocks; only the last block may be short
    size: int = BLOCK,  # bytes
) -> Table:  # (blocks, 2)
    """Fingerprint each block of `data`; about 10 GB/s on one core."""
    view = (data.data if isinstance(data, np.ndarray) else memoryview(data)).cast("B")
    digest: Callable[[memoryview], bytes] = xxhash.xxh3_128_digest
    digests = b"".join([digest(view[start : start + size]) for start in range(0, len(view), size)])
    # The canonical digest is big-endian, high half first.
    return np.ascontiguousarray(np.frombuffer(digests, ">u8").reshape(-1, 2)[:, ::-1].astype(np.uint64))


def differing(a: Table, b: Table) -> Indices:
    """Numbers of the rows in which two tables differ."""
    return np.flatnonzero((a[:, 0] != b[:, 0]) | (a[:, 1] != b[:, 1]))


def table_digest(table: Table) -> str:
    """One fingerprint (hex) of a whole table: names the exact contents of a checkpoint."""
    # No copies on the usual machines: fresh memory for a table costs several times as much as hashing it.
    return str(xxhash.xxh3_128_hexdigest(np.ascontiguousarray(table, "<u8").data))
