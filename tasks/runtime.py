"""The child process of the GPU worker: attachment, trainer, checkpoint store, and who may touch the weights when.

One lock, `weights_lock`, belongs to whoever touches weights or their bookkeeping. A running job holds it throughout and
looks after everything else itself between its steps; otherwise the watching thread takes it to attach and to notice
that vLLM is gone. A sync pauses training only while changed blocks are copied; what follows runs on a thread of its own
beside the next steps.
"""

import logging
import os
import socket
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from hogwild.checkpoint.store import CheckpointStore
from hogwild.config import Settings
from hogwild.errors import AttachRefused, Conflict, ExporterGone, HogwildError, JobCancelled, ServiceUnavailable
from hogwild.frontend import Frontend
from hogwild.gpu_worker.batch import Sample
from hogwild.gpu_worker.config import TrainConfig
from hogwild.gpu_worker.control import StepReport
from hogwild.gpu_worker.engine import Trainer
from hogwild.gpu_worker.governor import Governor, GovernorConfig
from hogwild.gpu_worker.lifecycle import Lifecycle
from hogwild.gpu_worker.model import build_model
from hogwild.gpu_worker.pulse import Pulse
from hogwild.tasks.connections import redis_url, worker_client
from hogwild.tasks.control import JobControl, JobParked, WorkerStopping
from hogwild.tasks.dirty import Dirty
from hogwild.tasks.ledger import Lease, Ledger
from hogwild.tasks.operations import Operation, Operations
from hogwild.tasks.progress import send_progress
from hogwild.tasks.registry import HEARTBEAT_S, ModelInfo, Registry

if TYPE_CHECKING:
    from hogwild.gpu_worker.attach import Attachment

logger = logging.getLogger(__name__)

WATCH_S = 0.5  # how soon a vLLM that came or went is noticed while no job runs
DUE_S = 1.0  # how often a running job asks Redis whether a sync is due
LAST_SYNC_S = 90.0  # a stopping worker's last sync may take this long, then the process ends without it
SYNC_BACKOFF_S = (5.0, 600.0)  # first and longest pause after a sync that failed


