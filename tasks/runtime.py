"""The child process of the GPU worker: what is attached, who may touch the weights when, how a job is run.

One lock, `weights_lock`, belongs to whoever touches weights or their bookkeeping. A running job holds it throughout and
looks after everything else itself between its steps; otherwise the watching thread takes it to attach and to notice
that vLLM is gone. Syncs and rollbacks are `hogwild.tasks.saving`'s.
"""

import gc
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import redis
import torch

from hogwild.config import Settings
from hogwild.errors import Conflict, ExporterGone, HogwildError, JobCancelled
from hogwild.frontend import Frontend
from hogwild.gpu_worker.batch import Sample
from hogwild.gpu_worker.config import TrainConfig
from hogwild.gpu_worker.control import StepReport
from hogwild.gpu_worker.engine import Trainer
from hogwild.gpu_worker.governor import Governor, GovernorConfig
from hogwild.gpu_worker.lifecycle import Lifecycle
from hogwild.gpu_worker.model import build_model
from hogwild.gpu_worker.partition import Placement
from hogwild.gpu_worker.pulse import Pulse
from hogwild.gpu_worker.replay import OwnText
from hogwild.gpu_worker.yield_points import device_queue, install_yield_points
from hogwild.tasks.app import HANGING_S
from hogwild.tasks.connections import redis_url, worker_client
from hogwild.tasks.control import JobControl, JobParked, WorkerStopping
from hogwild.tasks.dirty import Dirty
from hogwild.tasks.ledger import Lease, Ledger
from hogwild.tasks.operations import Operation, Operations
from hogwild.tasks.prefix_cache import PrefixCache
from hogwild.tasks.progress import send_progress
from hogwild.tasks.registry import HEARTBEAT_S, ModelInfo, Registry
from hogwild.tasks.saving import Saver

if TYPE_CHECKING:
    from hogwild.gpu_worker.attach import Attachment

logger = logging.getLogger(__name__)

WATCH_S = 0.5  # how soon a vLLM that came or went is noticed while no job runs
DUE_S = 1.0  # how often a running job asks Redis whether a sync is due
ENDING_S = 5.0  # from the last sync's end, or its bound, to the end of the process
STOPPED_S = 10.0  # a child that was asked to stop and has nothing to do gets its parent's word within this
PREFIX_CACHE_S = 5.0  # a job, or a rollback, waits this long for requests that hold prefixes of older weights


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Live:
    """Everything there is while a vLLM is attached."""

    attachment: "Attachment"
    trainer: Trainer
    saver: Saver
    governor: Governor
    remove_yield_points: Callable[[], None]

    def close(self) -> None:
        """Let go of the weights; the saver stays, it belongs to the directory."""
        self.remove_yield_points()
        self.governor.close()
        self.trainer.close()
        self.attachment.close()


