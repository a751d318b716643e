"""Syncs and rollbacks: what the worker does with the checkpoint store, and when.

A sync pauses training only for `begin_sync` (fingerprints and the copy of changed blocks) and a small optimizer state;
the commit runs on a thread of its own beside the next steps, and so does making undo data of what it replaced. Redis is
told of both on a third thread: while it is away the disk is not, and the next commit, or the last one, goes on. The
caller of every public method holds the runtime's `weights_lock`.
"""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hogwild.checkpoint.records import Commit
from hogwild.checkpoint.reports import RollbackReport, SyncReport
from hogwild.checkpoint.store import CheckpointStore
from hogwild.config import Settings
from hogwild.errors import AttachRefused, CheckpointError, HogwildError
from hogwild.gpu_worker.config import TrainConfig
from hogwild.gpu_worker.engine import Trainer
from hogwild.tasks.dirty import Dirty
from hogwild.tasks.metrics import SyncFigures, record_failed_sync, record_sync, record_undo
from hogwild.tasks.operations import Operation, Operations
from hogwild.tasks.optimizer_states import OptimizerStates
from hogwild.tasks.registry import Registry

if TYPE_CHECKING:
    from hogwild.gpu_worker.attach import Attachment

logger = logging.getLogger(__name__)

BACKOFF_S = (5.0, 600.0)  # first and longest pause after a sync that failed
LAST_CHANCE_S = (0.5, 5.0)  # the same where there is no later: a reader ends, somebody makes room on the disk
DOUBLINGS = 16  # more would change nothing, and a thousand of them are no float any more
NOT_TRAINED = ("adopt", "rollback")  # kinds of generations that are made of something else than the live weights


def _figures(report: SyncReport | RollbackReport, undo_bytes: int) -> SyncFigures:
    return SyncFigures(
        bytes_written=report.bytes_written,
        seconds=report.seconds,
        pause_seconds=report.pause_seconds,
        undo_bytes=undo_bytes,
        blocks_changed=report.blocks_changed,
    )


