"""A checkpoint of which no generation can be proved any more, begun again with its files as they are.

A flipped bit in the newest commit record, or in the full table that it rests on, says nothing about the weight files:
they may be whole. `hogwild checkpoint adopt` makes them a generation after all that there were, which needs none of the
records before it.
"""

import contextlib
import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from hogwild.checkpoint.blockfile import file_table
from hogwild.checkpoint.clone import refuse_links
from hogwild.checkpoint.durable import FileIo
from hogwild.checkpoint.fingerprints import table_digest
from hogwild.checkpoint.history import History
from hogwild.checkpoint.layout import Layout
from hogwild.checkpoint.records import Commit, new_commit, read_record
from hogwild.checkpoint.transaction import apply_again
from hogwild.errors import CheckpointCorrupt

logger = logging.getLogger(__name__)

_NUMBERED = re.compile(r"(\d{8})\.(?:\d+\.)?\w+")  # not the .tmp of a record that was being written
_NEW = re.compile(r"\d{8}\.(\d+)\.new")


@contextlib.contextmanager
def damage_explained() -> Iterator[None]:
    """Say beside a CheckpointCorrupt of the records how to go on without them."""
    try:
        yield
    except CheckpointCorrupt as error:
        raise CheckpointCorrupt(
            f"{error.message} So the last generation can't be proved or finished. If the weight files are good, "
            "`hogwild checkpoint adopt` goes on with them as they are; earlier generations are lost then."
        ) from error


def begin_anew(io: FileIo, directory: Path, generations: Path) -> tuple[int, ...]:
    """Write a full record, `adopt`, of the files as they are; the generations that are lost by it, oldest first.

    The caller holds the writer's lock and keeps readers away. What can be read of the old records is taken over: which
    model it all began with, and the weight version, to count on from. Raises CheckpointError: a record of another
    format, which is no damage.
    """
    layout = Layout.read(directory)
    refuse_links(directory, layout, hard=False)
    lost = sorted(int(path.name[:8]) for path in generations.glob("????????.commit"))
    readable = [commit for number in lost if (commit := _commit(generations, number)) is not None]
    _finish(io, directory, generations, layout, lost[-1])
    table = file_table(io, directory, layout)
    # Files of a generation that never came to be have higher numbers than the last record: no name is used twice.
    last = max(int(match[1]) for path in generations.iterdir() if (match := _NUMBERED.fullmatch(path.name)))
    version = max((commit.weight_version for commit in readable), default=0)
    commit = new_commit(layout, table_digest(table), last + 1, last + 1, "adopt", version + 1)
    if readable:
        commit = replace(commit, base_model=readable[-1].base_model)
    History(io, generations, []).add(commit, np.arange(len(table)), table)
    return tuple(lost)


def _commit(generations: Path, number: int) -> Commit | None:
    try:
        return read_record(generations / f"{number:08d}.commit").commit
    except CheckpointCorrupt:
        return None


def _finish(io: FileIo, directory: Path, generations: Path, layout: Layout, last: int) -> None:
    """Put the last generation in place if its writer did not get so far: there was a record, so all of it is there."""
    replaced = {
        layout.files[int(match[1])].name: path.name
        for path in generations.glob(f"{last:08d}.*.new")
        if (match := _NEW.fullmatch(path.name)) and int(match[1]) < len(layout.files)
    }
    redo = (generations / f"{last:08d}.redo").exists()
    if not redo and not replaced:
        return
    history = History(io, generations, [])
    unfinished = replace(new_commit(layout, "", last, last, "sync", 0), replaced=replaced)
    try:
        apply_again(io, directory, history, layout, unfinished)
    except CheckpointCorrupt as error:
        logger.warning(
            "generation %d was not completely in the files and can't be put there (%s): they may hold blocks of two "
            "generations",
            last,
            error.message,
        )
