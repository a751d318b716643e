"""The GPU worker's Celery tasks. Importing this costs nothing: torch comes with the child's `Runtime`.

    parent (celery worker, -c 1)         consumes, answers pings; never touches torch
      └─ child (prefork, spawned)        Runtime: attached weights, model, optimizer, checkpoint store; runs the tasks

Start-up and shutdown are Celery's signals: the child builds its runtime before it takes a task, and the parent's warm
shutdown tells a running job through a file to stop at its next step boundary. To the child SIGTERM means the same, no
more: systemd and a machine that shuts down send it to every process at once, a cold shutdown to the child alone, and
Celery's own handler would end the child within a step, or within the last sync.
"""

import logging
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from celery import signals

from hogwild.config import Settings, load_settings
from hogwild.tasks.app import ROLLBACK, SYNC, TICK, TRAIN, VERIFY, app

if TYPE_CHECKING:
    from hogwild.tasks.runtime import Runtime

logger = logging.getLogger(__name__)

START_AGAIN_S = 5.0

_runtime: "Runtime | None" = None


def stop_file(settings: Settings, parent_pid: int) -> Path:
    """Exists while the worker with that parent process is asked to stop."""
    return settings.model_runtime_dir / f"worker-{parent_pid}.stop"


def runtime() -> "Runtime":
    """The child's runtime; made on first use where no process init ran (a solo pool in a test)."""
    global _runtime
    if _runtime is None:
        from hogwild.tasks.runtime import Runtime

        settings = load_settings()
        made = Runtime(settings, stop_file=stop_file(settings, os.getppid()))
        made.start()
        _runtime = made
    return _runtime


@signals.worker_process_init.connect  # type: ignore[untyped-decorator]
def _child_starts(**_: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Celery sets its own handler where this is anything else
    try:
        runtime()
    except Exception:
        # Celery would go on with a child that watches nothing. Its parent starts another one.
        logger.exception("the worker could not start; trying again in %.0f s", START_AGAIN_S)
        time.sleep(START_AGAIN_S)
        os._exit(1)


@signals.worker_process_shutdown.connect  # type: ignore[untyped-decorator]
def _child_ends(**_: Any) -> None:
    if _runtime is not None:
        _runtime.shutdown()


@signals.task_prerun.connect  # type: ignore[untyped-decorator]
def _task_begins(**_: Any) -> None:
    # Here and not before: Celery would replace the handler. And programs that training starts do not inherit it.
    if signal.getsignal(signal.SIGTERM) is signal.SIG_IGN:
        signal.signal(signal.SIGTERM, _asked_to_stop)


def _asked_to_stop(*_: Any) -> None:
    if _runtime is not None:
        _runtime.asked_to_stop = True


@signals.worker_init.connect  # type: ignore[untyped-decorator]
def _parent_starts(**_: Any) -> None:
    with suppress(OSError):
        stop_file(load_settings(), os.getpid()).unlink(missing_ok=True)


@signals.worker_shutting_down.connect  # type: ignore[untyped-decorator]
def _parent_stops(**_: Any) -> None:
    path = stop_file(load_settings(), os.getpid())
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.touch()


@signals.worker_shutdown.connect  # type: ignore[untyped-decorator]
def _parent_ends(**_: Any) -> None:
    stop_file(load_settings(), os.getpid()).unlink(missing_ok=True)


@app.task(name=TRAIN, bind=True)  # type: ignore[untyped-decorator]
def train(task: Any, job_id: str) -> dict[str, Any]:
    """Run one job of the ledger to its end, or up to the step at which it is parked or the worker stops."""
    return runtime().train(task, job_id)


@app.task(name=SYNC)  # type: ignore[untyped-decorator]
def sync(operation_id: str) -> None:
    """Write what changed since the last generation into the checkpoint."""
    runtime().run_operation(operation_id)


@app.task(name=ROLLBACK)  # type: ignore[untyped-decorator]
def rollback(operation_id: str, generation: int | None = None) -> None:
    """Bring a former generation back, on disk and in the live weights."""
    runtime().run_operation(operation_id)


@app.task(name=VERIFY)  # type: ignore[untyped-decorator]
def verify(operation_id: str) -> None:
    """Compare files, fingerprints and live weights."""
    runtime().run_operation(operation_id)


@app.task(name=TICK, ignore_result=True)  # type: ignore[untyped-decorator]
def tick() -> None:
    """Beat's regular question: is a sync due, is a job or a message lost?"""
    runtime().tick()
