"""Where changed blocks wait between the pause and the disk.

Staged bytes go to host memory up to a budget, and beyond it to a spill file next to the generations. The memory is
kept from one sync to the next: touching fresh pages costs far more than the copy itself. The spill file is written
during the pause, at the speed of the page cache, so a larger budget means a shorter pause.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import psutil

from hogwild.checkpoint.constants import BLOCK, FRAME_BLOCKS
from hogwild.checkpoint.durable import FileIo, Handle
from hogwild.checkpoint.fingerprints import Bytes, Indices, Table
from hogwild.checkpoint.layout import TensorSpec

CHUNK = 64 << 20
"""Bytes of one allocation: few system calls, and at most this much unused at the end."""


def available_memory() -> int:
    """Bytes that this process may still take: what the machine has free, less if its control group allows less."""
    free = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # no control groups version 2, or "max": no limit
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        fields = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(fields.get("file", 0)))  # page cache makes room
    return max(0, free)


class Arena:
    """Host memory that is handed out from the front and taken back all at once."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._chunks: list[Bytes] = []
        self._chunk = 0
        self._used = 0
        self._scratch: dict[str, Bytes] = {}
        self.allocate: Callable[[int], Bytes] = lambda nbytes: np.empty(nbytes, np.uint8)

    def take(self, nbytes: int) -> Bytes | None:  # (nbytes,)
        """A buffer, or None when the budget is spent."""
        while self._chunk < len(self._chunks) and self._used + nbytes > len(self._chunks[self._chunk]):
            self._chunk += 1
            self._used = 0
        if self._chunk == len(self._chunks):
            size = min(CHUNK, self.budget - sum(map(len, self._chunks)))
            if size < nbytes:
                return None
            self._chunks.append(self.allocate(size))
        self._used += nbytes
        return self._chunks[self._chunk][self._used - nbytes : self._used]

    def extend(self, last: Bytes, nbytes: int) -> Bytes | None:  # (len(last) + nbytes,)
        """What `take` gave last, `nbytes` longer; None where no room is left behind it."""
        end = self._used + nbytes
        if end > len(self._chunks[self._chunk]):
            return None
        self._used = end
        return self._chunks[self._chunk][end - nbytes - len(last) : end]

    def reserve(self, nbytes: int) -> None:
        """Allocate and touch memory for `nbytes` now, within the budget, so that the first sync need not."""
        while (have := sum(map(len, self._chunks))) < min(nbytes, self.budget):
            chunk = self.allocate(min(CHUNK, self.budget - have))
            chunk[::4096] = 0  # a page
            self._chunks.append(chunk)

    def scratch(self, name: str, nbytes: int) -> Bytes:  # (nbytes,)
        """A buffer beside the budget, the same at each call for a name: for what is known of blocks, not in them."""
        if len(self._scratch.get(name, b"")) < nbytes:
            self._scratch[name] = self.allocate(nbytes)
        return self._scratch[name][:nbytes]

    def reset(self) -> None:
        """Take every buffer back."""
        self._chunk = self._used = 0

    @cached_property
    def bounce(self) -> Bytes:
        """One frame's worth on its way to the spill file."""
        return self.allocate(FRAME_BLOCKS * BLOCK)

    @property
    def allocated(self) -> int:
        """Bytes held."""
        return sum(map(len, (*self._chunks, *self._scratch.values())))


@dataclass
class StagedFrame:
    """New contents of up to FRAME_BLOCKS blocks of one tensor."""

    spec: TensorSpec
    blocks: Indices  # (n,) within the tensor, ascending
    table: Table  # (n, 2) new fingerprints
    nbytes: int
    data: Bytes | None  # in memory, or
    spill_offset: int = 0  # ... in the spill file


class Stage:
    """The changed blocks of one sync, in layout order."""

    def __init__(self, arena: Arena, io: FileIo, spill_path: Path) -> None:
        self.frames: list[StagedFrame] = []
        self.nbytes = 0
        self.blocks = 0
        self.arena = arena
        self._io = io
        self._spill_path = spill_path
        self._spill: Handle | None = None
        self._spilled = 0

    def slots(self, spec: TensorSpec, blocks: Indices, table: Table) -> Iterator[tuple[StagedFrame, Bytes]]:
        """Frames for `blocks` of a tensor; the caller fills each buffer before it asks for the next.

        Where a tensor comes piece by piece, small frames are put together: each costs something later on.
        """
        for start in range(0, len(blocks), FRAME_BLOCKS):
            part, rows = blocks[start : start + FRAME_BLOCKS], table[start : start + FRAME_BLOCKS]
            nbytes = bytes_of(spec, part)
            self.nbytes += nbytes
            self.blocks += len(part)
            last = self.frames[-1] if self.frames else None
            if last and last.data is not None and last.spec is spec and len(last.blocks) + len(part) <= FRAME_BLOCKS:
                longer = self.arena.extend(last.data, nbytes)
                if longer is not None:
                    yield StagedFrame(spec, part, rows, nbytes, longer[-nbytes:]), longer[-nbytes:]
                    last.blocks = np.concatenate((last.blocks, part))
                    last.table = np.concatenate((last.table, rows))
                    last.nbytes, last.data = len(longer), longer
                    continue
            buffer = self.arena.take(nbytes)
            frame = StagedFrame(spec, part, rows, nbytes, buffer)
            if buffer is None:
                buffer = self.arena.bounce[:nbytes]
                yield frame, buffer
                self._write_spill(frame, buffer)
            else:
                yield frame, buffer
            self.frames.append(frame)

    def _write_spill(self, frame: StagedFrame, buffer: Bytes) -> None:
        if self._spill is None:
            self._spill = self._io.create(self._spill_path, 0o600)
        self._spill.pwrite(buffer.data, self._spilled)
        frame.spill_offset = self._spilled
        self._spilled += frame.nbytes

    def read(self, frame: StagedFrame) -> Bytes:  # (frame.nbytes,)
        """The new contents of a frame."""
        if frame.data is not None:
            return frame.data
        if self._spill is None:
            raise ValueError("the stage was closed")
        return np.frombuffer(self._spill.pread(frame.nbytes, frame.spill_offset), np.uint8)

    def close(self) -> None:
        """Forget everything; the memory goes back to the arena."""
        self.frames = []
        self.arena.reset()
        if self._spill is not None:
            self._spill.close()
            self._io.unlink(self._spill_path)
            self._spill = None


def bytes_of(spec: TensorSpec, blocks: Indices) -> int:
    """Bytes of some blocks of a tensor: the last block may be short."""
    if not len(blocks):
        return 0
    last = int(blocks[-1])
    return spec.block_bytes(last, last + 1) + (len(blocks) - 1) * BLOCK
