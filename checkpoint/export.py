"""A generation as a clean model directory or a tar: what `vllm serve` and `from_pretrained` load."""

import contextlib
import io as pyio
import os
import shutil
import tarfile
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

import numpy as np

from hogwild.checkpoint.clone import companions
from hogwild.checkpoint.constants import FRAME_BLOCKS
from hogwild.checkpoint.durable import FileIo, explained
from hogwild.checkpoint.fingerprints import Bytes, Table, differing, fingerprints
from hogwild.checkpoint.layout import Layout
from hogwild.checkpoint.records import Commit
from hogwild.checkpoint.snapshot import Snapshot
from hogwild.errors import CheckpointCorrupt, CheckpointError


def export(
    io: FileIo,
    directory: Path,
    layout: Layout,
    snapshot: Snapshot,
    table: Table,
    commit: Commit,
    target: Path | str | BinaryIO,
) -> None:
    """Write generation `commit` to an empty directory, a path that ends in `.tar`, or a binary stream (as tar)."""
    weights = {file.name: file.size for file in layout.files}
    others = companions(directory, layout)
    untouched = "The checkpoint itself was not touched."
    if not isinstance(target, str | os.PathLike):
        with explained("the export", directory, kept=lambda: untouched):
            _tar(target, others, weights, layout, snapshot, table, commit)
        return
    path = Path(target)
    if path.suffix == ".tar":
        with explained("the export", path.parent, kept=lambda: untouched):
            if path.exists():
                raise CheckpointError(f"{path} exists already: choose another name.")
            temp = path.with_name(path.name + ".tmp")
            try:
                with temp.open("wb") as stream:
                    _tar(stream, others, weights, layout, snapshot, table, commit)
                    stream.flush()
                    os.fsync(stream.fileno())
                io.rename(temp, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    io.unlink(temp)
                raise
            io.fsync_dir(path.parent)
        return
    with explained("the export", path.parent, kept=lambda: f"{path} is incomplete: remove it. {untouched}"):
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise CheckpointError(f"{path} is not an empty directory: choose another one.")
        path.mkdir(parents=True, exist_ok=True)
        for other in others:
            shutil.copyfile(other, path / other.name)
        for name in weights:
            with io.create(path / name) as handle:
                offset = 0
                for part in _checked(name, layout, snapshot, table):
                    handle.pwrite(part.data, offset)
                    offset += len(part)
                handle.fsync()
        io.fsync_dir(path)


def _checked(name: str, layout: Layout, snapshot: Snapshot, table: Table) -> Iterator[Bytes]:
    """The parts of a weight file, each compared with the generation's fingerprints before it is handed out."""
    parts = snapshot.file_parts(name, FRAME_BLOCKS)
    yield next(parts)
    for spec in layout.of_file(name):
        for start in range(0, spec.blocks, FRAME_BLOCKS):
            part = next(parts)
            stop = min(start + FRAME_BLOCKS, spec.blocks)
            if len(differing(fingerprints(part), table[spec.first_block + start : spec.first_block + stop])):
                raise CheckpointCorrupt(
                    f"{spec.name} does not match its fingerprints: the export was stopped. Run "
                    "`hogwild checkpoint verify`.",
                    tensor=spec.name,
                )
            yield part


class _Parts(pyio.RawIOBase):
    """An iterator of byte arrays as a readable stream, for tarfile."""

    def __init__(self, parts: Iterator[Bytes]) -> None:
        self._parts = parts
        self._rest = np.empty(0, np.uint8)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # typeshed wants a Buffer
        if not len(self._rest):
            self._rest = next(self._parts, self._rest)
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count].data
        self._rest = self._rest[count:]
        return count


def _tar(
    stream: BinaryIO,
    others: list[Path],
    weights: dict[str, int],
    layout: Layout,
    snapshot: Snapshot,
    table: Table,
    commit: Commit,
) -> None:
    with tarfile.open(fileobj=stream, mode="w|") as tar:
        for other in others:
            tar.add(other, arcname=other.name, recursive=False)
        for name, size in weights.items():
            info = tarfile.TarInfo(name)
            info.size = size
            info.mode = 0o644
            info.mtime = int(datetime.fromisoformat(commit.time).timestamp())
            tar.addfile(info, pyio.BufferedReader(_Parts(_checked(name, layout, snapshot, table)), 1 << 20))
