"""The generations on disk: which there are, their fingerprints, and how old ones are forgotten."""

import contextlib
import logging
import re
from dataclasses import replace
from pathlib import Path

from hogwild.checkpoint.durable import FileIo
from hogwild.checkpoint.fingerprints import Indices, Table, empty_table, table_digest
from hogwild.checkpoint.records import Commit, Record, read_record, write_record
from hogwild.errors import CheckpointCorrupt

logger = logging.getLogger(__name__)

MOST_RECORDS = 64
"""Records before the oldest kept generation that are left for the sake of its table."""

_NAME = re.compile(r"(\d{8})\.(?:(commit|undo|redo|part)|\d+\.(?:new|old))")


class History:
    """Commit records in ascending order, without their tables: those are read when they are needed."""

    def __init__(self, io: FileIo, generations: Path, commits: list[Commit]) -> None:
        self._io = io
        self._generations = generations
        self._commits = commits

    @staticmethod
    def exists(generations: Path) -> bool:
        """Whether there is any generation."""
        return any(generations.glob("????????.commit"))

    @classmethod
    def read(cls, io: FileIo, generations: Path) -> "History":
        """Read the records, the newest first; raises CheckpointCorrupt when the last generation can't be proved.

        A damaged record that the newer ones do not need ends the history, with a warning. So do records before the
        first full table: a prune that was cut short has left them behind.
        """
        commits: list[Commit] = []  # from the newest on
        proved = 0  # so many of them have a full table at or before them
        for path in sorted(generations.glob("????????.commit"), reverse=True):
            try:
                record = read_record(path)
            except CheckpointCorrupt as error:
                if not proved:
                    raise
                logger.warning("older generations can't be rolled back to any more: %s", error.message)
                break
            commits.append(record.commit)
            if record.blocks is None:
                proved = len(commits)
        if not proved:
            raise CheckpointCorrupt(f"{generations} has no full table of fingerprints.")
        return cls(io, generations, commits[:proved][::-1])

    def path(self, generation: int, kind: str) -> Path:
        """`<generation>.<kind>`."""
        return self._generations / f"{generation:08d}.{kind}"

    @property
    def head(self) -> Commit:
        """The newest."""
        return self._commits[-1]

    def kept(self, keep_last: int) -> list[Commit]:
        """The newest and up to `keep_last` before it that undo files lead back to, oldest first."""
        kept = [self.head]
        for commit in reversed(self._commits[:-1]):
            newer = kept[-1]
            known = self.path(newer.generation, "undo").exists() or self.uncompacted(newer)
            if len(kept) > keep_last or newer.parent != commit.generation or not known:
                break
            kept.append(commit)
        return [self._with_undo(commit) for commit in reversed(kept)]

    def _with_undo(self, commit: Commit) -> Commit:
        """A commit with the size of its undo file, which may be younger than the record."""
        with contextlib.suppress(OSError):
            return replace(commit, undo_bytes=self.path(commit.generation, "undo").stat().st_size)
        return commit

    def still(self) -> str:
        """What is said of the checkpoint when something failed."""
        head = self.head.generation
        if self.path(head + 1, "commit").exists():
            return f"Whether generation {head + 1} is safe is not known: the next sync or start finishes what is there."
        if self.unapplied(self.head):
            return f"Generation {head} is safe; its files are brought up to it by the next sync or start."
        return f"The checkpoint is still generation {head}, whole; the next sync writes what this one could not."

    def add(self, commit: Commit, blocks: Indices, table: Table) -> int:
        """Write the record that makes a generation exist; bytes written. `blocks`: those that changed."""
        # The full table is smaller where numbers (4 bytes) and fingerprints (16 bytes) of the changed blocks exceed it.
        full = len(blocks) * 20 >= len(table) * 16
        record = Record(commit, None, table) if full else Record(commit, blocks, table[blocks])
        written = write_record(self._io, self.path(commit.generation, "commit"), record)
        self._commits.append(commit)
        return written

    def table(self, generation: int) -> Table:
        """Fingerprints of all blocks in a generation; raises CheckpointCorrupt when they can't be proved."""
        later: list[Record] = []
        wanted = next((commit for commit in self._commits if commit.generation == generation), None)
        if wanted is None:
            raise CheckpointCorrupt(f"there is no record of generation {generation} that can be read.")
        for commit in reversed([commit for commit in self._commits if commit.generation <= generation]):
            record = read_record(self.path(commit.generation, "commit"))
            if record.blocks is None:
                table = empty_table(len(record.table))
                table[:] = record.table
                for change in reversed(later):
                    if change.blocks is not None:
                        table[change.blocks] = change.table
                if table_digest(table) != wanted.fingerprints:
                    raise CheckpointCorrupt(f"the fingerprints of generation {generation} do not match their digest.")
                return table
            later.append(record)
        raise CheckpointCorrupt(f"no full table of fingerprints leads to generation {generation}.")

    def unapplied(self, commit: Commit) -> bool:
        """Whether a generation's contents are not all in the files yet."""
        return (commit.redo and self.path(commit.generation, "redo").exists()) or any(
            (self._generations / temp).exists() for temp in commit.replaced.values()
        )

    def uncompacted(self, commit: Commit) -> bool:
        """Whether a generation's undo file is still to be made, or what it was made of to be removed."""
        return bool(commit.deferred) and self.path(commit.generation, "part").exists()

    def remove_uncommitted(self) -> None:
        """Remove files of generations that never came to be, and what finished ones need no more."""
        head, finished = self.head.generation, not self.uncompacted(self.head)
        for path in self._generations.iterdir():
            match = _NAME.fullmatch(path.name)
            if match is None:
                leftover = path.suffix in (".tmp", ".spill")
            elif int(match[1]) == head:
                leftover = path.suffix == ".old" and finished
            else:
                leftover = int(match[1]) > head or match[2] not in ("commit", "undo")
            if leftover:
                self._io.unlink(path)

    def prune(self, keep_last: int) -> None:
        """Forget what `keep_last` does not keep. Disk space only: a failure is no reason to fail a sync."""
        with contextlib.suppress(OSError):
            self.remove_uncommitted()
            oldest = self.kept(keep_last)[0]
            for path in self._generations.glob("????????.undo"):
                if int(path.name[:8]) <= oldest.generation:
                    self._io.unlink(path)
            self._consolidate(oldest)

    def _consolidate(self, oldest: Commit) -> None:
        """Give the oldest kept generation a full table once the older records take half as much, and remove those.

        With a limit of MOST_RECORDS besides: opening a checkpoint reads all of them.
        """
        older = [commit for commit in self._commits if commit.generation <= oldest.generation]
        tables = older[1:]
        if read_record(self.path(oldest.generation, "commit")).blocks is not None:
            small = sum(20 * commit.blocks_changed for commit in tables) < 8 * oldest.blocks_total
            if small and len(tables) < MOST_RECORDS:
                return
            record = Record(oldest, None, self.table(oldest.generation))
            write_record(self._io, self.path(oldest.generation, "commit"), record)
        for path in self._generations.glob("????????.commit"):  # damaged ones too
            if int(path.name[:8]) < oldest.generation:
                self._io.unlink(path)
        self._commits = self._commits[len(older) - 1 :]