class Saver:
    """The checkpoint of one served model, and the optimizer's state beside it.

    `last` and `error` are the newest report and the newest failure, for the status. `restored` is called when a sync
    has finished a rollback that did not get as far as the live weights.
    """

    def __init__(
        self, settings: Settings, *, store: CheckpointStore, dirty: Dirty, operations: Operations, registry: Registry
    ) -> None:
        self.store = store
        self.optimizer_states = OptimizerStates(settings)
        self.last: dict[str, Any] | None = None
        self.error: dict[str, Any] | None = None
        self.restored: Callable[[], object] = lambda: None
        self._settings = settings
        self._dirty = dirty
        self._operations = operations
        self._registry = registry
        self._committer = ThreadPoolExecutor(1, thread_name_prefix="hogwild-commit")
        self._commit: Future[Any] | None = None
        self._reporter = ThreadPoolExecutor(1, thread_name_prefix="hogwild-report")
        self._report: Future[None] | None = None  # of the last sync or verification
        self._failures = 0
        self._not_before = 0.0
        self._jobs: list[str] = []  # whose steps no generation holds yet
        self._equal = (0, 0)  # (generation, weight version) that were found to have the same contents

    @classmethod
    def open(
        cls, settings: Settings, model_path: Path, *, dirty: Dirty, operations: Operations, registry: Registry
    ) -> "Saver":
        """Open the checkpoint directory, cloning the served model into it the first time. Raises CheckpointError.

        Whether a later model is still that one `bring_together` finds out of the live weights, which may be trained.
        """
        store = CheckpointStore.open(
            settings.model_checkpoint_dir, source=model_path, same_source=False, keep_last=settings.keep_last
        )
        return cls(settings, store=store, dirty=dirty, operations=operations, registry=registry)

    def close(self) -> None:
        """Wait for a commit that is under way and give the directory up."""
        self._join()
        self.store.close()
        self._committer.shutdown()
        self._reporter.shutdown()

    def note_job(self, job_id: str) -> None:
        """Steps of this job are in the weights; the next generation names it."""
        if job_id not in self._jobs:
            self._jobs.append(job_id)

    @property
    def saved_version(self) -> int:
        """The weight version that the last generation holds.

        That is the one in its record, or a later one when the steps between changed no block: no generation is made of
        them, and the live weights' version does not go back.
        """
        generation, version = self._equal
        head = self.store.head
        return max(head.weight_version, version) if generation == head.generation else head.weight_version

    # --- attaching ----------------------------------------------------------------------------------------------------

    def bring_together(self, attachment: "Attachment") -> int:
        """Make live weights and checkpoint agree on the version that is served.

        Weights that were trained since vLLM exported them are newer than any generation: they stay, unless a generation
        was made since without the worker (`adopt`, `rollback --offline`): that one is what the user wants then. Fresh
        ones are what vLLM loaded. If that is the checkpoint directory itself, or the model it was cloned from, the head
        generation is put into them where they differ (vLLM read while a sync was being written, or was restarted on the
        original), so that a restart forgets nothing that was saved. The same with weights of which a restore was cut
        short. Anything else is another model: nothing is overwritten.

        Returns the weight version that says which steps the live weights had. Raises AttachRefused, CheckpointError.
        """
        self.store.prepare(attachment.views)
        weights, head = attachment.weights, self.store.head
        if not weights.untouched and not weights.restoring:
            if weights.torn:
                logger.warning(
                    "the last worker died while writing step %d: that step is partly in the weights", weights.begun
                )
                weights.set_version(weights.version)
            trained = weights.version
            if (made := self._made_offline(attachment)) is not None:
                self._follow(attachment, made)
            weights.note_generation(self.store.directory, self.store.head.generation)
            return trained
        ours = weights.restoring or Path(attachment.manifest.model_path).resolve() == self.store.directory.resolve()
        if not ours and self.store.live_digest(attachment.views) not in (head.fingerprints, head.base_model):
            raise AttachRefused(
                f"vLLM serves weights that are neither generation {head.generation} of {self.store.directory} nor the "
                "model that it was cloned from. To train these weights choose another directory "
                f"(HOGWILD_CHECKPOINT_DIR); to go on with the checkpoint, serve it: vllm serve {self.store.directory}"
            )
        blocks = self._restore(attachment)
        if blocks:
            logger.warning(
                "the live weights were older than generation %d: %d blocks brought up to it",
                self.store.head.generation,
                blocks,
            )
        return weights.version

    def _made_offline(self, attachment: "Attachment") -> Commit | None:
        """The last generation that something else than training made since the one that the live weights come from.

        A worker that makes one says so beside the weights before it does, and when they have it.
        """
        since = attachment.weights.generation_in(self.store.directory)
        if since is None:
            return None
        made = [g for g in self.store.generations() if g.generation > since and g.kind in NOT_TRAINED]
        return made[-1] if made else None

    def _follow(self, attachment: "Attachment", made: Commit) -> None:
        """Bring the live weights to a generation that was made without them; what only they hold is saved first.

        Cut short anywhere, it is done again by the next attach, which finds what was saved: the weights come from the
        generation that they came from until all is done.
        """
        store, weights = self.store, attachment.weights
        if store.live_digest(attachment.views) not in {g.fingerprints for g in store.generations()}:
            saved = store.sync(attachment.views, weight_version=weights.version)
            self._count(saved)
            logger.warning("generation %d holds what was live and in no generation", saved.generation)
        if store.head.generation != made.generation:
            version = max(weights.version, store.head.weight_version) + 1
            self._count(store.rollback(made.generation, weight_version=version))
        blocks = self._restore(attachment)
        self._dirty.clear(store.head.generation, weights.version)
        logger.warning(
            "generation %d (%s) was made while no worker ran: %d blocks brought into the live weights",
            made.generation,
            made.kind,
            blocks,
        )
        self._committer.submit(self._make_undo_data)

    def _restore(self, attachment: "Attachment") -> int:
        """The last generation into the live weights, with its version; the number of blocks that differed.

        Ended half-way, by an error or with the process, it leaves a mark beside the weights: who comes next, on
        attaching or with a sync, does it again, and never takes a mixture for something that was trained.
        """
        weights = attachment.weights
        report = self.store.restore(attachment.views, writing=weights.begin_restore)
        weights.note_generation(self.store.directory, report.generation)
        self._equal = report.generation, max(self.saved_version, weights.version)
        weights.restored(self.saved_version)
        return report.blocks_changed

    # --- syncs --------------------------------------------------------------------------------------------------------

    def settle(self, attachment: "Attachment") -> None:
        """Work out anew what is unsaved."""
        self._dirty.settle(attachment.weights.version, self.store.head.generation, self.saved_version)

    @property
    def busy(self) -> bool:
        """A commit runs beside training, and another sync would wait for it; or Redis does not know of its end yet."""
        return self._committing or (self._report is not None and not self._report.done())

    @property
    def _committing(self) -> bool:
        return self._commit is not None and not self._commit.done()

    def sync_if_due(self, attachment: "Attachment", trainer: Trainer, *, wait: bool) -> bool:
        """A sync when the debounce says so. False: it failed, was logged, and is tried again after a pause.

        Whether one is due or not, a generation that a reader kept out of the files gets there when the reader is done.
        Whatever the failure is, a card without memory for the fingerprints among others: a sync that can be repeated
        is no reason for a job to fail.
        """
        if time.monotonic() < self._not_before or self.busy:
            return True
        if self.store.unfinished:
            self._commit = self._committer.submit(self._finish)
            if not wait:
                return True
            self._join()
        due = attachment.weights.restoring or self._dirty.due(
            self._settings.sync_quiet_s, self._settings.sync_max_age_s
        )
        if not due:
            return True
        try:
            self.sync(attachment, trainer, "due", wait=wait)
        except Exception:
            pause = max(0.0, self._not_before - time.monotonic())
            logger.exception("the sync failed; it is tried again in %.0f s", pause)
            return False
        return True

    def sync(
        self,
        attachment: "Attachment",
        trainer: Trainer | None,
        reason: str,
        *,
        wait: bool = True,
        operation: Operation | None = None,
    ) -> None:
        """Write a generation if anything changed.

        `wait`: until it is on disk and Redis was told; otherwise the caller goes on after the pause, and `operation` is
        finished later. A failure is noted (status, operation) and raised: CheckpointError, OSError, and where memory is
        short what torch and Python raise then.
        """
        self._join()
        if attachment.weights.restoring:  # a rollback did not get as far as the live weights
            try:
                self._restore(attachment)
                self.restored()
                saved = attachment.weights.version, self.store.head.generation, self.saved_version
                # At once, or it would take the mark of a later step with it; a last sync has none after it.
                self._tell(lambda: self._dirty.settle(*saved), wait=trainer is not None)
                self._failures, self._not_before, self.error = 0, 0.0, None
            except BaseException as error:
                self._failed(error, [], operation, wait=wait)
                raise
        version = attachment.weights.version
        if self.saved_version == version and operation is None:
            self._tell_saved(version, wait=wait)
            self._finish()
            return
        jobs, self._jobs = self._jobs, []
        pending = None
        try:
            torch.cuda.empty_cache()  # fingerprints need room on the card, and training keeps what it ever had
            pending = self.store.begin_sync(attachment.views, weight_version=version, jobs=jobs)
            outdated = self.optimizer_states.save(trainer, version, all_sizes=wait)
        except BaseException as error:
            if pending is not None:
                pending.abandon()  # or no other sync could begin
            self._failed(error, jobs, operation, wait=wait)
            raise

        def commit() -> None:
            try:
                report = pending.commit()
                attachment.weights.note_generation(self.store.directory, report.generation)
                for path in outdated:
                    path.unlink(missing_ok=True)
            except BaseException as error:
                self._failed(error, jobs, operation, wait=wait)
                raise
            if not report.blocks_changed:
                self._equal = report.generation, version
            self._failures, self._not_before, self.error = 0, 0.0, None
            self.last = last = {**asdict(report), "reason": reason, "at": time.time()}
            logger.info(
                "generation %d (%s): %d of %d blocks, %.1f MB in %.2f s, training paused for %.2f s",
                report.generation,
                reason,
                report.blocks_changed,
                report.blocks_total,
                report.bytes_written / 1e6,
                report.seconds,
                report.pause_seconds,
            )
            figures = _figures(report, report.undo_bytes)
            checkpoint = self._described()

            def tell() -> None:
                self._dirty.clear(report.generation, version)
                record_sync(self._dirty.client, self._settings.model_name, figures)
                self._registry.publish_checkpoint(checkpoint)
                if operation is not None:
                    self._operations.finish(operation, last)

            self._report = self._tell(tell, wait=wait)
            self._committer.submit(self._make_undo_data)

        def commit_beside() -> None:
            try:
                commit()
            except Exception:
                logger.exception("the sync failed; the checkpoint is generation %d", self.store.head.generation)
                raise

        if wait:
            commit()
        else:
            self._commit = self._committer.submit(commit_beside)

    def last_chance(
        self, attachment: "Attachment", trainer: Trainer, reason: str, *, until: float, failed: Callable[[], None]
    ) -> bool:
        """Try to get the live weights into a generation until `until` (`time.monotonic()`); whether they are in one.

        Their memory may go when this returns: a commit that is still running has copied what it writes. A failure is
        logged, `failed` is called, and the next try comes after a short pause. The optimizer's state follows the
        weights, where time is left for it.
        """
        pause, longest = LAST_CHANCE_S
        while True:
            try:
                saved = self._try_last(attachment, reason, until)
            except Exception:
                logger.exception("%s: the sync failed", reason)
                saved = False
            if saved:
                break
            failed()
            left = until - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(pause, left))
            pause = min(longest, 2 * pause)
        self.optimizer_states.save_last(trainer, attachment.weights.version, until)
        return True

    def _try_last(self, attachment: "Attachment", reason: str, until: float) -> bool:
        weights = attachment.weights

        def durable() -> bool:
            return not weights.restoring and self.store.head.weight_version == weights.version

        if not self._finished(until, durable):
            return False
        if durable():
            return True
        self.sync(attachment, None, reason, wait=False)
        if self._commit is None:
            return True
        return self._finished(until, durable) and (durable() or self._commit.exception() is None)

    def _finished(self, until: float, enough: Callable[[], bool]) -> bool:
        """Wait for a commit that is under way, or until `enough`; False when there was no time for it."""
        while self._committing and not enough():
            left = until - time.monotonic()
            if left <= 0:
                return False
            wait_for([self._commit], min(left, 0.2))  # type: ignore[list-item]
        return True

    def unsaved(self, attachment: "Attachment") -> str:
        """What would be lost with the live weights, for a log."""
        head, version = self.store.head, attachment.weights.version
        return (
            f"generation {head.generation} holds weight version {head.weight_version}, the live weights are version "
            f"{version}"
        )

    def _finish(self) -> None:
        """Bring the last generation into the files, if a reader kept it out and is done now. What fails is noted."""
        if not self.store.unfinished:
            return
        try:
            finished = self.store.finish()
        except (HogwildError, OSError) as error:
            logger.exception("generation %d is safe, but not in the files yet", self.store.head.generation)
            self._failed(error, [], None)
            return
        if finished:
            logger.info("generation %d is in the files now", self.store.head.generation)
            self._failures, self._not_before, self.error = 0, 0.0, None
            if self.last is not None:
                self.last = {**self.last, "applied": True}
            self._make_undo_data()
            self._tell_checkpoint()

    def _make_undo_data(self) -> None:
        """What a sync leaves for later, beside the next steps; the next commit does it if this fails."""
        try:
            nbytes = self.store.compact()
        except (HogwildError, OSError):
            logger.warning("undo data was not made; the next sync tries again", exc_info=True)
            return
        if nbytes:
            self._tell(lambda: record_undo(self._dirty.client, self._settings.model_name, nbytes))
            self._tell_checkpoint()

    def _failed(
        self, error: BaseException, jobs: list[str], operation: Operation | None, *, wait: bool = False
    ) -> None:
        """Nothing is lost: the steps stay marked as unsaved, and the next try comes after a growing pause."""
        first, longest = BACKOFF_S
        pause = min(longest, first * 2 ** min(self._failures, DOUBLINGS))
        self._failures += 1
        self._not_before = time.monotonic() + pause
        self._jobs = list(dict.fromkeys(jobs + self._jobs))
        message = getattr(error, "message", None) or f"{type(error).__name__}: {error}"
        self.error = {"message": message, "failures": self._failures, "retry_in_s": pause, "at": time.time()}
        if operation is not None:
            self._end(operation, error=error)
        self._tell(lambda: record_failed_sync(self._dirty.client, self._settings.model_name), wait=wait)

    def _end(
        self,
        operation: Operation,
        result: dict[str, Any] | None = None,
        error: BaseException | None = None,
        *,
        wait: bool = False,
    ) -> None:
        self._report = self._tell(lambda: self._operations.finish(operation, result, error), wait=wait)

    def _count(self, report: SyncReport | RollbackReport) -> None:
        """For /metrics: a generation that was just made, if one was."""
        if not report.blocks_changed:
            return
        figures = _figures(report, self.store.head.undo_bytes)
        self._tell(lambda: record_sync(self._dirty.client, self._settings.model_name, figures))

    def _tell_saved(self, version: int, *, wait: bool) -> None:
        """The last generation has the contents of that weight version; steps since then stay unsaved."""
        generation = self.store.head.generation
        self._report = self._tell(lambda: self._dirty.clear(generation, version), wait=wait)

    def _tell_checkpoint(self, *, wait: bool = False) -> None:
        """`publish`, of the generations that there are now."""
        checkpoint = self._described()
        self._tell(lambda: self._registry.publish_checkpoint(checkpoint), wait=wait)

    def _tell(self, report: Callable[[], object], *, wait: bool = False) -> Future[None]:
        """Report to Redis, after all earlier reports; `wait`: until that is done, or given up and logged."""

        def tell() -> None:
            try:
                report()
            except Exception:
                logger.exception("Redis was not told what became of the checkpoint")

        told = self._reporter.submit(tell)
        if wait:
            told.result()
        return told

    def _join(self) -> None:
        """Wait for a commit that runs beside training; its failure was reported where it happened."""
        if self._commit is not None:
            self._commit.exception()
            self._commit = None

    # --- verifying ----------------------------------------------------------------------------------------------------

    def verify(self, attachment: "Attachment", operation: Operation, *, wait: bool = True) -> None:
        """Hold the live weights and the files against the fingerprints of the last generation; ends the operation.

        Training pauses for the live weights; without `wait` the files are read beside it, and no sync comes between.
        Raises CheckpointError, OSError.
        """
        self._join()
        weights = attachment.weights
        try:
            if weights.restoring:
                raise CheckpointError(
                    "a generation is only partly in the live weights: `hogwild checkpoint save` brings in the rest."
                )
            live = self.store.verify_live(attachment.views, weight_version=weights.version)
            live = replace(live, weight_version=self.saved_version)
        except BaseException as error:
            self._operations.finish(operation, error=error)
            raise

        def read_files() -> None:
            try:
                disk = self.store.verify()
            except BaseException as error:
                self._end(operation, error=error, wait=wait)
                raise
            seconds = live.seconds + disk.seconds
            report = replace(
                live, disk=disk.disk, headers=disk.headers, blocks_checked=disk.blocks_checked, seconds=seconds
            )
            result = {**asdict(report), "pause_seconds": live.seconds, "unsaved": report.unsaved, "ok": report.ok}
            self._end(operation, result, wait=wait)

        if wait:
            read_files()
        else:
            self._commit = self._committer.submit(read_files)

    # --- rollback -----------------------------------------------------------------------------------------------------

    def rollback(
        self,
        attachment: "Attachment",
        trainer: Trainer,
        generation: int,
        *,
        after: Callable[[], None],
        operation_id: str = "",
    ) -> dict[str, Any]:
        """A former generation's contents, on disk and live, as a new generation with the next weight version.

        If the last generation has those contents (part of an interrupted step is live, for example) it stays the last
        one, and its version, which the live weights had all along, stays theirs.

        What was not saved becomes a generation first, so that a rollback can be taken back too. The optimizer starts
        anew: its moments were gathered on the way that is undone. `after` is called when the live weights are changed.

        The generation names `operation_id`. If there is one that does, the worker that made it died before it could say
        so: nothing is done again, because that would undo what was trained since.

        Raises NotFound, CheckpointError.
        """
        for made in self.store.generations():
            if operation_id in made.jobs:
                known = ("generation", "weight_version", "blocks_changed")
                return {"restored": made.restores, **{name: getattr(made, name) for name in known}}
        self.sync(attachment, trainer, "before a rollback")
        weights = attachment.weights
        before, wrote = self.store.head.generation, False

        def writing() -> None:
            nonlocal wrote
            wrote = True

        def changed() -> None:
            weights.set_version(self.saved_version)
            after()
            trainer.rolled_back()
            for _, path in self.optimizer_states.files():
                path.unlink(missing_ok=True)

        weights.begin_restore()  # before the generation exists: a worker that dies now leaves the rest to the next one
        try:
            report = self.store.rollback(
                generation,
                attachment.views,
                weight_version=weights.version + 1,
                jobs=[operation_id] if operation_id else [],
                writing=writing,
            )
        except BaseException:
            if self.store.head.generation == before and not wrote:
                weights.restored(weights.version)
            else:  # it is on disk: the next sync brings it into the live weights
                changed()
                self._dirty.request_sync()
            raise
        changed()
        weights.note_generation(self.store.directory, report.generation)
        weights.restored(self.saved_version)
        self._count(report)
        self._committer.submit(self._make_undo_data)
        self._tell_saved(weights.version, wait=True)  # what fails of it is logged: the rollback is done all the same
        self._tell_checkpoint(wait=True)
        return {**asdict(report), "weight_version": weights.version}

    # --- what others see ----------------------------------------------------------------------------------------------

    def publish(self) -> None:
        """For `GET /checkpoint`: the generations one can roll back to, newest first."""
        self._registry.publish_checkpoint(self._described())

    def _described(self) -> dict[str, Any]:
        shown = (
            "generation", "kind", "weight_version", "jobs", "blocks_changed", "blocks_total", "bytes_changed",
            "undo_bytes", "restores",
        )  # fmt: skip
        generations = [
            {"created_at": g.time, **{name: getattr(g, name) for name in shown}}
            for g in reversed(self.store.generations())
        ]
        return {
            "directory": str(self.store.directory),
            "head": self.store.head.generation,
            "generations": generations,
            "last_sync": self.last,
        }

    # --- optimizer state ----------------------------------------------------------------------------------------------

    def load_optimizer(self, trainer: Trainer, config: TrainConfig, weight_version: int) -> None:
        """Before the first job after attaching. A few steps too old is better than none: moments move slowly. A state
        from a later version than the weights' belongs to other weights, and so does one from before a rollback.

        Raises DoesNotFit.
        """
        turns = [g.weight_version for g in self.store.generations() if g.kind in NOT_TRAINED]
        self.optimizer_states.load(trainer, config, oldest=max(turns, default=0), newest=weight_version)
