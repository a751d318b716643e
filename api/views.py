"""Ledger rows as the API shows them."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from hogwild.api.schemas import CheckpointOut, JobOut, LossOut, OperationOut, StatusOut, StepsOut, VersionsOut
from hogwild.api.service import Service
from hogwild.tasks.jobs import Job
from hogwild.tasks.operations import Operation


def iso(seconds: float | None) -> str | None:
    """Seconds since the epoch as ISO 8601 in UTC."""
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def job_out(job: Job, losses: Sequence[float | None] | None = None) -> JobOut:
    """A job as JSON."""
    return JobOut.model_validate({
        "id": job.id, "state": job.state, "paused": job.paused, "requested": job.requested, "kind": job.kind,
        "priority": job.priority, "created_at": iso(job.created_at), "started_at": iso(job.started_at),
        "finished_at": iso(job.finished_at), "samples": job.samples, "tokens": job.tokens,
        "steps": StepsOut(total=job.steps, begun=job.steps_begun, applied=job.steps_applied,
                          interrupted=job.steps_interrupted),
        "plan": job.plan,
        "tokens_trained": job.tokens_trained, "seconds": round(job.seconds, 6),
        "loss": LossOut(first=_finite(job.loss_first), last=_finite(job.loss_last)),
        "losses": None if losses is None else list(losses),
        "weight_version": VersionsOut(first=job.weight_version_first, last=job.weight_version_last),
        "attempts": job.attempts, "error": job.error, "config": job.config, "metadata": job.metadata})


def operation_out(op: Operation) -> OperationOut:
    """An operation as JSON."""
    return OperationOut.model_validate({
        "id": op.id, "kind": op.kind, "state": op.state, "params": op.params, "created_at": iso(op.created_at),
        "started_at": iso(op.started_at), "finished_at": iso(op.finished_at), "result": op.result, "error": op.error})


def checkpoint_out(service: Service) -> CheckpointOut:
    """Saved generations and unsaved steps: what the worker reported, and the debounce."""
    reported = service.registry.checkpoint() or {}
    dirty = service.dirty.state()
    last: dict[str, Any] | None = None
    if dirty.generation is not None:
        last = {**(reported.get("last_sync") or {}), "generation": dirty.generation,
                "weight_version": dirty.synced_version, "at": iso(dirty.synced_at)}
    return CheckpointOut(
        directory=reported.get("directory"), head=reported.get("head"), generations=reported.get("generations", []),
        unsaved_steps=dirty.steps, unsaved_since=iso(dirty.oldest_at), last_sync=last)


def status_out(service: Service) -> StatusOut:
    """The whole service at one moment."""
    counts = service.ledger.counts()
    worker = service.registry.worker()
    running = service.ledger.list(limit=1, state="running").jobs
    model = service.registry.model_or_none()
    # The worker tells its version every few seconds, the ledger with every step; it only ever rises.
    told = ((worker or {}).get("weight_version"), *(job.weight_version_last for job in running))
    version = max((v for v in told if v is not None), default=None)
    return StatusOut(
        model=None if model is None else model.public(), worker=worker, weight_version=version, jobs=counts,
        queue_depth=counts["queued"], queue_limit=service.settings.queue_limit,
        running=job_out(running[0]) if running else None, checkpoint=checkpoint_out(service))


def _finite(value: float | None) -> float | None:
    return value if value is not None and abs(value) < float("inf") else None
