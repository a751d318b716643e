"""The time between the pause and the disk: changed blocks are copied, training goes on, nothing is written yet."""

import contextlib
import time
from typing import TYPE_CHECKING

from hogwild.checkpoint.durable import explained
from hogwild.checkpoint.records import Commit
from hogwild.checkpoint.reports import SyncReport
from hogwild.checkpoint.stage import Stage
from hogwild.checkpoint.transaction import Written
from hogwild.errors import Conflict

if TYPE_CHECKING:
    from hogwild.checkpoint.store import CheckpointStore


class PendingSync:
    """Changed blocks, copied; training may go on. `commit` or `abandon` it."""

    def __init__(self, store: "CheckpointStore", stage: Stage, commit: Commit, started: float) -> None:
        self._store, self._stage, self._commit = store, stage, commit
        self._started = started
        self.blocks_changed = stage.blocks
        self.bytes_changed = stage.nbytes
        self.pause_seconds = time.perf_counter() - started

    def commit(self) -> SyncReport:
        """Write the generation; may run beside training, in another thread.

        When it fails (disk full, files changed by somebody else) the checkpoint is the
        generation before, whole, and the changes are still in the live weights: begin another sync.
        """
        store, stage = self._store, self._stage
        with store._mutex:
            if store._pending is not self:
                raise Conflict("this sync was committed or abandoned already.")
            try:
                done = Written(store.head, 0, durable=time.perf_counter(), applied=True)
                if stage.frames:
                    with explained("the sync", store.directory, kept=lambda: store._history.still()):
                        done = store._write(stage, self._commit)
                return SyncReport(
                    generation=done.commit.generation,
                    weight_version=self._commit.weight_version,
                    jobs=self._commit.jobs,
                    blocks_changed=self.blocks_changed,
                    blocks_total=store.layout.blocks,
                    bytes_changed=self.bytes_changed,
                    bytes_written=done.bytes,
                    undo_bytes=done.commit.undo_bytes if stage.frames else 0,
                    seconds=time.perf_counter() - self._started,
                    pause_seconds=self.pause_seconds,
                    durable_seconds=done.durable - self._started,
                    applied=done.applied,
                )
            finally:
                self._close()

    def abandon(self) -> None:
        """Forget it; the next sync finds the same changes again."""
        with self._store._mutex:
            if self._store._pending is self:
                self._close()

    def _close(self) -> None:
        self._store._pending = None
        with contextlib.suppress(OSError):
            self._stage.close()
