"""The contents of an earlier generation: the files of today, less what the undo files say has changed since."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from hogwild.checkpoint.blockfile import read_blocks
from hogwild.checkpoint.codec import UNSIGNED, decode_delta
from hogwild.checkpoint.constants import BLOCK, UNDO_MAGIC
from hogwild.checkpoint.durable import FileIo, Handle
from hogwild.checkpoint.fingerprints import Bytes, Indices, Table, differing, fingerprints
from hogwild.checkpoint.frames import FrameFile, FrameInfo
from hogwild.checkpoint.history import History
from hogwild.checkpoint.layout import Layout, TensorSpec
from hogwild.checkpoint.records import Commit
from hogwild.checkpoint.stage import Stage
from hogwild.errors import CheckpointForeign


class Snapshot:
    """Reads generation `generation`, `head` being what the files hold.

    Files that the last sync replaced, and of which no undo data has been made yet, are read from their old contents.
    Memory: one frame per generation in between; reading in ascending order decodes each frame once.
    """

    def __init__(
        self, io: FileIo, directory: Path, history: History, layout: Layout, generation: int, head: Commit
    ) -> None:
        self.layout, self.generation = layout, generation
        self._io, self._directory = io, directory
        self._undos: list[FrameFile] = []
        self._frames: list[dict[int, list[FrameInfo]]] = []  # newest first: tensor → frames
        self._cache: list[tuple[FrameInfo, Bytes] | None] = []  # the last decoded frame of each undo file
        self._handles: dict[str, Handle] = {}
        try:
            for number in range(head.generation, generation, -1):
                undo = self._undo(history, number, head)
                self._undos.append(undo)
                by_tensor: dict[int, list[FrameInfo]] = {}
                for frame in undo.frames:
                    by_tensor.setdefault(frame.tensor, []).append(frame)
                self._frames.append(by_tensor)
                self._cache.append(None)
        except BaseException:
            self.close()
            raise

    def _undo(self, history: History, number: int, head: Commit) -> FrameFile:
        """The undo file that leads back from a generation; where it is still to be made, its part and the old files."""
        undo, part = history.path(number, "undo"), history.path(number, "part")
        if number == head.generation and not undo.exists():
            with contextlib.suppress(FileNotFoundError):  # it was made just now: then it is there
                found = FrameFile(self._io, part, UNDO_MAGIC, number, self.layout.id)
                olds: dict[str, Handle] = {}
                try:
                    for file, name in head.deferred.items():
                        olds[file] = self._io.open(part.with_name(name))
                except BaseException:
                    found.close()
                    for handle in olds.values():
                        handle.close()
                    raise
                self._handles.update(olds)
                return found
        return FrameFile(self._io, undo, UNDO_MAGIC, number, self.layout.id)

    def read(self, spec: TensorSpec, blocks: Indices) -> Bytes:
        """Contents of `blocks` (ascending) in that generation, one after the other."""
        data = read_blocks(self._file(spec.file), spec, blocks)
        for index, frames in enumerate(self._frames):
            for frame in frames.get(spec.number, []):
                if frame.numbers[0] <= blocks[-1] and frame.numbers[-1] >= blocks[0]:
                    self._take_back(index, frame, blocks, data)
        return data

    def _take_back(self, index: int, frame: FrameInfo, blocks: Indices, data: Bytes) -> None:
        """Take one generation's changes in one frame back, in `data`.

        A difference is per element, so a frame is decoded once, against zeros, and added where it is asked for.
        """
        cached = self._cache[index]
        if cached is None or cached[0] is not frame:
            zeros = np.zeros(frame.raw_bytes, np.uint8)
            cached = frame, decode_delta(self._undos[index].load(frame), zeros, frame.width)
            self._cache[index] = cached
        minus = cached[1]  # old − new for each element of the frame
        _, here, there = np.intersect1d(blocks, frame.numbers, assume_unique=True, return_indices=True)
        unsigned = UNSIGNED[frame.width]
        whole, whole_there = len(data) // BLOCK, len(minus) // BLOCK
        if len(here) and here[-1] == whole:  # the tensor's short last block is among them
            data[whole * BLOCK :].view(unsigned)[:] += minus[whole_there * BLOCK :].view(unsigned)
            here, there = here[:-1], there[:-1]
        elements = BLOCK // frame.width
        data[: whole * BLOCK].view(unsigned).reshape(whole, elements)[here] += (
            minus[: whole_there * BLOCK].view(unsigned).reshape(whole_there, elements)[there]
        )

    def _file(self, name: str) -> Handle:
        if name not in self._handles:
            self._handles[name] = self._io.open(self._directory / name)
        return self._handles[name]

    def file_parts(self, name: str, window: int) -> Iterator[Bytes]:
        """The whole of a safetensors file in that generation, part by part: header, then `window` blocks at a time."""
        handle = self._file(name)
        yield np.frombuffer(handle.pread(self.layout.file(name).data_start, 0), np.uint8)
        for spec in self.layout.of_file(name):
            for start in range(0, spec.blocks, window):
                yield self.read(spec, np.arange(start, min(start + window, spec.blocks), dtype=np.int64))

    def close(self) -> None:
        """Close all files."""
        for undo in self._undos:
            undo.close()
        for handle in self._handles.values():
            handle.close()

    def __enter__(self) -> "Snapshot":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def stage_difference(old: Snapshot, target: Table, table: Table, stage: Stage) -> list[str]:
    """Stage what differs between the files of today (`table`) and an earlier generation (`target`); tensors' names.

    Raises CheckpointForeign where the earlier contents do not come out.
    """
    changed = []
    for spec in old.layout.tensors:
        rows = slice(spec.first_block, spec.first_block + spec.blocks)
        blocks = differing(target[rows], table[rows])
        if not len(blocks):
            continue
        changed.append(spec.name)
        for frame, buffer in stage.slots(spec, blocks, target[rows][blocks]):
            buffer[:] = old.read(spec, frame.blocks)
            if len(differing(fingerprints(buffer), frame.table)):
                raise CheckpointForeign(
                    f"{spec.name} can't be brought back to generation {old.generation}: the files were changed by "
                    "something else. Nothing was written. Run `hogwild checkpoint verify`.",
                    tensor=spec.name,
                )
    return changed
