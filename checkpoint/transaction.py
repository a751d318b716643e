"""Writing one generation so that a power cut at any byte leaves the old one or the new one.

      begin ──► logs written ──► COMMITTED ──► applied ──────────────────► compacted
        │   <n>.undo or <n>.part,   │  <n>.commit   │  old files linked,     │  <n>.undo instead of
        │   <n>.redo, new files;    │  appears      │  new ones renamed,     │  <n>.part and old files
        │   fsync                   │               │  blocks in place;      │  (compact.py)
        │                           │               │  fsync, no <n>.redo    │
        └─ crash: generation n−1,   └─ crash: the next open applies again    └─ crash: the next open or sync
           leftovers are removed       (idempotent), generation n               makes <n>.undo again

A 4 KB block that was half written when the power went can't be repaired from a difference, because neither its old
nor its new contents are known. Hence nothing is overwritten before the new contents are safe elsewhere: in the redo
file, or, where at least half of a file changes, the file system can reflink, or the file has another name (a backup by
`cp -al`, which is to keep what it has), in a new file that is renamed over the old one.
"""

import contextlib
import errno
import functools
import os
import stat
import struct
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import xxhash

from hogwild.checkpoint.blockfile import check_old, pieces_of, read_blocks, write_blocks
from hogwild.checkpoint.codec import DELTA, RAW, encode_delta, scratch
from hogwild.checkpoint.constants import REDO_MAGIC, REPLACE_SHARE, UNDO_MAGIC
from hogwild.checkpoint.durable import FileIo, Handle
from hogwild.checkpoint.filesystem import FileSystem
from hogwild.checkpoint.fingerprints import Bytes, Indices, Table
from hogwild.checkpoint.frames import FrameFile, FrameInfo, FrameWriter
from hogwild.checkpoint.history import History
from hogwild.checkpoint.known import KnownFiles
from hogwild.checkpoint.layout import Layout, TensorSpec
from hogwild.checkpoint.records import Commit
from hogwild.checkpoint.stage import Stage, StagedFrame
from hogwild.errors import CheckpointForeign

T = TypeVar("T")
R = TypeVar("R")

ENCODERS = min(8, os.cpu_count() or 1)
"""Threads that read and compress old contents, about 0.5 GB/s each: eight keep up with a fast NVMe disk."""

SMALL_FRAME = 128 << 10
"""Average bytes of a frame below which threads do not pay."""


@dataclass
class Written:
    """A generation that was written."""

    commit: Commit
    bytes: int
    durable: float  # time.perf_counter when no power cut could lose it any more
    applied: bool = False  # False: a reader of the files was in the way


class NewFile:
    """A file written anew beside the old one: unchanged bytes are copied (or shared), changed ones replaced."""

    def __init__(self, io: FileIo, old: Handle, path: Path) -> None:
        self._io, self._old = io, old
        self.path = path
        self.handle = io.create(path, 0o600)
        info = os.fstat(old.fd)
        with contextlib.suppress(PermissionError):  # those who may read the old one may read the new one
            os.fchown(self.handle.fd, info.st_uid, info.st_gid)
        os.fchmod(self.handle.fd, stat.S_IMODE(info.st_mode))  # whatever the umask is
        self.written = 0
        self._cursor = 0
        self._shared = False

    def share(self) -> bool:
        """Take the old extents over by reflink; False where that is not possible."""
        self._shared = self._io.reflink(self._old, self.handle)
        return self._shared

    def write(self, frame: StagedFrame, data: Bytes) -> None:
        """Put a frame's blocks; frames come in file order."""
        spec = frame.spec
        if self._shared:
            write_blocks(self.handle, spec, frame.blocks, data)
            self.written += frame.nbytes
            return
        for start, nbytes, offset in pieces_of(spec, frame.blocks):
            self._copy_to(offset)
            self.handle.stream(data[start : start + nbytes].data, offset)
            self._cursor = offset + nbytes
            self.written += nbytes

    def _copy_to(self, end: int) -> None:
        self._io.copy_range(self._old, self.handle, self._cursor, end - self._cursor)
        self.written += end - self._cursor
        self._cursor = end

    def finish(self) -> None:
        """Copy the rest."""
        if not self._shared:
            self._copy_to(self._old.size())


class Logs:
    """What `write_logs` left on disk, all of it fsynced."""

    def __init__(self) -> None:
        self.redo = False
        self.replaced: dict[str, str] = {}
        self.deferred: dict[str, str] = {}
        self.known: dict[str, frozenset[int]] = {}  # file → tensors whose contents were known before
        self.undo_bytes = 0
        self.bytes_written = 0


