"""Undo and redo files: a header, frames of up to 1,024 blocks of one tensor each, and an end frame.

All integers are little-endian. docs/checkpoint-format.md has the same tables.

    header, 64 bytes                          frame header, 48 bytes
     0  8  magic HOGWUNDO | HOGWREDO           0  4  'FRAM'
     8  4  format version                      4  4  tensor number (0xffffffff: end of frames)
    12  4  block size                          8  4  blocks n (end: number of frames)
    16  8  generation                         12  1  encoding, 13 1 element width, 14 2 zero
    24  8  parent generation                  16  8  bytes of the blocks (end: sum over all frames)
    32 16  layout id                          24  8  bytes of the payload (end: 0)
    48  8  zero                               32  8  XXH3-64 of bytes 0–31 and the block numbers
    56  8  XXH3-64 of bytes 0–55              40  8  XXH3-64 of the payload (end: of nothing)
                                              then n × 4 bytes: block numbers within the tensor, ascending; the payload
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash

from hogwild.checkpoint.codec import DELTA, RAW
from hogwild.checkpoint.constants import BLOCK, END_OF_FRAMES, FORMAT_VERSION, FRAME_MAGIC, UNDO_MAGIC
from hogwild.checkpoint.durable import FileIo, Handle
from hogwild.checkpoint.fingerprints import Indices
from hogwild.errors import CheckpointCorrupt

_HEADER = struct.Struct("<8sIIQQ16sQ")
_HEADER_BYTES = 64
_FRAME = struct.Struct("<IIIBBHQQ")
_SUMS = struct.Struct("<QQ")
_FLUSH = 1 << 20  # bytes gathered before a write: one system call for many small frames
_DIRECT = 64 << 10  # bytes from which a payload is written where it lies instead of being gathered


@dataclass(frozen=True, kw_only=True)
class FrameInfo:
    """Where a frame lies and what it holds."""

    tensor: int
    blocks: int
    encoding: int
    width: int
    raw_bytes: int
    payload_bytes: int
    payload_sum: int  # XXH3-64
    offset: int  # of the payload in the file
    numbers: Indices = field(repr=False, compare=False)  # (blocks,) within the tensor, ascending


class FrameWriter:
    """Writes an undo or redo file; nothing is durable until the caller fsyncs the handle after `finish`."""

    def __init__(self, io: FileIo, path: Path, magic: bytes, generation: int, parent: int, layout_id: str) -> None:
        self.handle = io.create(path)
        self.bytes = 0
        self._frames = 0
        self._raw = 0
        self._buffer = bytearray()
        head = _HEADER.pack(magic, FORMAT_VERSION, BLOCK, generation, parent, bytes.fromhex(layout_id), 0)
        self._put(head + struct.pack("<Q", xxhash.xxh3_64_intdigest(head)))

    def _put(self, *parts: bytes | memoryview) -> None:
        for part in parts:
            if len(part) < _DIRECT:
                self._buffer += part
                continue
            self._flush()
            self.handle.stream(part, self.bytes)
            self.bytes += len(part)
        if len(self._buffer) >= _FLUSH:
            self._flush()

    def _flush(self) -> None:
        if not self._buffer:
            return
        self.handle.stream(self._buffer, self.bytes)
        self.bytes += len(self._buffer)
        self._buffer = bytearray()

    def add(
        self, tensor: int, blocks: Indices, encoding: int, width: int, raw: int, payload: bytes | memoryview
    ) -> None:
        """Append a frame."""
        head = _FRAME.pack(FRAME_MAGIC, tensor, len(blocks), encoding, width, 0, raw, len(payload))
        numbers = blocks.astype("<u4").tobytes()
        self._put(head, _sums(head, numbers, payload), numbers, payload)
        self._frames += 1
        self._raw += raw

    def finish(self) -> None:
        """Write the end frame."""
        head = _FRAME.pack(FRAME_MAGIC, END_OF_FRAMES, self._frames, 0, 0, 0, self._raw, 0)
        self._put(head, _sums(head, b"", b""))
        self._flush()


def _sums(head: bytes, numbers: bytes, payload: bytes | memoryview) -> bytes:
    return _SUMS.pack(xxhash.xxh3_64_intdigest(head + numbers), xxhash.xxh3_64_intdigest(payload))


class FrameFile:
    """A finished undo or redo file, open for reading.

    Raises CheckpointCorrupt unless header and end frame are whole and belong to `generation` and `layout_id`.
    """

    def __init__(self, io: FileIo, path: Path, magic: bytes, generation: int, layout_id: str) -> None:
        self.path = path
        self._handle: Handle = io.open(path)
        try:
            self.frames = self._scan(magic, generation, layout_id)
        except BaseException:
            self._handle.close()
            raise

    def _scan(self, magic: bytes, generation: int, layout_id: str) -> list[FrameInfo]:
        head = self._handle.pread(_HEADER_BYTES, 0)
        if len(head) < _HEADER_BYTES or struct.unpack("<Q", head[56:])[0] != xxhash.xxh3_64_intdigest(head[:56]):
            raise CheckpointCorrupt(f"{self.path} has no valid header.")
        found, version, block, number, _, layout, _ = _HEADER.unpack(head[:56])
        if version != FORMAT_VERSION or block != BLOCK:
            raise CheckpointCorrupt(
                f"{self.path} has format version {version} with blocks of {block} bytes; "
                f"this Hogwild reads version {FORMAT_VERSION} with {BLOCK}."
            )
        if found != magic or number != generation or layout.hex() != layout_id:
            raise CheckpointCorrupt(f"{self.path} does not belong to generation {generation} of this checkpoint.")
        frames: list[FrameInfo] = []
        offset, raw = _HEADER_BYTES, 0
        while True:
            head = self._handle.pread(_FRAME.size + _SUMS.size, offset)
            if len(head) < _FRAME.size + _SUMS.size:
                raise CheckpointCorrupt(f"{self.path} was never finished.")
            mark, tensor, blocks, encoding, width, _, raw_bytes, payload = _FRAME.unpack(head[: _FRAME.size])
            if mark != FRAME_MAGIC:
                raise CheckpointCorrupt(f"{self.path}: no frame at byte {offset}.")
            end = tensor == END_OF_FRAMES
            numbers = b"" if end else self._handle.pread(4 * blocks, offset + len(head))
            head_sum, payload_sum = _SUMS.unpack(head[_FRAME.size :])
            if head_sum != xxhash.xxh3_64_intdigest(head[: _FRAME.size] + numbers):
                raise CheckpointCorrupt(f"{self.path}: the frame at byte {offset} does not match its checksum.")
            if not end and encoding != (DELTA if magic == UNDO_MAGIC else RAW):
                raise CheckpointCorrupt(f"{self.path}: the encoding {encoding} is not known to this Hogwild.")
            if end:
                if blocks != len(frames) or raw_bytes != raw:
                    raise CheckpointCorrupt(f"{self.path}: frames are missing.")
                return frames
            offset += len(head) + len(numbers)
            frames.append(
                FrameInfo(
                    tensor=tensor,
                    blocks=blocks,
                    encoding=encoding,
                    width=width,
                    raw_bytes=raw_bytes,
                    payload_bytes=payload,
                    payload_sum=payload_sum,
                    offset=offset,
                    numbers=np.frombuffer(numbers, "<u4").astype(np.int64),
                )
            )
            raw += raw_bytes
            offset += payload

    def load(self, frame: FrameInfo) -> bytes:
        """The payload of a frame, checked."""
        payload = self._handle.pread(frame.payload_bytes, frame.offset)
        if xxhash.xxh3_64_intdigest(payload) != frame.payload_sum:
            raise CheckpointCorrupt(f"{self.path}: the payload at byte {frame.offset} does not match its checksum.")
        return payload

    def __iter__(self) -> Iterator[tuple[FrameInfo, bytes]]:
        for frame in self.frames:
            yield frame, self.load(frame)

    def close(self) -> None:
        """Close the file."""
        self._handle.close()

    def __enter__(self) -> "FrameFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