class Runtime:
    """Everything the child owns. `start` begins to watch for vLLM; public methods are the bodies of Celery tasks."""

    def __init__(self, settings: Settings, *, stop_file: Path) -> None:
        self.settings = settings
        self.worker_id = f"{settings.model_slug}@{socket.gethostname()}"
        self.client = worker_client(
            redis_url(settings), give_up=lambda: self._told or self._orphaned or self._ending.is_set()
        )
        self.ledger = Ledger(self.client, settings)
        self.operations = Operations(self.client, self.ledger.messages, settings.model_name)
        self.registry = Registry(self.client, settings.model_name)
        self.dirty = Dirty(self.client, settings.model_name)
        self.prefix_cache = PrefixCache(settings.model_runtime_dir, settings.vllm_url)
        self.weights_lock = threading.RLock()
        self._changed = threading.Event()
        self.lifecycle = Lifecycle(
            settings.model_runtime_dir,
            on_attached=self._on_attached,
            on_lost=self._on_lost,
            on_change=self._changed.set,
        )
        self.asked_to_stop = False  # by a signal: no lock may be needed to set it
        self._live: Live | None = None
        self._saver: Saver | None = None  # outlives vLLM: the directory stays open, and so locked
        self._stop_file = stop_file
        self._parent = os.getppid()
        self._ending, self._ended = threading.Event(), threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="hogwild-watch", daemon=True)
        self._beater = threading.Thread(target=self._beat, name="hogwild-heartbeat", daemon=True)
        self._weight_bytes = 0  # of the vLLM that was attached last
        self._unsaved = ""  # what the last sync is about, for the log
        self._beating = threading.Lock()  # two threads report; the later one's look must be the later report
        self._asked_due_at = 0.0
        self._task_ends_at = math.inf
        self._status: dict[str, Any] = {}
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
        self._beater.start()

    def _watch(self) -> None:
        idle_since = math.inf  # of a worker that is asked to stop
        while not self._ending.wait(WATCH_S):
            try:
                idle = self.weights_lock.acquire(blocking=False)
                if idle:
                    try:
                        self._poll()
                    finally:
                        self.weights_lock.release()
                self.prefix_cache.retry()  # also beside a job: its steps do not wait for vLLM's answer
                now = time.monotonic()
                idle_since = min(idle_since, now) if idle and self._told else math.inf
                if idle and (self._orphaned or now - idle_since > STOPPED_S):
                    # The pool's loop would wait for its parent for ever: that is gone, or has not been told to stop.
                    logger.error("the worker's parent process is gone, or does not end: saving and ending")
                    try:
                        self.shutdown()
                    finally:
                        os._exit(1)
            except Exception:  # the watcher must outlive every hiccup of Redis, the disk or vLLM
                logger.exception("while watching")
                _end_if_cuda_is_broken()

    def _beat(self) -> None:
        """Say that this worker lives, and each change of its state: also while it attaches, saves what a vLLM left, or
        is about to end."""
        while not self._ended.is_set():
            self._changed.clear()
            try:
                self.heartbeat()
            except Exception:  # of Redis, or of what is just being attached or let go
                logger.exception("while reporting")
            self._changed.wait(HEARTBEAT_S)

    def _poll(self) -> None:
        """One look at vLLM; attaches or detaches. The caller holds `weights_lock`."""
        before = self.lifecycle.state
        self.lifecycle.poll()
        if self.lifecycle.state != before:
            self.heartbeat()

    def shutdown(self) -> None:
        """The last chance: what was trained and not yet saved goes to disk, bounded in time.

        The process ends afterwards without waiting for threads: one may hang with the disk.
        """
        self._ending.set()
        seconds = self.settings.last_sync_bound(self._weight_bytes)
        last = threading.Thread(
            target=self._last_sync, args=(time.monotonic() + seconds,), name="hogwild-last-sync", daemon=True
        )
        last.start()
        last.join(seconds + ENDING_S)
        if last.is_alive():
            logger.error("the last sync took longer than %.0f s: ending without its end; %s", seconds, self._unsaved)
        self._ended.set()
        self._changed.set()
        if self._beating.acquire(timeout=ENDING_S):  # a report that began before comes before this
            self._beating.release()
        with suppress(redis.RedisError):  # it counts as gone soon enough
            self.registry.unregister_worker(self.worker_id)

    def _last_sync(self, until: float) -> None:
        with self.weights_lock:
            live, self._live = self._live, None
            if live is not None:
                self._last_chance("shutdown", live, until)
            self.lifecycle.close()
            if self._saver is not None:
                self._saver.close()

    def _last_chance(self, reason: str, live: Live, until: float) -> None:
        self._unsaved = live.saver.unsaved(live.attachment)
        if live.saver.last_chance(
            live.attachment, live.trainer, reason, until=until, failed=_end_if_cuda_is_broken
        ):
            self._unsaved = "all weights are saved"
        else:
            logger.error("%s: the weights could not be saved in time; %s", reason, live.saver.unsaved(live.attachment))

    def stopping(self) -> bool:
        """Whether this worker was asked to stop, its parent was killed, or Celery would soon kill it."""
        late = time.monotonic() > self._task_ends_at
        return late or self._ending.is_set() or self._orphaned or self._told

    @property
    def _told(self) -> bool:
        return self.asked_to_stop or self._stop_file.exists()

    def _task_began(self) -> None:
        """Celery's clock runs while a task waits for vLLM: well before it kills, the task goes to the queue again."""
        self._task_ends_at = time.monotonic() + self.settings.job_time_limit_s + HANGING_S / 2

    @property
    def _orphaned(self) -> bool:
        return os.getppid() != self._parent

    # --- attaching and losing -----------------------------------------------------------------------------------------

    @property
    def live(self) -> Live:
        """What is attached. Raises ExporterGone when nothing is."""
        if self._live is None:
            raise ExporterGone
        return self._live

    def _on_attached(self, attachment: "Attachment") -> None:
        """Called by the lifecycle with a verified attachment: build what trains, bring disk and weights together."""
        manifest, settings = attachment.manifest, self.settings
        self._weight_bytes = attachment.nbytes
        model = build_model(attachment)
        if self._saver is None:
            self._saver = Saver.open(
                settings,
                Path(manifest.model_path),
                dirty=self.dirty,
                operations=self.operations,
                registry=self.registry,
            )
            self._saver.restored = self._rolled_back
        trained = not attachment.weights.untouched and not attachment.weights.restoring
        version = self._saver.bring_together(attachment)
        if self._resets and not attachment.weights.untouched:
            # Brought to another generation just now, or trained by a worker that may have died owing a reset.
            self.prefix_cache.owe(running=not trained or attachment.weights.version != version)
        self._saver.settle(attachment)
        self.ledger.settle(self.worker_id, version)
        frontend = Frontend.load(settings.model_runtime_dir)
        self.registry.publish_model(
            ModelInfo(
                served_model_name=settings.model_name,
                model_path=manifest.model_path,
                vocab_size=manifest.vocab_size,
                max_model_len=manifest.max_model_len,
                dtype=manifest.dtype,
                parameters=sum(p.numel() for p in model.parameters()),
                optimizer=settings.optimizer,
                learning_rate=settings.learning_rate,
                vllm_url=settings.vllm_url or (frontend.url if frontend else ""),
            )
        )
        self._saver.publish()
        pace = GovernorConfig(itl_budget_ms=settings.itl_budget_ms, serve_share=settings.kept_share)
        governor = Governor(
            pace,
            Pulse(settings.model_runtime_dir, self._vllm_metrics),
            device=device_queue(attachment.device),
            place=Placement.on(attachment.device, wanted=pace.enabled and settings.mps_parts == "auto"),
        )
        remove = install_yield_points(model, governor) if pace.enabled else _nothing
        own_text = OwnText.for_model(
            Path(manifest.model_path), settings.replay_openings, trust_remote_code=manifest.trust_remote_code
        )
        compiles = settings.compile_layers == "on" or (
            settings.compile_layers == "auto" and attachment.device.type == "cuda"
        )
        trainer = Trainer(model, compile_layers=compiles, own_text=own_text)
        self._live = Live(attachment, trainer, self._saver, governor, remove)
        logger.info(
            "attached to %s: %d tensors in %.3f s, weight version %d",
            manifest.served_model_name,
            len(attachment.views),
            attachment.seconds,
            attachment.weights.version,
        )

    def _on_lost(self, attachment: "Attachment") -> None:
        """vLLM is gone; its memory is still mapped here: save what it holds, then let go.

        What fails (a reader of the files, a full disk) is tried again for as long as a last sync may take: these
        weights are nowhere else.
        """
        until = time.monotonic() + self.settings.last_sync_bound(self._weight_bytes)
        live, self._live = self._live, None
        if live is None:  # it went while it was being attached
            attachment.close()
            self.prefix_cache.forget()
            return
        try:
            self._last_chance("vLLM is gone", live, until)
        finally:
            self.prefix_cache.forget()
            live.close()
            del live
            gc.collect()  # model and trainer refer to each other, and to vLLM's memory

    def obey(self, lease: Lease) -> None:
        """What the user wants of a running job. Raises JobCancelled, JobParked."""
        wanted = self.ledger.requested(lease.job_id)
        if wanted == "cancel":
            raise JobCancelled
        if wanted == "pause" and self.ledger.park(lease):
            raise JobParked

    def _wait_attached(self, meanwhile: Callable[[], None] = _nothing) -> Live:
        """Block until there are weights to train. Raises WorkerStopping, and what `meanwhile` does."""
        while self._live is None:
            if self.stopping():
                raise WorkerStopping
            meanwhile()
            self._poll()
            if self._live is None:
                time.sleep(WATCH_S)
        return self._live

    # --- training -----------------------------------------------------------------------------------------------------

    def train(self, task: Any, job_id: str) -> dict[str, Any]:
        """Run a job. Returns what Celery keeps as the result; the ledger has the truth."""
        self._task_began()
        with self.weights_lock:
            stopped = {"job_id": job_id, "state": "queued", "reason": "stopped before it began: it is run later"}
            try:
                version = self._wait_attached().attachment.weights.version
            except WorkerStopping:
                return stopped
            if self.stopping():
                return stopped
            lease = self.ledger.claim(job_id, self.worker_id, weights_version=version)
            if lease is None:
                return {"job_id": job_id, "state": self._state_of(job_id)}
            try:
                self._settle_unsaved()
                self._run_lease(task, lease)
            except WorkerStopping:
                with suppress(HogwildError, redis.RedisError):  # what it leaves running the next worker takes up too
                    self.ledger.release(lease)
                return {"job_id": job_id, "state": "queued", "reason": "stopped between two steps: it goes on later"}
            except JobParked:
                return {"job_id": job_id, "state": "paused"}
            except JobCancelled as error:
                self.ledger.finish(lease, "cancelled", error)
            except Conflict:
                logger.exception("%s: this worker lost its lease", job_id)
            except HogwildError as error:
                logger.error("%s failed: %s", job_id, error.message)  # noqa: TRY400 - the message says it all
                self.ledger.finish(lease, "failed", error)
            except redis.RedisError:  # longer away than the client's patience: the tick publishes the job again, and
                # where this worker stops, and has none, the next one's start
                logger.exception("%s: Redis does not answer; it goes on when it does", job_id)
                return {"job_id": job_id, "state": "running", "reason": "Redis does not answer"}
            except Exception as error:
                logger.exception("%s failed", job_id)
                _end_if_cuda_is_broken()
                self.ledger.finish(lease, "failed", error)
            else:
                self.ledger.finish(lease, "succeeded")
            finally:
                weights = None if self._live is None else self._live.attachment.weights
                if weights is not None and weights.torn:  # a step that ran out of memory half-way
                    weights.set_version(weights.version)
                self._status.clear()
                self._changed.set()  # the thread that reports does: whoever waits for the lock waits for no Redis
            return {"job_id": job_id, "state": self._state_of(job_id)}

    def _run_lease(self, task: Any, lease: Lease) -> None:
        """Train the lease's remaining steps, through as many restarts of vLLM as there are."""
        samples = [Sample(s.context_ids, s.continuation_ids, s.weights) for s in self.ledger.samples(lease)]
        config = self.config_of(lease.config)
        while left := self._train_on(task, lease, samples, config):
            lease = left
            gc.collect()  # the dead vLLM's memory stays mapped as long as one tensor is on it
            logger.warning("%s waits at step %d for vLLM to come back", lease.job_id, lease.first_step)

    def _train_on(self, task: Any, lease: Lease, samples: list[Sample], config: TrainConfig) -> Lease | None:
        """Train until the job ends (None), or vLLM does: what is left then."""
        live = self._wait_attached(lambda: self.obey(lease))
        if live.trainer.optimizer is None:
            live.saver.load_optimizer(live.trainer, config, live.attachment.weights.version)
        plan = live.trainer.plan(samples, config, pack_tokens=lease.pack_tokens)
        logger.info("%s: %s", lease.job_id, plan)
        self.ledger.planned(lease, plan.n_steps, plan.pack_tokens, plan.account())
        send_progress(task, lease.first_step, plan.n_steps)
        control = JobControl(self, live, task, lease, n_steps=plan.n_steps)
        try:
            self.between_steps(lambda: self.obey(lease))  # nor is replay held to a mixture
            live.governor.begin_work()  # before the text to replay is made
            live.trainer.run(plan, control, first_step=lease.first_step)
        except ExporterGone:
            # Packs of another size would make other steps.
            return replace(
                lease, first_step=control.next_step, pack_tokens=plan.pack_tokens, seconds=control.seconds
            )
        else:
            return None
        finally:
            if self._live is live and self._resets:
                self.prefix_cache.reset(patience_s=PREFIX_CACHE_S)

    def config_of(self, asked: dict[str, Any]) -> TrainConfig:
        """A job's options over the deployment's defaults; None is as good as nothing. Raises InvalidRequest."""
        given = {name: value for name, value in asked.items() if value is not None}
        defaults: dict[str, Any] = {"replay": self.settings.replay}
        if "optimizer" not in given:
            defaults.update(optimizer=self.settings.optimizer, learning_rate=self.settings.learning_rate)
        return TrainConfig.from_dict({**defaults, **given})

    def _state_of(self, job_id: str) -> str:
        try:
            return self.ledger.get(job_id).state
        except HogwildError:
            return "forgotten"

    def between_steps(self, obey: Callable[[], None] = _nothing) -> None:
        """A running job's look around. Raises WorkerStopping, ExporterGone, and what `obey` does.

        While a generation is only partly in the live weights it looks on: what is trained on a mixture is gone when the
        rest of it comes.
        """
        self._look_around()
        while self.live.attachment.weights.restoring:
            self._status["state"] = "syncing"
            obey()
            time.sleep(WATCH_S)
            self._look_around()

    def _look_around(self) -> None:
        """Once."""
        if self.stopping():
            raise WorkerStopping
        self._poll()
        live = self.live
        # While a commit runs, what is asked for waits for it, and the job does not.
        for operation in takewhile(lambda _: not live.saver.busy, self.operations.pending()):
            self.run_operation(operation.id, in_job=True)
        if time.monotonic() - self._asked_due_at >= DUE_S:
            self._asked_due_at = time.monotonic()
            self._sync_if_due(live, wait=False)

    def step_started(self, job_id: str, step: int, n_steps: int) -> None:
        """For the status: which step is being written."""
        self._status.update(state="training", job_id=job_id, step=step, steps=n_steps)

    def step_done(self, report: StepReport, version: int) -> None:
        """For the status and the prefix cache policy."""
        self._status.update(step=report.step + 1, loss=report.loss, tokens_per_second=report.tokens_per_second)
        every_n = self.settings.prefix_cache_policy == "every_n_steps"
        if every_n and version % self.settings.prefix_cache_steps == 0:
            self.prefix_cache.reset(patience_s=0.0)

    @property
    def _resets(self) -> bool:
        return self.settings.prefix_cache_policy != "never"

    def _rolled_back(self) -> bool:
        """The live weights are a former generation's. Whether vLLM has forgotten what it computed with others.

        Requests that are running are computed anew, unlike after training: their prefixes are of weights that somebody
        wanted gone, and on a busy server there would always be one.
        """
        return self._resets and self.prefix_cache.reset(patience_s=PREFIX_CACHE_S, running=True)

    def _vllm_metrics(self) -> str:
        frontend = Frontend.load(self.settings.model_runtime_dir, self.settings.vllm_url)
        if frontend is None:
            raise ExporterGone
        return frontend.metrics()

    # --- syncs and rollbacks ------------------------------------------------------------------------------------------

    def _sync_if_due(self, live: Live, *, wait: bool) -> None:
        if not live.saver.sync_if_due(live.attachment, live.trainer, wait=wait):
            _end_if_cuda_is_broken()

    def _settle_unsaved(self) -> None:
        """Between jobs: a step whose mark Redis never got is unsaved all the same."""
        attachment, saver = self.live.attachment, self.live.saver
        weights = attachment.weights
        if weights.version != saver.saved_version and not weights.restoring and not saver.busy:
            saver.settle(attachment)

    def tick(self) -> None:
        """Beat's question, when no job runs."""
        with self.weights_lock:
            self._poll()
            if self._live is not None:
                self._settle_unsaved()
                self._sync_if_due(self._live, wait=True)
            self.ledger.reconcile(self.worker_id)
            if self._saver is None or not self._saver.busy:  # what a job left to the committer is nobody else's
                self.operations.reconcile(self.worker_id)

    def run_operation(self, operation_id: str, *, in_job: bool = False) -> None:
        """A sync, rollback or verification that somebody asked for; exactly one caller of many does it.

        `in_job`: between two steps of a job, which holds the lock and the task.
        """
        if not in_job:
            self._task_began()
        with self.weights_lock:
            before = dict(self._status)
            try:
                live = self.live if in_job else self._wait_attached()
            except WorkerStopping:
                return  # it stays pending: the next worker does it
            operation = self.operations.start(operation_id, self.worker_id)
            if operation is None:
                return
            if operation.kind != "verify":
                self._status["state"] = "syncing"
            try:
                if operation.kind == "verify":
                    live.saver.verify(live.attachment, operation, wait=not in_job)
                elif operation.kind == "sync":
                    live.saver.sync(live.attachment, live.trainer, "asked for", wait=not in_job, operation=operation)
                else:
                    if not in_job:  # a job that runs has no open step here, and one that Redis cut off may have
                        self.ledger.settle(self.worker_id, live.attachment.weights.version)
                    self._rollback(live, operation)
            except Exception:
                logger.exception("%s failed", operation.kind)
                _end_if_cuda_is_broken()
            finally:
                self._status = before
                self._changed.set()

    def _rollback(self, live: "Live", operation: Operation) -> None:
        reset = False

        def after() -> None:
            nonlocal reset
            reset = self._rolled_back()

        try:
            report = live.saver.rollback(
                live.attachment,
                live.trainer,
                int(operation.params["generation"]),
                after=after,
                operation_id=operation.id,
            )
        except Exception as error:
            self.operations.finish(operation, error=error)
            raise
        outcome = "reset" if reset else "owed" if self._resets else "kept"
        self.operations.finish(operation, {**report, "prefix_cache": outcome})

    # --- status -------------------------------------------------------------------------------------------------------

    def heartbeat(self) -> None:
        """Publish how this worker is; what `GET /train/status` shows as `worker`."""
        with self._beating:
            if not self._ended.is_set():  # a worker that ends unregisters, and counts as gone from then on
                self.registry.heartbeat(self.worker_id, self._describe())

    def _describe(self) -> dict[str, Any]:
        status: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "state": str(self.lifecycle.state),
            "lifecycle": self.lifecycle.describe(),
            "attached": False,
            "memory": _memory(),
            "prefix_cache": self.prefix_cache.status(),
        }
        if (saver := self._saver) is not None:
            status.update(last_sync=saver.last, sync_error=saver.error)
        if (live := self._live) is not None:
            optimizer = live.trainer.optimizer
            status.update(
                attached=True,
                device=live.attachment.manifest.device,
                weight_version=live.attachment.weights.version,
                pace=live.governor.status(),
                optimizer=optimizer and {"kind": optimizer.kind, "state_bytes": optimizer.allocated_bytes()},
            )
        return {**status, **self._status}


def _end_if_cuda_is_broken() -> None:
    """After a fault on the card every call of this process fails; the next process has a context of its own."""
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            logger.exception("CUDA is broken in this process: ending it, the next one goes on with the job")
            os._exit(1)


def _memory() -> dict[str, int]:
    """Bytes: this process' resident set, and what it has on the GPU."""
    used = {"rss": psutil.Process().memory_info().rss}
    if torch.cuda.is_initialized():
        used["cuda_allocated"] = torch.cuda.memory_allocated()
        used["cuda_peak"] = torch.cuda.max_memory_allocated()
        used["cuda_free"], used["cuda_total"] = torch.cuda.mem_get_info()
    return used