def write_logs(
    io: FileIo,
    directory: Path,
    generations: Path,
    layout: Layout,
    table: Table,
    stage: Stage,
    known: KnownFiles,
    *,
    generation: int,
    parent: int,
    disk: FileSystem,
) -> Logs:
    """Write and fsync undo file, redo file and new files of a generation; the checkpoint itself is not touched.

    Of a file of which most changes, the old contents are only checked here, and only where they are not `known`: the
    old file itself is kept (where `disk` has hard links) until `compact` has made undo data of it, after the sync.
    Raises CheckpointForeign when the old contents are not those of the last generation.
    """
    logs = Logs()
    by_file = {file.name: of_file(stage.frames, file.name) for file in layout.files}
    dense = {
        file.name
        for file in layout.files
        if sum(frame.nbytes for frame in by_file[file.name]) >= REPLACE_SHARE * file.size
    }
    deferred = {name for name in dense if disk.links and _may_link(directory / name)}
    # Undo data of a generation that is not complete yet has another name: a history never has holes.
    kind = "part" if deferred else "undo"
    undo = FrameWriter(io, generations / f"{generation:08d}.{kind}", UNDO_MAGIC, generation, parent, layout.id)
    redo: FrameWriter | None = None
    to_sync: list[Handle] = [undo.handle]
    opened: list[Handle] = []
    try:
        for number, file in enumerate(layout.files):
            frames = by_file[file.name]
            if not frames:
                continue
            anew = disk.reflinks or file.name in dense or (directory / file.name).stat().st_nlink > 1
            # Opened as it is going to be written, though nobody writes yet: a generation that exists has to get there.
            old = io.open(directory / file.name, write=not anew)
            opened.append(old)
            check_header(old, file.size, file.header)
            new = None
            if anew:
                _check_replaceable(directory, file.name)
                new = NewFile(io, old, generations / f"{generation:08d}.{number}.new")
                to_sync.append(new.handle)
                logs.replaced[file.name] = new.path.name
                if disk.reflinks:
                    new.share()
            elif redo is None:
                path = generations / f"{generation:08d}.redo"
                redo = FrameWriter(io, path, REDO_MAGIC, generation, parent, layout.id)
                to_sync.append(redo.handle)
            logs.known[file.name] = known.tensors(file.name, old.fd)
            changed: Iterable[tuple[StagedFrame, Bytes, bytes]]
            if file.name in deferred:
                logs.deferred[file.name] = f"{generation:08d}.{number}.old"
                unknown = [frame for frame in frames if frame.spec.number not in logs.known[file.name]]
                _check(old, unknown, table)
                changed = ((frame, stage.read(frame), b"") for frame in frames)
            else:
                changed = encoded(frames, functools.partial(_checked, old, table), stage.read)
            for frame, data, payload in changed:
                if file.name not in deferred:
                    undo.add(frame.spec.number, frame.blocks, DELTA, frame.spec.itemsize, frame.nbytes, payload)
                if new is not None:
                    new.write(frame, data)
                elif redo is not None:
                    redo.add(frame.spec.number, frame.blocks, RAW, frame.spec.itemsize, frame.nbytes, data.data)
            if new is not None:
                new.finish()
                logs.bytes_written += new.written
        undo.finish()
        if redo is not None:
            redo.finish()
            logs.redo = True
            logs.bytes_written += redo.bytes
        # At once: the file system can then put them into one journal commit.
        side_by_side(lambda handle: handle.fsync(), to_sync)
        # The names too: nothing says that the commit record's name, made later, becomes durable later.
        io.fsync_dir(generations)
    finally:
        for handle in (*to_sync, *opened):
            handle.close()
    logs.undo_bytes = undo.bytes
    logs.bytes_written += undo.bytes
    return logs


def _may_link(path: Path) -> bool:
    """Whether Linux lets this user give the file a second name (proc_sys_fs(5), protected_hardlinks)."""
    return os.geteuid() in (0, path.stat().st_uid) or os.access(path, os.R_OK | os.W_OK)


def _check_replaceable(directory: Path, file: str) -> None:
    """Raise PermissionError where the file can't be replaced: once there is a generation it would be too late."""
    place, owner = directory.stat(), (directory / file).stat().st_uid
    others = place.st_mode & stat.S_ISVTX and os.geteuid() not in (0, place.st_uid, owner)  # as in /tmp
    if others or not os.access(directory, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(directory))


def check_header(handle: Handle, size: int, header: str) -> None:
    """Raise CheckpointForeign unless the file still has its size and header: offsets would mean something else."""
    prefix = handle.pread(8, 0)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
    if handle.size() != size or xxhash.xxh3_128_hexdigest(handle.pread(8 + min(length, size), 0)) != header:
        raise CheckpointForeign(
            f"{handle.path} was replaced by another file since the last generation. Nothing was written. `hogwild "
            "checkpoint adopt` accepts the files as they are.",
            file=str(handle.path),
        )


def side_by_side(work: Callable[[T], R], items: Collection[T]) -> list[R]:
    """`work` on each item, in threads of their own; raises what one of them raised when all are done."""
    if len(items) < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(min(len(items), 16)) as pool:
        return list(pool.map(work, items))


