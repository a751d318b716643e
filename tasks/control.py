"""What happens around each optimizer step of a job: the ledger's account of it, and everybody else's turn.

    before_step(k)   stop? vLLM alive? sync or rollback asked for? cancel or pause? → ledger: k begun → weights: begun
    (the engine writes the weights)
    after_step(k)    weights: version + 1 → next generation: the job → ledger: k applied → unsaved steps + 1 → Flower

The order makes a crash at any point decidable: the version beside the weights tells whether a step that the ledger
knows as begun was applied.
"""

import math
import time
from typing import TYPE_CHECKING, Any

from hogwild.errors import HogwildError, JobCancelled
from hogwild.gpu_worker.control import StepReport
from hogwild.tasks.app import HANGING_S
from hogwild.tasks.ledger import Lease
from hogwild.tasks.progress import send_progress

if TYPE_CHECKING:
    from hogwild.tasks.runtime import Live, Runtime


LOOK_S = 0.5  # between two looks at the ledger within a step


class WorkerStopping(HogwildError):
    """The worker was asked to stop, or the task waited too long for vLLM: the job goes back to the queue."""


class TimeLimit(HogwildError):
    """The job trained for longer than `HOGWILD_JOB_TIME_LIMIT_S`."""

    slug = "time-limit"


class JobParked(HogwildError):
    """The job was paused: it goes on when it is resumed."""


class JobControl:
    """Implements the engine's `Control` for one claimed job."""

    def __init__(self, runtime: "Runtime", live: "Live", task: Any, lease: Lease, *, n_steps: int) -> None:
        self._runtime = runtime
        self._live = live
        self._task = task
        self._lease = lease
        self._n_steps = n_steps
        self.next_step = lease.first_step
        self._in_step = False
        self._looked_at = 0.0
        self.seconds = lease.seconds  # that the job's steps took so far
        self._began_at = 0.0  # the present step

    def before_step(self, step: int) -> None:
        """Raises WorkerStopping, ExporterGone, JobCancelled, JobParked, TimeLimit; Conflict when the lease was lost."""
        runtime = self._runtime
        try:
            runtime.between_steps(lambda: runtime.obey(self._lease))
            self._check_time(self.seconds)
            runtime.obey(self._lease)
        except JobParked:
            send_progress(self._task, step, self._n_steps, phase="paused")
            raise
        self._live.governor.begin_work()
        weights = self._live.attachment.weights
        runtime.ledger.begin_step(self._lease, step, weight_version=weights.version)
        self.next_step = step + 1
        weights.begin()
        self._in_step = True
        self._began_at = self._looked_at = time.monotonic()
        runtime.step_started(self._lease.job_id, step, self._n_steps)

    def after_step(self, report: StepReport) -> None:
        """The step is in the weights (or was dropped as not finite: then the version stays)."""
        runtime = self._runtime
        weights = self._live.attachment.weights
        if report.applied:
            version = weights.applied()
            self._live.saver.note_job(self._lease.job_id)
        else:
            version = weights.version
            weights.set_version(version)
        self._in_step = False
        self.seconds += report.seconds
        self._live.governor.worked()  # what came after the last layer as well
        runtime.ledger.applied(
            self._lease,
            report.step,
            version,
            loss=report.loss,
            tokens=report.tokens if report.applied else 0,
            seconds=report.seconds,
            grad_norm=report.grad_norm,
            replay_divergence=report.replay_divergence,
            total_steps=self._n_steps,
            dropped=not report.applied,
        )
        if report.applied:
            runtime.dirty.mark_dirty(version)
        send_progress(
            self._task,
            report.step + 1,
            self._n_steps,
            weight_version=version,
            loss=report.loss if math.isfinite(report.loss) else None,
        )
        runtime.step_done(report, version)

    def between_micro_steps(self) -> None:
        """The pacing governor's turn, and a look whether the job is to end.

        Raises JobCancelled, TimeLimit; WorkerStopping only where no step has begun: one that has would count as
        interrupted.
        """
        self._live.governor.yield_point()
        now = time.monotonic()
        if now - self._looked_at < LOOK_S:
            return
        self._looked_at = now
        if self._in_step:  # one of many packs; a step that began in time may end, unless it takes far longer
            self._check_time(self.seconds + now - self._began_at - HANGING_S / 2)
        elif self._runtime.stopping():
            raise WorkerStopping
        if self._runtime.ledger.requested(self._lease.job_id) == "cancel":
            raise JobCancelled

    def _check_time(self, seconds: float) -> None:
        limit = self._runtime.settings.job_time_limit_s
        if seconds >= limit:
            raise TimeLimit(
                f"The job trained for {limit:.0f} s, the most that HOGWILD_JOB_TIME_LIMIT_S allows. The steps it made "
                "are in the weights; send the rest as another job, or raise the limit."
            )