class Runtime:
    """Everything the child owns. `start` begins to watch for vLLM; public methods are the bodies of Celery tasks."""

    def __init__(self, settings: Settings, *, stop_file: Path) -> None:
        self.settings = settings
        self.worker_id = f"{settings.model_slug}@{socket.gethostname()}"
        self.client = worker_client(redis_url(settings))
        self.ledger = Ledger(self.client, settings)
        self.operations = Operations(self.client, self.ledger.messages, settings.model_name)
        self.registry = Registry(self.client, settings.model_name)
        self.dirty = Dirty(self.client, settings.model_name)
        self.weights_lock = threading.RLock()
        self.lifecycle = Lifecycle(settings.model_runtime_dir, on_attached=self._on_attached, on_lost=self._on_lost)
        self._attachment: Attachment | None = None
        self._trainer: Trainer | None = None
        self._store: CheckpointStore | None = None
        self._governor: Governor | None = None
        self._stop_file = stop_file
        self._ending = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="hogwild-watch", daemon=True)
        self._committer = ThreadPoolExecutor(1, thread_name_prefix="hogwild-commit")
        self._commit: Future[Any] | None = None
        self._sync_failures = 0
        self._sync_not_before = 0.0
        self._asked_due_at = 0.0
        self._jobs_since_sync: list[str] = []
        self._status: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid()}
        if settings.threads:
            torch.set_num_threads(settings.threads)

    # --- life ---------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Announce this worker, take up what the last one left, begin to watch for vLLM.

        Raises AlreadyAttached when a worker on another host serves this model.
        """
        self.registry.register_worker(self.worker_id, socket.gethostname())
        self.ledger.reconcile(self.worker_id, grace_s=0)
        self.operations.reconcile(self.worker_id)
        self._watcher.start()

    def _watch(self) -> None:
        beat_at = 0.0
        while not self._ending.wait(WATCH_S):
            try:
                if self.weights_lock.acquire(blocking=False):
                    try:
                        self._poll()
                    finally:
                        self.weights_lock.release()
                if time.monotonic() >= beat_at:
                    beat_at = time.monotonic() + HEARTBEAT_S
                    self.heartbeat()
            except Exception:  # the watcher must outlive every hiccup of Redis, the disk or vLLM
                logger.exception("while watching")

    def _poll(self) -> None:
        """One look at vLLM; attaches or detaches. The caller holds `weights_lock`."""
        before = self.lifecycle.state
        self.lifecycle.poll()
        if self.lifecycle.state != before:
            self.heartbeat()

    def shutdown(self) -> None:
        """The last chance: what was trained and not yet saved goes to disk, bounded in time."""
        self._ending.set()
        saver = threading.Thread(target=self._last_sync, daemon=True)
        saver.start()
        saver.join(LAST_SYNC_S)
        if saver.is_alive():
            logger.error("the last sync took longer than %.0f s: ending without it", LAST_SYNC_S)
        self.registry.unregister_worker(self.worker_id)

    def _last_sync(self) -> None:
        with self.weights_lock:
            try:
                if self._attachment is not None:
                    self.sync("shutdown")
            except (HogwildError, OSError):
                logger.exception("the last sync failed; generation %s is what is on disk", self._head_generation())
            if self._attachment is not None:
                self.lifecycle.detach()

    def _stopping(self) -> bool:
        return self._ending.is_set() or self._stop_file.exists()

    # --- attaching and losing -----------------------------------------------------------------------------------------

    @property
    def attached(self) -> "Attachment":
        """The present attachment. Raises ExporterGone when there is none."""
        if self._attachment is None:
            raise ExporterGone
        return self._attachment

    def _on_attached(self, attachment: "Attachment") -> None:
        """Called by the lifecycle with a verified attachment: build what trains, bring disk and weights together."""
        manifest = attachment.manifest
        model = build_model(attachment)
        store = self._store  # stays open, and so locked, while vLLM comes and goes
        if store is None:
            store = self._store = CheckpointStore.open(
                self.settings.model_checkpoint_dir, source=Path(manifest.model_path), keep_last=self.settings.keep_last
            )
        self._bring_together(attachment, store)
        self._trainer = Trainer(model)
        self._attachment = attachment
        self._governor = Governor(
            GovernorConfig(itl_budget_ms=self.settings.itl_budget_ms, serve_share=self.settings.serve_share),
            Pulse(self.settings.model_runtime_dir),
        )
        frontend = Frontend.load(self.settings.model_runtime_dir)
        self.registry.publish_model(
            ModelInfo(
                served_model_name=self.settings.model_name,
                model_path=manifest.model_path,
                vocab_size=manifest.vocab_size,
                max_model_len=manifest.max_model_len,
                dtype=manifest.dtype,
                parameters=sum(p.numel() for p in model.parameters()),
                optimizer=self.settings.optimizer,
                learning_rate=self.settings.learning_rate,
                vllm_url=self.settings.vllm_url or (frontend.url if frontend else ""),
            )
        )
        self._publish_checkpoint()
        logger.info(
            "attached to %s: %d tensors, weight version %d",
            manifest.served_model_name,
            len(attachment.views),
            attachment.weights.version,
        )

    def _bring_together(self, attachment: "Attachment", store: CheckpointStore) -> None:
        """Make live weights and checkpoint agree on the version that is served.

        Weights that were trained since vLLM exported them are newer than any generation: they stay. Fresh ones are what
        vLLM loaded. If that is the checkpoint directory itself, or the model it was cloned from, the head generation is
        put into them where they differ (vLLM read while a sync was being written, or was restarted on the original), so
        that a restart forgets nothing that was saved. Anything else is another model: refused, nothing is overwritten.
        """
        weights = attachment.weights
        if not weights.untouched:
            if weights.torn:
                logger.warning(
                    "the last worker died while writing step %d: that step is partly in the weights", weights.begun
                )
                weights.set_version(weights.version)
            return
        head = store.head
        own = Path(attachment.manifest.model_path).resolve() == store.directory.resolve()
        if not own and store.live_digest(attachment.views) not in (head.fingerprints, head.base_model):
            raise AttachRefused(
                f"vLLM serves weights that are neither generation {head.generation} of {store.directory} nor the model "
                "that it was cloned from. To train these weights choose another directory (HOGWILD_CHECKPOINT_DIR); to "
                f"go on with the checkpoint, serve it: vllm serve {store.directory}"
            )
        if head.weight_version:
            weights.touch()
        report = store.restore(attachment.views)
        if report.blocks_changed:
            logger.warning(
                "vLLM had loaded older weights than generation %d: %d blocks brought up to it",
                head.generation,
                report.blocks_changed,
            )
        weights.set_version(head.weight_version)

    def _on_lost(self, attachment: "Attachment") -> None:
        """vLLM is gone; its memory is still mapped here: save it, then let go."""
        try:
            self.sync("vLLM is gone")
        except (HogwildError, OSError):
            logger.exception("what was trained since generation %s could not be saved", self._head_generation())
        self._attachment = self._trainer = None
        if self._governor is not None:
            self._governor.close()
            self._governor = None
        attachment.close()

    def _wait_attached(self) -> None:
        """Block until there are weights to train. Raises WorkerStopping."""
        while self._attachment is None:
            if self._stopping():
                raise WorkerStopping
            self._poll()
            if self._attachment is None:
                time.sleep(WATCH_S)

    # --- training -----------------------------------------------------------------------------------------------------

    def train(self, task: Any, job_id: str) -> dict[str, Any]:
        """Run a job. Returns what Celery keeps as the result; the ledger has the truth."""
        with self.weights_lock:
            try:
                self._wait_attached()
            except WorkerStopping:
                return {"job_id": job_id, "state": "queued", "reason": "worker stopping"}
            lease = self.ledger.claim(job_id, self.worker_id, weights_version=self.attached.weights.version)
            if lease is None:
                return {"job_id": job_id, "state": self._state_of(job_id)}
            try:
                self._run_lease(task, lease)
            except WorkerStopping:
                return {"job_id": job_id, "state": "running", "reason": "worker stopping: the next one goes on"}
            except JobParked:
                return {"job_id": job_id, "state": "paused"}
            except JobCancelled as error:
                self.ledger.finish(lease, "cancelled", error)
            except Conflict:
                logger.exception("%s: this worker lost its lease", job_id)
            except HogwildError as error:
                logger.error("%s failed: %s", job_id, error.message)  # noqa: TRY400 - the message says it all
                self.ledger.finish(lease, "failed", error)
            except Exception as error:
                logger.exception("%s failed", job_id)
                self.ledger.finish(lease, "failed", error)
            else:
                self.ledger.finish(lease, "succeeded")
            finally:
                self._idle()
            return {"job_id": job_id, "state": self._state_of(job_id)}

    def _run_lease(self, task: Any, lease: Lease) -> None:
        """Train the lease's remaining steps, through as many restarts of vLLM as there are."""
        samples = [Sample(s.context_ids, s.continuation_ids, s.weights) for s in self.ledger.samples(lease)]
        config = TrainConfig.from_dict({**self._defaults(lease.config), **lease.config})
        first_step = lease.first_step
        while True:
            self._wait_attached()
            trainer = self._trainer
            if trainer is None:
                raise ExporterGone
            if trainer.optimizer is None:
                self._load_optimizer(trainer, config)
            plan = trainer.plan(samples, config)
            self.ledger.planned(lease, plan.n_steps)
            control = JobControl(self, task, lease, plan.n_steps)
            control.next_step = first_step
            send_progress(task, first_step, plan.n_steps)
            try:
                trainer.run(plan, control, first_step=first_step)
            except ExporterGone:
                logger.warning("%s waits at step %d for vLLM to come back", lease.job_id, control.next_step)
                first_step = control.next_step
                continue
            finally:
                if lease.job_id not in self._jobs_since_sync:
                    self._jobs_since_sync.append(lease.job_id)
                if self._attachment is not None and self.settings.prefix_cache_policy != "never":
                    self._reset_prefix_cache()
            return

    def _defaults(self, config: dict[str, Any]) -> dict[str, Any]:
        defaults: dict[str, Any] = {}
        if config.get("optimizer") is None:
            defaults["optimizer"] = self.settings.optimizer
            if self.settings.learning_rate is not None:
                defaults["learning_rate"] = self.settings.learning_rate
        return defaults

    def _state_of(self, job_id: str) -> str:
        try:
            return self.ledger.get(job_id).state
        except HogwildError:
            return "forgotten"

    def between_steps(self) -> None:
        """A running job's look around. Raises WorkerStopping, ExporterGone."""
        if self._stopping():
            raise WorkerStopping
        self._poll()
        _ = self.attached
        for operation in self.operations.pending():
            self.run_operation(operation.id)
        if time.monotonic() - self._asked_due_at >= DUE_S:
            self._asked_due_at = time.monotonic()
            self._sync_if_due(wait=False)

    def step_started(self, job_id: str, step: int, n_steps: int) -> None:
        """For the status: which step is being written."""
        self._status.update(job_id=job_id, step=step, steps=n_steps, state="training")

    def step_done(self, job_id: str, report: StepReport, version: int) -> None:
        """For the status and the prefix cache policy."""
        self._status.update(step=report.step + 1, loss=report.loss, tokens_per_second=report.tokens_per_second)
        every = self.settings.prefix_cache_steps
        if self.settings.prefix_cache_policy == "every_n_steps" and version % every == 0:
            self._reset_prefix_cache()

    def yield_to_serving(self) -> None:
        """The governor's turn: sleeps as long as serving needs it."""
        if self._governor is not None:
            self._governor.yield_point()

    def _reset_prefix_cache(self) -> None:
        """Blocks computed with old weights are stale. Best effort: a vLLM that does not answer keeps old prefixes."""
        frontend = Frontend.load(self.settings.model_runtime_dir)
        if frontend is None:
            logger.warning("vLLM has not published its address: its prefix cache was not reset")
            return
        try:
            self._status["prefix_cache_reset"] = frontend.reset_prefix_cache()
        except (HogwildError, OSError) as error:
            logger.warning("vLLM's prefix cache was not reset: %s", error)

    def _idle(self) -> None:
        for key in ("job_id", "step", "steps", "loss", "tokens_per_second"):
            self._status.pop(key, None)
        self._status.pop("state", None)
        self.heartbeat()

    # --- syncs and rollbacks ------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Beat's question, when no job runs."""
        with self.weights_lock:
            self._poll()
            if self._attachment is not None:
                self._sync_if_due(wait=True)
            self.ledger.reconcile(self.worker_id)
            self.operations.reconcile(self.worker_id)

    def _sync_if_due(self, *, wait: bool) -> None:
        if time.monotonic() < self._sync_not_before or (self._commit is not None and not self._commit.done()):
            return
        if self.dirty.due(self.settings.sync_quiet_s, self.settings.sync_max_age_s):
            try:
                self.sync("due", wait=wait)
            except (HogwildError, OSError):
                logger.exception("sync failed; it is tried again in %.0f s", self._sync_not_before - time.monotonic())

    def sync(self, reason: str, *, wait: bool = True, operation: Operation | None = None) -> dict[str, Any] | None:
        """Write a generation if there is anything to write; the caller holds `weights_lock`.

        `wait`: until it is on disk; otherwise the caller goes on after the pause and `operation` is finished later.
        Returns the report when waited for. Raises CheckpointError, OSError.
        """
        self._join_commit()
        store, attachment = self._store, self.attached
        if store is None:
            raise ServiceUnavailable("No checkpoint is open.")
        version = attachment.weights.version
        if store.head.weight_version == version and operation is None:
            self.dirty.clear(store.head.generation, version)
            return None
        jobs, self._jobs_since_sync = self._jobs_since_sync, []
        try:
            pending = store.begin_sync(attachment.views, weight_version=version, jobs=jobs)
        except BaseException as error:
            self._sync_failed(error, jobs, operation)
            raise

        def commit() -> dict[str, Any]:
            try:
                report = pending.commit()
                self._save_optimizer(version)
            except BaseException as error:
                self._sync_failed(error, jobs, operation)
                raise
            self._sync_failures, self._sync_not_before = 0, 0.0
            self.dirty.clear(report.generation, version)
            result = {**asdict(report), "reason": reason, "at": time.time()}
            self._status.update(last_sync=result, sync_error=None)
            self._publish_checkpoint()
            if operation is not None:
                self.operations.finish(operation, result)
            logger.info(
                "generation %d written (%s): %d of %d blocks, %.2f s",
                report.generation,
                reason,
                report.blocks_changed,
                report.blocks_total,
                report.seconds,
            )
            return result

        if wait:
            return commit()
        self._commit = self._committer.submit(commit)
        return None

    def _sync_failed(self, error: BaseException, jobs: list[str], operation: Operation | None) -> None:
        """Nothing is lost: the steps stay marked as unsaved, and the next try comes after a growing pause."""
        first, longest = SYNC_BACKOFF_S
        pause = min(longest, first * 2**self._sync_failures)
        self._sync_failures += 1
        self._sync_not_before = time.monotonic() + pause
        self._jobs_since_sync = jobs + self._jobs_since_sync
        self._status["sync_error"] = {
            "message": getattr(error, "message", str(error)),
            "failures": self._sync_failures,
            "retry_in_s": pause,
            "at": time.time(),
        }
        if operation is not None:
            self.operations.finish(operation, error=error)

    def _join_commit(self) -> None:
        """Wait for a commit that runs beside training; its failure was reported where it happened."""
        if self._commit is not None:
            self._commit.exception()
            self._commit = None

    def run_operation(self, operation_id: str) -> None:
        """A sync or a rollback that somebody asked for; exactly one caller of many does it."""
        with self.weights_lock:
            training = "job_id" in self._status
            if not training:
                try:
                    self._wait_attached()
                except WorkerStopping:
                    return
            operation = self.operations.start(operation_id, self.worker_id)
            if operation is None:
                return
            try:
                if operation.kind == "sync":
                    self.sync("asked for", wait=not training, operation=operation)
                else:
                    self.operations.finish(operation, self._rollback(int(operation.params["generation"])))
            except (HogwildError, OSError) as error:
                logger.exception("%s failed", operation.kind)
                if operation.kind == "rollback":
                    self.operations.finish(operation, error=error)

    def _rollback(self, generation: int) -> dict[str, Any]:
        """A former generation's contents, on disk and live; what was not saved becomes a generation first."""
        self.sync("before a rollback")
        store, attachment, trainer = self._store, self.attached, self._trainer
        if store is None or trainer is None:
            raise ExporterGone
        weights = attachment.weights
        version = weights.version + 1
        weights.touch()
        report = store.rollback(generation, attachment.views, weight_version=version)
        weights.set_version(version)
        trainer.reset_optimizer()  # the moments were gathered on the way that was undone
        for _, path in self._optimizer_files():
            path.unlink(missing_ok=True)
        self.dirty.clear(store.head.generation, version)
        self._publish_checkpoint()
        if self.settings.prefix_cache_policy != "never":
            self._reset_prefix_cache()
        return asdict(report)

    def _publish_checkpoint(self) -> None:
        """For `GET /checkpoint`: the generations one can roll back to, newest first."""
        if self._store is None:
            return
        generations = [
            {"generation": g.generation, "kind": g.kind, "created_at": g.time, "weight_version": g.weight_version,
             "jobs": g.jobs, "blocks_changed": g.blocks_changed, "blocks_total": g.blocks_total,
             "bytes_changed": g.bytes_changed, "undo_bytes": g.undo_bytes, "restores": g.restores}
            for g in reversed(self._store.generations())]  # fmt: skip
        self.registry.publish_checkpoint({
            "directory": str(self._store.directory), "head": self._store.head.generation, "generations": generations,
            "last_sync": self._status.get("last_sync")})  # fmt: skip

    def _head_generation(self) -> int | None:
        return self._store.head.generation if self._store is not None else None

    # --- optimizer state ----------------------------------------------------------------------------------------------

    def _optimizer_files(self) -> list[tuple[int, Path]]:
        """Saved optimizer states: (weight version, file), newest first."""
        folder = self.settings.data_dir / "optimizer"
        found = []
        for path in folder.glob(f"{self.settings.model_slug}@*.safetensors"):
            version = path.stem.rpartition("@")[2]
            if version.isdigit():
                found.append((int(version), path))
        return sorted(found, reverse=True)

    def _save_optimizer(self, version: int) -> None:
        """Beside each generation, so that a restarted worker goes on with the moments it had then."""
        if self._trainer is None or self._trainer.optimizer is None:
            return
        older = self._optimizer_files()
        path = self.settings.data_dir / "optimizer" / f"{self.settings.model_slug}@{version}.safetensors"
        self._trainer.save_optimizer(path)
        for _, old in older:
            if old != path:
                old.unlink(missing_ok=True)

    def _load_optimizer(self, trainer: Trainer, config: TrainConfig) -> None:
        """Before the first job after attaching. A few steps too old is better than none: moments move slowly. A state
        from a later version than the weights' belongs to other weights."""
        for version, path in self._optimizer_files():
            if version <= self.attached.weights.version:
                try:
                    trainer.load_optimizer(path, config)
                except HogwildError as error:
                    logger.info("optimizer state starts empty: %s", error)
                else:
                    logger.info("optimizer state of weight version %d restored", version)
                return

    # --- status -------------------------------------------------------------------------------------------------------

    def heartbeat(self) -> None:
        """Publish how this worker is; also what `GET /train/status` shows."""
        status = {**self._status}
        status.setdefault("state", self._lifecycle_state())
        status["lifecycle"] = self.lifecycle.describe()
        status["attached"] = self._attachment is not None
        if (attachment := self._attachment) is not None:
            status["weight_version"] = attachment.weights.version
            status["device"] = attachment.manifest.device
        if self._trainer is not None and (optimizer := self._trainer.optimizer) is not None:
            status["optimizer"] = {"kind": optimizer.kind, "state_bytes": optimizer.allocated_bytes()}
        if self._governor is not None:
            status["pace"] = self._governor.status()
        status["memory"] = _memory()
        self.registry.heartbeat(self.worker_id, status)

    def _lifecycle_state(self) -> str:
        return str(self.lifecycle.state)


def _memory() -> dict[str, int]:
    """Bytes: this process' resident set, and what it has on the GPU."""
    used = {"rss": psutil.Process().memory_info().rss}
    if torch.cuda.is_initialized():
        used["cuda_allocated"] = torch.cuda.memory_allocated()
        used["cuda_peak"] = torch.cuda.max_memory_allocated()
        free, total = torch.cuda.mem_get_info()
        used["cuda_free"], used["cuda_total"] = free, total
    return used