def of_file(frames: Iterable[StagedFrame], name: str) -> list[StagedFrame]:
    """The frames of a file, in the order of their places in it."""
    mine = (frame for frame in frames if frame.spec.file == name)
    return sorted(mine, key=lambda frame: (frame.spec.number, frame.blocks[0]))


def _checked(old: Handle, table: Table, frame: StagedFrame, out: Bytes) -> Bytes:
    """Read the old contents of a frame into `out`; raises CheckpointForeign."""
    read_blocks(old, frame.spec, frame.blocks, out)
    check_old(old, frame.spec, frame.blocks, out, table)
    return out


def _check(old: Handle, frames: list[StagedFrame], table: Table) -> None:
    """Check the old contents of frames, in threads; raises CheckpointForeign."""

    def work(frame: StagedFrame) -> None:
        _checked(old, table, frame, scratch("before", frame.nbytes))

    if frames:
        with ThreadPoolExecutor(ENCODERS) as pool:
            for _ in pool.map(work, frames):
                pass


def encoded(
    frames: list[StagedFrame],
    before: Callable[[StagedFrame, Bytes], Bytes],  # old contents of a frame, checked, put into a buffer
    read: Callable[[StagedFrame], Bytes],  # new contents of a frame
    *,
    initializer: Callable[[], None] | None = None,  # of each thread
) -> Iterator[tuple[StagedFrame, Bytes, bytes]]:
    """(frame, new contents, undo payload) in order; reading, checking and compressing run in threads, a few ahead."""

    def work(frame: StagedFrame) -> tuple[StagedFrame, Bytes, bytes]:
        old = before(frame, scratch("before", frame.nbytes))
        data = read(frame)
        return frame, data, encode_delta(old, data, frame.spec.itemsize)

    if sum(frame.nbytes for frame in frames) < SMALL_FRAME * len(frames):
        yield from map(work, frames)  # many small frames: handing them to threads takes longer than the work
        return
    with ThreadPoolExecutor(ENCODERS, initializer=initializer) as pool:
        ahead: deque[Future[tuple[StagedFrame, Bytes, bytes]]] = deque()
        try:
            for frame in frames:
                ahead.append(pool.submit(work, frame))
                if len(ahead) > 2 * ENCODERS:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def apply(
    io: FileIo,
    directory: Path,
    generations: Path,
    commit: Commit,
    frames: Iterable[tuple[TensorSpec, Indices, Callable[[], Bytes]]],
) -> int:
    """Bring a committed generation into the checkpoint's files and fsync them; the number of bytes written.

    `frames`: tensor, block numbers and what reads the new contents, of everything that is written in place; files are
    written side by side. Doing it again is harmless. Old files that undo data is still to be made of get their second
    name before their first one is taken.
    """
    by_file: dict[str, list[tuple[TensorSpec, Indices, Callable[[], Bytes]]]] = {}
    for frame in frames:
        by_file.setdefault(frame[0].file, []).append(frame)

    def write(file: str) -> int:
        written = 0
        with _own(io, directory / file, generations / f"{file}.tmp") as handle:
            for spec, blocks, read in by_file[file]:
                data = read()
                write_blocks(handle, spec, blocks, data)
                written += len(data)
            handle.fsync()
        return written

    written = sum(side_by_side(write, by_file))
    pending = {file: temp for file, temp in commit.replaced.items() if (generations / temp).exists()}
    kept = {file: commit.deferred[file] for file in pending if file in commit.deferred}
    for file, name in kept.items():
        if not (generations / name).exists():
            io.link(directory / file, generations / name)
    if kept:
        io.fsync_dir(generations)
    for file, temp in pending.items():
        io.rename(generations / temp, directory / file)
    if pending:
        io.fsync_dir(directory)
    return written


def _own(io: FileIo, path: Path, temp: Path) -> Handle:
    """A file, open for writing; one that got another name since the logs were written is first made anew."""
    handle = io.open(path, write=True)
    if os.fstat(handle.fd).st_nlink == 1:
        return handle
    with handle:
        new = NewFile(io, handle, temp)
        with new.handle:
            new.share()
            new.finish()
            new.handle.fsync()
    io.rename(temp, path)
    io.fsync_dir(path.parent)
    return io.open(path, write=True)


def apply_again(io: FileIo, directory: Path, history: History, layout: Layout, commit: Commit) -> None:
    """`apply` for a generation whose writer did not get so far: from its redo file, if it has one, and new files."""
    redo_path = history.path(commit.generation, "redo")
    if redo_path.exists():
        with FrameFile(io, redo_path, REDO_MAGIC, commit.generation, commit.layout) as redo:

            def contents(info: FrameInfo) -> Bytes:
                return np.frombuffer(redo.load(info), np.uint8)

            frames = (
                (layout.tensors[info.tensor], info.numbers, functools.partial(contents, info)) for info in redo.frames
            )
            apply(io, directory, redo_path.parent, commit, frames)
    else:
        apply(io, directory, redo_path.parent, commit, ())
    io.unlink(redo_path)
