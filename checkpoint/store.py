"""The checkpoint store: live weights to disk, block by block, and back again.

    store = CheckpointStore.open(directory, source=model)     # clones the model the first time, repairs a torn sync
    pending = store.begin_sync(views, weight_version=7)       # training pauses for this
    report = pending.commit()                                 # ... and goes on beside this
    store.compact()                                           # ... and beside this, which is for the disk's space only
    store.rollback(3, views, weight_version=8)

One writer at a time (a lock on the directory). Methods may be called from several threads; a sync that was begun must
be committed or abandoned before the next one. docs/checkpoint-format.md has every byte of what is on disk.
"""

import contextlib
import functools
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from hogwild.checkpoint import export as exporting
from hogwild.checkpoint.blockfile import compare_files, file_table
from hogwild.checkpoint.clone import check_beginning, clone, make_folders, refuse_links
from hogwild.checkpoint.compact import compact
from hogwild.checkpoint.constants import CLONING_MARK, GENERATIONS_DIR, READERS_LOCK, STORE_DIR, WRITER_LOCK
from hogwild.checkpoint.durable import OS_IO, FileIo, FileLock, explained
from hogwild.checkpoint.filesystem import FileSystem
from hogwild.checkpoint.fingerprints import Table, differing, table_digest
from hogwild.checkpoint.history import History
from hogwild.checkpoint.known import KnownFiles, stamps_of
from hogwild.checkpoint.layout import Layout
from hogwild.checkpoint.memo import FingerprintMemo
from hogwild.checkpoint.pending import PendingSync
from hogwild.checkpoint.readers import READER_PATIENCE, ReadersLock
from hogwild.checkpoint.records import Commit, Kind, new_commit
from hogwild.checkpoint.reports import RestoreReport, RollbackReport, SyncReport, VerifyReport
from hogwild.checkpoint.salvage import begin_anew, damage_explained
from hogwild.checkpoint.snapshot import Snapshot, stage_difference
from hogwild.checkpoint.source import SourceModel, contents
from hogwild.checkpoint.stage import Arena, Stage, available_memory
from hogwild.checkpoint.transaction import Written, apply, apply_again, write_logs
from hogwild.errors import (
    CheckpointCorrupt,
    CheckpointError,
    CheckpointForeign,
    CheckpointInUse,
    CheckpointOtherModel,
    Conflict,
    NotFound,
)

if TYPE_CHECKING:
    from hogwild.checkpoint.views import Views

logger = logging.getLogger(__name__)


