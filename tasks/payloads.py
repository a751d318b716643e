"""Token ids of a job as compact bytes, stored once by content and never inside a message.

Layout, little-endian, version 1 (integers are unsigned 32-bit unless said):

    "HWP1" | number of samples n | flags (bit 0: weights follow)
    n × (context length, continuation length)
    all ids, int32: context 0, continuation 0, context 1, …
    with weights: for each sample a length (0 or its continuation length), then all weights, float32

A hundred thousand ids are 400 kB instead of 600 kB of JSON in three places, and two jobs with the same samples share
them. No numpy here: the API does not have it, and `array` packs as fast.
"""

import hashlib
import struct
import sys
from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from hogwild.errors import HogwildError, NotFound
from hogwild.tasks.connections import Client
from hogwild.tasks.keys import Keys

MAGIC = b"HWP1"
_HEADER = struct.Struct("<4sII")
_HAS_WEIGHTS = 1


class Sample(NamedTuple):
    """One sample: the loss is taken on the continuation only, each token times its weight."""

    context_ids: Sequence[int]
    continuation_ids: Sequence[int]
    weights: Sequence[float] | None = None


class Payload(NamedTuple):
    """Packed samples and what the ledger wants to know about them."""

    digest: str  # SHA-256 of `data`, hexadecimal
    data: bytes
    samples: int
    tokens: int


def pack(samples: Iterable[Sample]) -> Payload:
    """Pack samples. Ids must fit into int32 (OverflowError otherwise; the API checked them against the vocabulary)."""
    lengths, ids = array("I"), array("i")
    weight_lengths, weights = array("I"), array("f")
    n = 0
    for sample in samples:
        n += 1
        lengths.extend((len(sample.context_ids), len(sample.continuation_ids)))
        ids.extend(sample.context_ids)
        ids.extend(sample.continuation_ids)
        weight_lengths.append(len(sample.weights) if sample.weights is not None else 0)
        weights.extend(sample.weights or ())
    flags = _HAS_WEIGHTS if weights else 0
    parts = [_HEADER.pack(MAGIC, n, flags), _bytes(lengths), _bytes(ids)]
    if flags:
        parts += [_bytes(weight_lengths), _bytes(weights)]
    data = b"".join(parts)
    return Payload(hashlib.sha256(data).hexdigest(), data, n, len(ids))


def unpack(data: bytes) -> list[Sample]:
    """The samples of a packed payload. Raises HogwildError when the bytes are not one."""
    try:
        magic, n, flags = _HEADER.unpack_from(data)
        if magic != MAGIC:
            raise ValueError(f"begins with {magic!r}")
        at = _HEADER.size
        lengths, at = _take(data, at, "I", 2 * n)
        ids, at = _take(data, at, "i", sum(lengths))
        weight_lengths, weights = array("I"), array("f")
        if flags & _HAS_WEIGHTS:
            weight_lengths, at = _take(data, at, "I", n)
            floats, at = _take(data, at, "f", sum(weight_lengths))
            weights.extend(floats)
        if at != len(data):
            raise ValueError(f"{len(data) - at} bytes too many")
    except (struct.error, ValueError) as error:
        raise HogwildError(f"A stored payload is damaged ({error}): Redis holds other data than written.") from error
    samples, i, w = [], 0, 0
    for k in range(n):
        middle, end = i + lengths[2 * k], i + lengths[2 * k] + lengths[2 * k + 1]
        n_weights = weight_lengths[k] if weight_lengths else 0
        samples.append(Sample(ids[i:middle], ids[middle:end], weights[w:w + n_weights] if n_weights else None))
        i, w = end, w + n_weights
    return samples


def load(client: Client, keys: Keys, digest: str) -> list[Sample]:
    """Samples of a stored payload. Raises NotFound, or HogwildError when the content is not what was stored."""
    data = client.get(keys("payload", digest))
    if data is None:
        raise NotFound(f"The samples {digest[:12]}… are not in Redis any more: the job has ended.")
    if hashlib.sha256(data).hexdigest() != digest:
        raise HogwildError(f"The stored samples {digest[:12]}… do not match their hash.")
    return unpack(data)


def _bytes(values: "array[int] | array[float]") -> bytes:
    if sys.byteorder == "big":
        values = values[:]
        values.byteswap()
    return values.tobytes()


def _take(data: bytes, at: int, code: str, n: int) -> "tuple[array[int], int]":
    end = at + 4 * n
    if end > len(data):
        raise ValueError(f"ends after {len(data)} bytes where {end} are needed")
    values = array(code, data[at:end])
    if sys.byteorder == "big":
        values.byteswap()
    return values, end
