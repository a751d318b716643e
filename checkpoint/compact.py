"""Undo data of files that were replaced as a whole, made after the sync is done.

Compressing the differences of a whole model takes several times as long as writing it. So a sync of which most is new
keeps the old file under another name, which costs nothing, and is done as soon as the new one is in place. The old file
is turned into differences afterwards, beside training, and is then removed. If it does not get that far, the next sync
or open does it; until then generations are read from the old file itself.
"""

import contextlib
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

from hogwild.checkpoint.blockfile import check_old, read_blocks
from hogwild.checkpoint.codec import DELTA
from hogwild.checkpoint.constants import FRAME_BLOCKS, UNDO_MAGIC
from hogwild.checkpoint.durable import FileIo
from hogwild.checkpoint.fingerprints import Bytes, Table, differing
from hogwild.checkpoint.frames import FrameFile, FrameWriter
from hogwild.checkpoint.history import History
from hogwild.checkpoint.layout import Layout
from hogwild.checkpoint.records import Commit
from hogwild.checkpoint.stage import StagedFrame, bytes_of
from hogwild.checkpoint.transaction import encoded
from hogwild.errors import CheckpointCorrupt, CheckpointForeign

logger = logging.getLogger(__name__)

NICENESS = 10
"""Of the compressing threads (Linux has one for each thread): a tenth of the weight of those that train and serve."""


def compact(
    io: FileIo, directory: Path, history: History, layout: Layout, commit: Commit, check: Callable[[], None]
) -> int:
    """Make the undo file of `commit`, the head, from its part and its old files; bytes written.

    `check` is called before each frame and may raise to give up: nothing is lost, it can be done again. Nobody may
    write to the checkpoint's files meanwhile; readers are not disturbed.

    Raises OSError and, when the files of today are not what the last generation left, CheckpointForeign. Where the old
    contents are not what the fingerprints say, the history before `commit` is given up: nothing could prove it.
    """
    undo, part = history.path(commit.generation, "undo"), history.path(commit.generation, "part")
    written = 0
    if not undo.exists():
        temp = undo.with_name(undo.name + ".tmp")
        writer = FrameWriter(io, temp, UNDO_MAGIC, commit.generation, commit.parent, layout.id)
        try:
            with FrameFile(io, part, UNDO_MAGIC, commit.generation, layout.id) as begun:
                for info, payload in begun:
                    writer.add(info.tensor, info.numbers, info.encoding, info.width, info.raw_bytes, payload)
            _encode_files(io, directory, part.parent, history, layout, commit, writer, check)
            writer.finish()
            writer.handle.fsync()
            io.rename(temp, undo)
            written = writer.bytes
        except (_DamagedHistory, CheckpointCorrupt) as error:
            logger.warning("generations before %d can't be rolled back to any more: %s", commit.generation, error)
            io.unlink(temp)
        except BaseException:
            with contextlib.suppress(OSError):
                io.unlink(temp)
            raise
        finally:
            writer.handle.close()
    io.fsync_dir(undo.parent)  # also when the undo file was there: its name may not be durable
    for name in commit.deferred.values():
        io.unlink(part.with_name(name))
    io.unlink(part)  # the last: as long as it is there, this is not done
    return written


class _DamagedHistory(Exception):
    """Old contents are not what the last generation had."""


def _encode_files(
    io: FileIo,
    directory: Path,
    generations: Path,
    history: History,
    layout: Layout,
    commit: Commit,
    writer: FrameWriter,
    check: Callable[[], None],
) -> None:
    old_table, table = history.table(commit.parent), history.table(commit.generation)
    for file, name in commit.deferred.items():
        frames = changed_frames(layout, file, old_table, table)
        if not (generations / name).exists():
            raise _DamagedHistory(f"{name} is gone")
        with io.open(generations / name) as old, io.open(directory / file) as new:
            old.once = new.once = True

            def read(frame: StagedFrame, new=new) -> Bytes:  # type: ignore[no-untyped-def]  # binds the loop's file
                data = read_blocks(new, frame.spec, frame.blocks)
                check_old(new, frame.spec, frame.blocks, data, table)
                return data

            def before(frame: StagedFrame, out: Bytes, old=old) -> Bytes:  # type: ignore[no-untyped-def]
                try:
                    read_blocks(old, frame.spec, frame.blocks, out)
                    check_old(old, frame.spec, frame.blocks, out, old_table)
                except CheckpointForeign as error:
                    raise _DamagedHistory(error.message) from error
                return out

            for frame, _, payload in encoded(frames, before, read, initializer=_step_back):
                check()
                writer.add(frame.spec.number, frame.blocks, DELTA, frame.spec.itemsize, frame.nbytes, payload)


def changed_frames(layout: Layout, file: str, old: Table, new: Table) -> list[StagedFrame]:
    """The blocks of a file that differ between two tables, as frames without contents, in file order."""
    frames = []
    for spec in layout.of_file(file):
        rows = slice(spec.first_block, spec.first_block + spec.blocks)
        changed = differing(old[rows], new[rows])
        for start in range(0, len(changed), FRAME_BLOCKS):
            blocks = changed[start : start + FRAME_BLOCKS]
            frames.append(StagedFrame(spec, blocks, new[rows][blocks], bytes_of(spec, blocks), None))
    return frames


def _step_back() -> None:
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