class CheckpointStore:
    """A Hugging Face model directory that follows live weights, generation by generation. Use `open`."""

    def __init__(
        self, directory: Path, *, keep_last: int, io: FileIo, host_budget: int, reader_patience: float, read_only: bool
    ) -> None:
        self.directory = directory
        self.keep_last = keep_last
        self.read_only = read_only
        self._io = io
        self._store = directory / STORE_DIR
        self._generations = self._store / GENERATIONS_DIR
        self._writer = FileLock(self._store / WRITER_LOCK)
        self._readers = ReadersLock(self._store / READERS_LOCK, reader_patience)
        self._arena = Arena(host_budget)
        self._memo = FingerprintMemo()
        self._known = KnownFiles()
        self._disk: FileSystem
        self._mutex = threading.RLock()
        self._history_lock = threading.RLock()  # taken after the mutex: whoever changes files or makes undo data
        self._closing = False
        self._pending: PendingSync | None = None
        self._stale = False  # something failed half-way: read everything from disk again before the next step
        self._foreign = ""  # why the files are not ours any more
        self.lost: tuple[int, ...] = ()  # generations that `open` gave up because none could be proved
        self.layout: Layout
        self._table: Table
        self._history: History

    # --- opening ------------------------------------------------------------------------------------------------------

    @classmethod
    def open(
        cls,
        directory: Path | str,
        *,
        source: Path | str | None = None,
        same_source: bool = True,
        keep_last: int = 8,
        read_only: bool = False,
        start_anew: bool = False,
        host_budget: int | None = None,
        reader_patience: float = READER_PATIENCE,
        io: FileIo = OS_IO,
    ) -> "CheckpointStore":
        """Open the checkpoint in `directory`; a sync that was cut short is finished or taken back first.

        Args:
            source: model to clone when the directory is empty; the same directory, or None: work in place.
            same_source: refuse a checkpoint that began with another model than `source`; False: the caller compares the
                weights.
            keep_last: earlier generations that can be rolled back to; those before are forgotten.
            read_only: list, verify and export only, of everything that is kept; works beside a running worker.
            start_anew: where the records are so damaged that no generation can be proved, make the files as they are a
                new one (`lost` then names those before) instead of raising.
            host_budget: bytes of host memory for changed blocks, default half of what is free now; what is beyond goes
                to a spill file during the pause.
            reader_patience: seconds a sync waits for `export` and other readers.

        Raises CheckpointLayout (no safetensors model there), CheckpointInUse, CheckpointOtherModel, CheckpointCorrupt,
        CheckpointError (not writable, disk full).
        """
        if keep_last < 1:
            raise CheckpointError(f"keep_last is {keep_last}: at least one earlier generation has to be kept.")
        directory = Path(directory)
        store = cls(
            directory,
            keep_last=keep_last,
            io=io,
            host_budget=available_memory() // 2 if host_budget is None else host_budget,
            reader_patience=reader_patience,
            read_only=read_only,
        )
        place = None if source is None or Path(source).resolve() == directory.resolve() else Path(source)
        if read_only:
            store._load_read_only()
            if place is not None and same_source:
                with explained(f"reading {place}", place, kept=lambda: "Nothing was changed."):
                    store._check_source(place)
            return store
        if not History.exists(store._generations):
            check_beginning(directory, place)
        try:
            with explained(f"opening the checkpoint {directory}", directory, kept=lambda: "Nothing was changed."):
                store._prepare()
            with explained(f"opening the checkpoint {directory}", directory, kept=lambda: "No generation was lost."):
                first = not History.exists(store._generations)
                if first:
                    model = SourceModel.of(place or directory)
                    if place is not None:
                        clone(io, place, directory)
                    store._first_generation(model)
                try:
                    with damage_explained():
                        store._recover()
                except CheckpointCorrupt as error:
                    if not start_anew:
                        raise
                    store._start_anew(error)
                if place is not None and same_source and not first:
                    store._check_source(place)
                store._prune()
            try:
                store.compact()
            except (CheckpointError, CheckpointForeign) as error:  # no space, for example: the next sync needs it
                logger.warning("undo data of generation %d is not made yet: %s", store.head.generation, error.message)
        except BaseException:
            store.close()
            raise
        return store

    def _prepare(self) -> None:
        """Folders and the writer's lock."""
        make_folders(self._io, self.directory)
        if self._generations.stat().st_dev != self.directory.stat().st_dev:
            raise CheckpointError(
                f"{self._generations} is on another file system than {self.directory}, and files can't be renamed from "
                f"one to the other. Move {self._store} to where the model is."
            )
        if not self._writer.acquire():
            raise CheckpointInUse(
                f"{self.directory} is kept by another process ({self._writer.read_note()}): stop it, or use its API."
            )
        self._writer.note(f"pid {os.getpid()}")

    def _first_generation(self, model: SourceModel) -> None:
        """Generation 0: the files as they are now, which come from `model`."""
        self.layout = Layout.read(self.directory)
        refuse_links(self.directory, self.layout)
        stamps = stamps_of(self.directory, self.layout)
        table = file_table(self._io, self.directory, self.layout)
        self._known.keep_all(self.layout, stamps)
        digest = table_digest(table)
        replace(model, contents=digest).write(self._io, self._store)
        self._history = History(self._io, self._generations, [])
        self._history.add(new_commit(self.layout, digest, 0, 0, "clone", 0), np.arange(len(table)), table)

    def _check_source(self, place: Path) -> None:
        """Raise CheckpointOtherModel unless the model in `place` is the one that this began with, or a copy of it.

        A model that is gone can't be another one. A checkpoint of an earlier version has no record: any model will do,
        and is recorded if it is the right one.
        """
        if not place.exists():
            return
        model, known = SourceModel.of(place), SourceModel.read(self._store)
        if known and model.untouched_since(known):
            return
        others = model.other_files(known) if known else list(self.head.other_headers(Layout.read(place)))
        if not others:
            base = known.contents if known else self.head.base_model
            found = contents(self._io, place)
            if found == base:
                if not self.read_only:
                    replace(model, contents=found).write(self._io, self._store)
                return
            if found == self.head.fingerprints:
                return
            others = sorted(model.files)
        if known:
            raise CheckpointOtherModel(
                f"{self.directory} was cloned from {known.path}, and {place} is another model ({', '.join(others)}). "
                "For another model under the same name choose another directory (HOGWILD_CHECKPOINT_DIR); to go on "
                f"with the checkpoint, name {self.directory} as the model.",
                files=others,
            )
        logger.warning("%s may have begun with another model than %s: nothing says which", self.directory, place)

    def _recover(self, patience: float = math.inf) -> None:
        """Read the generations; put the last one's contents in place if they are not; remove what was not committed."""
        # Names that a killed writer left need not be durable yet, and what follows builds on them.
        self._io.fsync_dir(self._generations)
        self._io.fsync_dir(self.directory)
        self._history = History.read(self._io, self._generations)
        head = self._history.head
        self._history.remove_uncommitted()
        self.layout = Layout.read(self.directory)
        self._foreign = ""
        if head.other_headers(self.layout):
            self._foreign = f"the tensors in {self.directory} are not those of generation {head.generation}"
        else:
            self._apply_pending(head, patience)
        refuse_links(self.directory, self.layout, hard=False)
        self._table = self._history.table(head.generation)
        self._disk = FileSystem(self._io, self._store, self.directory / self.layout.files[0].name)
        self._io.unlink(self._store / CLONING_MARK)
        self._stale = False

    def _start_anew(self, error: CheckpointCorrupt) -> None:
        """The files as they are become a generation that rests on none before it."""
        with self._readers.alone() as alone:
            if not alone:
                raise CheckpointError(f"{self.directory} is being read: try again when the reader is done.")
            logger.warning("%s", error.message)
            self.lost = begin_anew(self._io, self.directory, self._generations)
        self._recover()

    def _apply_pending(self, head: Commit, patience: float = math.inf) -> None:
        """Bring a committed generation into the files, from its redo file and new files."""
        if not self._history.unapplied(head):
            return
        with self._readers.alone(patience) as alone:
            if not alone:
                raise CheckpointError(
                    f"{self.directory} is being read (an export?), and the last sync has to be "
                    "finished first: try again when the reader is done."
                )
            apply_again(self._io, self.directory, self._history, self.layout, head)

    def _prune(self) -> None:
        """Forget generations that are too many, before anything needs their space; not under a reader's hands."""
        with self._readers.alone(0) as alone:
            if alone:
                self._history.prune(self.keep_last)

    def _load_read_only(self) -> None:
        """What a reader knows of the generations; a writer may be forgetting old ones meanwhile."""
        with explained(f"reading the checkpoint {self.directory}", self.directory, kept=lambda: "Nothing was changed."):
            try:
                self._load()
            except FileNotFoundError:
                self._load()

    def _load(self) -> None:
        if not History.exists(self._generations):
            raise NotFound(f"{self.directory} is no checkpoint of Hogwild's (it has no {STORE_DIR}/{GENERATIONS_DIR}).")
        with damage_explained():
            self._history = History.read(self._io, self._generations)
            self.layout = Layout.read(self.directory)
            self._table = self._history.table(self._history.head.generation)

    def close(self) -> None:
        """Give the directory up; a sync that was begun is abandoned, undo data half made is left for the next open."""
        self._closing = True
        with self._mutex, self._history_lock:
            if self._pending is not None:
                self._pending.abandon()
            self._writer.release()

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- what there is ------------------------------------------------------------------------------------------------

    @property
    def head(self) -> Commit:
        """The last generation: what the files hold."""
        return self._history.head

    def generations(self) -> list[Commit]:
        """The last generation and those that can be rolled back to, oldest first."""
        return self._history.kept(sys.maxsize if self.read_only else self.keep_last)

    def _kept(self, generation: int) -> Commit:
        kept = {commit.generation: commit for commit in self.generations()}
        if generation not in kept:
            text = f"there is no generation {generation}: kept are {min(kept)} to {max(kept)}."
            raise NotFound(text, generation=generation)
        return kept[generation]

    # --- live weights → disk ------------------------------------------------------------------------------------------

    def prepare(self, views: "Views") -> None:
        """Check the views against the files and get the staging memory, so that the first sync's pause is short too."""
        from hogwild.checkpoint import views as live

        live.check_views(self.layout, views)
        self._pin_memory(views)
        self._arena.reserve(sum(self.layout.by_name[name].nbytes for name in views))
        if on_device := {name: view for name, view in views.items() if view.device.type == "cuda"}:
            from hogwild.checkpoint import device

            device.reserve(on_device, self._arena)

    def _pin_memory(self, views: "Views") -> None:
        """Staging memory that a GPU copies into, unless there is some already."""
        if any(view.device.type == "cuda" for view in views.values()) and not self._arena.allocated:
            from hogwild.checkpoint import device

            self._arena.allocate = device.pinned

    def begin_sync(self, views: "Views", *, weight_version: int, jobs: Iterable[str] = ()) -> "PendingSync":
        """Fingerprint the live weights and copy what changed: nobody may write to them until this returns.

        Raises CheckpointLayout (views that do not fit), CheckpointForeign (the files are not ours any more), Conflict
        (another sync is under way).
        """
        from hogwild.checkpoint import views as live

        started = time.perf_counter()
        with self._mutex:
            self._ready()
            live.check_views(self.layout, views)
            self._pin_memory(views)
            stage = self._new_stage()
            try:
                with explained("the sync", self.directory, kept=lambda: self._history.still()):
                    live.stage_changed(self.layout, views, self._table, stage, self._memo)
            except BaseException:
                stage.close()
                raise
            pending = PendingSync(self, stage, replace(self._next("sync", weight_version), jobs=tuple(jobs)), started)
            self._pending = pending
            return pending

    def sync(self, views: "Views", *, weight_version: int, jobs: Iterable[str] = ()) -> SyncReport:
        """`begin_sync` and `commit` in one."""
        return self.begin_sync(views, weight_version=weight_version, jobs=jobs).commit()

    @property
    def unfinished(self) -> bool:
        """Whether the last generation is durable but not in the files: a reader, or an error, was in the way."""
        return self._history.unapplied(self.head)

    def finish(self) -> bool:
        """Bring the last generation into the files if it is not there; False: a reader of them is still in the way.

        May run beside training. Raises CheckpointError (disk full; nothing is lost), CheckpointForeign.
        """
        with self._mutex, self._history_lock:
            self._check_writer()
            if not self.unfinished:
                return True
            with self._readers.alone(0) as alone:
                if not alone:
                    return False
                self._finish_last()
                self._history.prune(self.keep_last)
            return True

    def compact(self) -> int:
        """Make undo data of the old files that the last sync left, and remove those; bytes written, 0: nothing to do.

        May run beside training and beside `begin_sync`; a `commit` waits for it, and does it if nobody else did. Until
        then a sync that replaced files takes as much space as they do. `close` ends it half-way, and the next open does
        it. Raises CheckpointError (disk full; nothing is lost), CheckpointForeign.
        """
        with self._history_lock:
            if self.read_only or self._stale or not self._writer.held:
                return 0
            with explained("making undo data", self.directory, kept=lambda: "No generation was lost."):
                try:
                    return self._compact()
                except CheckpointError:
                    if self._closing:
                        return 0
                    raise

    def _compact(self) -> int:
        head = self.head
        if not self._history.uncompacted(head) or self._history.unapplied(head) or self._foreign:
            return 0

        def check() -> None:
            if self._closing:
                raise CheckpointError(f"{self.directory} was closed while undo data was made: the next open makes it.")

        return compact(self._io, self.directory, self._history, self.layout, head, check)

    def _next(self, kind: Kind, weight_version: int) -> Commit:
        """The record of the generation after the head, before its contents are known."""
        head = self.head
        return new_commit(self.layout, head.fingerprints, head.generation + 1, head.generation, kind, weight_version)

    def _new_stage(self) -> Stage:
        return Stage(self._arena, self._io, self._generations / "stage.spill")

    def _ready(self) -> None:
        """Raise unless a new generation can be begun."""
        self._check_writer()
        if self._pending is not None:
            raise Conflict("another sync or rollback of this checkpoint is under way.")
        self._finish_last(patience=0)  # training is paused: no waiting for readers

    def _check_writer(self) -> None:
        if self.read_only:
            raise CheckpointError(f"{self.directory} was opened for reading only.")
        if not self._writer.held:
            raise CheckpointError(f"{self.directory} was closed.")

    def _finish_last(self, patience: float = math.inf) -> None:
        """Bring the last generation into the files if it is not there yet; raises CheckpointForeign."""
        with explained("repairing the checkpoint", self.directory, kept=lambda: "No generation was lost."):
            if self._stale:
                self._recover(patience)
            if not self._foreign:
                self._apply_pending(self.head, patience)
        if self._foreign:
            raise CheckpointForeign(f"{self._foreign}: `hogwild checkpoint adopt` accepts the files as they are.")

    def _write(self, stage: Stage, commit: Commit) -> Written:
        """Make a generation of what is staged."""
        with self._history_lock:
            self._compact()
            return self._write_alone(stage, commit)

    def _write_alone(self, stage: Stage, commit: Commit) -> Written:
        blocks = np.concatenate([frame.spec.first_block + frame.blocks for frame in stage.frames])
        rows = np.concatenate([frame.table for frame in stage.frames])
        before = self._table[blocks]
        self._stale = True  # until the end: whatever fails in between, the disk is asked what happened
        try:
            logs = write_logs(
                self._io, self.directory, self._generations, self.layout, self._table, stage, self._known,
                generation=commit.generation, parent=commit.parent, disk=self._disk,
            )  # fmt: skip
            self._table[blocks] = rows  # no copy of it all: fresh memory of that size can cost as much as all the rest
            commit = replace(
                commit, blocks_changed=stage.blocks, bytes_changed=stage.nbytes, undo_bytes=logs.undo_bytes,
                redo=logs.redo, replaced=logs.replaced, deferred=logs.deferred, fingerprints=table_digest(self._table),
                base_model=self.head.base_model,
            )  # fmt: skip
            written = logs.bytes_written + self._history.add(commit, blocks, self._table)
        except BaseException:
            self._table[blocks] = before
            if not self._history.path(commit.generation, "commit").exists():
                with contextlib.suppress(OSError):
                    self._history.remove_uncommitted()
                    self._stale = False
            raise
        done = Written(commit, written, durable=time.perf_counter())
        with self._readers.alone() as alone:
            if alone:
                frames = (
                    (frame.spec, frame.blocks, functools.partial(stage.read, frame))
                    for frame in stage.frames
                    if frame.spec.file not in logs.replaced
                )
                done.bytes += apply(self._io, self.directory, self._generations, commit, frames)
                self._io.unlink(self._history.path(commit.generation, "redo"))
                done.applied = True
                self._known.note_written(self.directory, self.layout, stage.frames, logs.known)
                self._history.prune(self.keep_last)  # while nobody reads an old generation
        self._stale = False
        return done

    # --- disk → live weights ------------------------------------------------------------------------------------------

    def live_digest(self, views: "Views") -> str:
        """Names the contents of the live weights as `Commit.fingerprints` and `Commit.base_model` name a generation's.

        Tensors without a view count as they are on disk: they are never trained.
        """
        from hogwild.checkpoint import views as live

        with self._mutex:
            self._check_headers()
            live.check_views(self.layout, views)
            table = self._table.copy()
            for spec in self.layout.tensors:
                if (view := views.get(spec.name)) is not None:
                    table[spec.first_block : spec.first_block + spec.blocks] = live.view_fingerprints(spec, view)
            return table_digest(table)

    def restore(self, views: "Views", *, writing: Callable[[], None] = lambda: None) -> RestoreReport:
        """Make the live weights equal to the last generation, in place; nobody may write to them meanwhile.

        `writing` is called before the first byte is written: from then until this returns they are no generation's.
        Raises CheckpointError (a reader keeps the last generation out of the files), CheckpointForeign.
        """
        from hogwild.checkpoint.compare import restore_live

        started = time.perf_counter()
        with self._mutex, self._history_lock:
            self._check_writer()
            self._finish_last()
            self._check_headers()
            blocks, names = restore_live(self._io, self.directory, self.layout, self._table, views, writing)
            return RestoreReport(
                generation=self.head.generation,
                blocks_changed=blocks,
                tensors=tuple(names),
                seconds=time.perf_counter() - started,
            )

    def rollback(
        self,
        generation: int,
        views: "Views | None" = None,
        *,
        weight_version: int | None = None,
        jobs: Iterable[str] = (),
        writing: Callable[[], None] = lambda: None,
    ) -> RollbackReport:
        """Make a new generation with the contents of an earlier one, and bring it into the live weights.

        Nothing is lost by it: the generations in between stay, so a rollback can be rolled back. Training that is not
        synced yet is overwritten in `views`: sync first to keep it. None is made where the last one has those
        contents. `weight_version` of the new one: default, the last one's + 1. `writing`: see `restore`.

        Raises NotFound (not kept), CheckpointForeign, CheckpointCorrupt (undo data damaged; nothing was changed).
        """
        started = time.perf_counter()
        with self._mutex, self._history_lock:
            self._ready()
            self._check_headers()
            self._kept(generation)
            if views is not None:
                from hogwild.checkpoint import views as live

                live.check_views(self.layout, views)
            stage = self._new_stage()
            try:
                version = self.head.weight_version + 1 if weight_version is None else weight_version
                commit = replace(self._next("rollback", version), restores=generation, jobs=tuple(jobs))
                with explained("the rollback", self.directory, kept=lambda: self._history.still()):
                    with self._snapshot(generation) as old:
                        changed = stage_difference(old, self._history.table(generation), self._table, stage)
                    written, blocks = 0, stage.blocks
                    if stage.frames:
                        self._compact()
                        with self._readers.alone() as alone:
                            # Before there is a generation: live weights can't follow one that is not in the files.
                            if not alone:
                                raise CheckpointError(
                                    f"{self.directory} is being read (an export?), and a rollback writes to its files: "
                                    "nothing was changed. Try again when the reader is done."
                                )
                            written = self._write_alone(stage, commit).bytes
            finally:
                stage.close()
            paused = time.perf_counter()
            restored = self.restore(views, writing=writing) if views is not None else None
            ended = time.perf_counter()
            return RollbackReport(
                generation=self.head.generation,
                restored=generation,
                weight_version=self.head.weight_version,
                blocks_changed=blocks,
                live_blocks_changed=restored.blocks_changed if restored else 0,
                tensors=tuple(dict.fromkeys((*changed, *(restored.tensors if restored else ())))),
                bytes_written=written,
                seconds=ended - started,
                pause_seconds=ended - paused,
            )

    # --- checking, exporting, adopting --------------------------------------------------------------------------------

    def verify(self, views: "Views | None" = None) -> VerifyReport:
        """Compare disk, and live weights if given, with the fingerprints of the last generation."""
        started = time.perf_counter()
        with self._mutex, self._still_files() as head:
            headers = head.other_headers(Layout.read(self.directory))
            report = VerifyReport(generation=head.generation, headers=headers, weight_version=head.weight_version)
            if not report.headers:
                stamps = stamps_of(self.directory, self.layout)
                disk = compare_files(self._io, self.directory, self.layout, self._table)
                if not disk:
                    self._known.keep_all(self.layout, stamps)
                report = replace(report, blocks_checked=self.layout.blocks, disk=disk)
            if views is not None and not report.headers:
                report = replace(report, **self._live_report(views))
            return replace(report, seconds=time.perf_counter() - started)

    def verify_live(self, views: "Views", *, weight_version: int) -> VerifyReport:
        """`verify` of the live weights alone, which have that version: nobody may write to them until this returns."""
        started = time.perf_counter()
        with self._mutex:
            self._ready()
            return VerifyReport(
                generation=self.head.generation,
                weight_version=self.head.weight_version,
                live_version=weight_version,
                **self._live_report(views),
                seconds=time.perf_counter() - started,
            )

    def _live_report(self, views: "Views") -> dict[str, Any]:
        from hogwild.checkpoint.compare import compare_live

        checked, wrong = compare_live(self.layout, views, self._table)
        return {"live_blocks_checked": checked, "live": wrong}

    def _check_headers(self) -> None:
        """Raise CheckpointForeign unless tensors and block numbers mean in the files what the last generation says."""
        if others := self.head.other_headers(Layout.read(self.directory)):
            raise CheckpointForeign(
                f"the tensors or the metadata in {', '.join(others)} of {self.directory} are not those of generation "
                f"{self.head.generation}: `hogwild checkpoint adopt` accepts the files as they are.",
                files=list(others),
            )

    @contextlib.contextmanager
    def reading(self) -> Iterator[Commit]:
        """Hold the files still: while this lasts they are exactly the last generation, whoever syncs.

        Raises CheckpointError (the last sync is not finished), CheckpointForeign (the headers are others).
        """
        with self._still_files() as head:
            self._check_headers()
            yield head

    @contextlib.contextmanager
    def _still_files(self) -> Iterator[Commit]:
        with self._readers.shared(self._complete) as complete:
            if not complete:
                raise CheckpointError(
                    f"generation {self.head.generation} of {self.directory} is not completely in its files yet: a sync "
                    "was interrupted. Start the worker, or run `hogwild checkpoint repair`, once."
                )
            yield self.head

    def _complete(self) -> bool:
        """Whether the files hold all of the last generation; a reader looks again which that is."""
        if self.read_only:
            self._load_read_only()
        return not self._history.unapplied(self.head)

    def _snapshot(self, generation: int) -> Snapshot:
        """An earlier generation, for reading."""
        return Snapshot(self._io, self.directory, self._history, self.layout, generation, self.head)

    def export(self, target: Path | str | BinaryIO, generation: int | None = None) -> Commit:
        """Write a generation (default: the last) as a clean model directory, a `.tar` file, or a tar stream.

        The checkpoint's own files are not touched. Raises NotFound, CheckpointError (target not empty, disk full).
        """
        with self._mutex, self.reading() as head:
            commit = self._kept(head.generation if generation is None else generation)
            table = self._history.table(commit.generation)
            with self._snapshot(commit.generation) as snapshot:
                exporting.export(self._io, self.directory, self.layout, snapshot, table, commit, target)
            return commit

    def adopt(self, *, weight_version: int | None = None) -> Commit:
        """Accept the files as they are, as a new generation; when nothing differs, nothing is done.

        Earlier generations are forgotten: their undo data leads back from contents that are not there any more.
        `weight_version`: default, the last one's + 1, because these are other weights.
        """
        with self._mutex, self._history_lock:
            if self._pending is not None:
                raise Conflict("a sync of this checkpoint is under way.")
            if self.read_only:
                raise CheckpointError(f"{self.directory} was opened for reading only.")
            with explained("adopting the files", self.directory, kept=lambda: "No generation was lost."):
                layout = Layout.read(self.directory)
                refuse_links(self.directory, layout, hard=False)
                stamps = stamps_of(self.directory, layout)
                table = file_table(self._io, self.directory, layout)
                head = self.head
                if not head.other_headers(layout) and not len(differing(table, self._table)):
                    return head
                generation = head.generation + 1
                version = head.weight_version + 1 if weight_version is None else weight_version
                commit = new_commit(layout, table_digest(table), generation, generation, "adopt", version)
                self._stale = True
                self._history.add(replace(commit, base_model=head.base_model), np.arange(len(table)), table)
                self._recover()
                self._prune()
                self._known.keep_all(self.layout, stamps)
                return self.head
