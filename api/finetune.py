"""OpenAI's fine-tuning objects, and what they mean here."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StringConstraints

from hogwild.api.schemas import FiniteFloat, Metadata, Strict
from hogwild.api.validation import complete_config
from hogwild.errors import InvalidRequest
from hogwild.gpu_worker.config import INTEGERS, NUMBERS, TrainConfig
from hogwild.tasks.jobs import Job
from hogwild.tasks.registry import ModelInfo

Name = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Auto = Literal["auto"]


class Hyperparameters(Strict):
    """As OpenAI names them; "auto" is the same as leaving one out."""

    n_epochs: Auto | Annotated[StrictInt, Field(**INTEGERS["epochs"])] = "auto"
    learning_rate_multiplier: Auto | Annotated[FiniteFloat, Field(**NUMBERS["learning_rate_multiplier"])] = Field(
        "auto", description="Times the optimizer's usual learning rate.")
    batch_size: Auto | Annotated[StrictInt, Field(ge=1)] = Field(
        "auto", description="Only \"auto\": samples are packed to a number of tokens; see "
        "`hogwild.max_tokens_per_step`.")


class Supervised(Strict):
    """The method's own hyperparameters."""

    hyperparameters: Hyperparameters | None = None


class Method(Strict):
    """Only supervised fine-tuning."""

    type: Literal["supervised"]
    supervised: Supervised | None = None


class Options(BaseModel):
    """Options of `POST /train`; those of the engine are checked as it takes them."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    priority: Annotated[StrictInt, Field(ge=0, le=9)] | None = Field(None, description="9 goes first, 0 last.")


class CreateRequest(Strict):
    """A fine-tuning job from an uploaded file."""

    model_config = ConfigDict(json_schema_extra={"examples": [
        {"model": "SmolLM2-135M-Instruct", "training_file": "file-0123456789abcdef01234567",
         "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 8}}}}]})

    model: Name = Field(description="The served model.")
    training_file: Name = Field(description="An uploaded file.")
    hyperparameters: Hyperparameters | None = Field(None, description="The older place of method.supervised's.")
    method: Method | None = None
    seed: Annotated[StrictInt, Field(**INTEGERS["seed"])] | None = None
    suffix: Annotated[str, StringConstraints(max_length=64)] | None = Field(
        None, description="Kept with the job; the model's name does not change.")
    metadata: Metadata | None = None
    validation_file: None = Field(None, description="Not supported.")
    integrations: Annotated[list[Any], Field(max_length=0)] | None = Field(None, description="Not supported.")
    hogwild: Options | None = Field(
        None, description="Options of `POST /train` that OpenAI's API has no name for (with its Python client: "
        "`extra_body={\"hogwild\": {…}}`).", json_schema_extra={"example": {"optimizer": "apollo"}})


class ErrorObject(BaseModel):
    """Why a job failed."""

    code: str
    message: str
    param: str | None = None


class JobObject(BaseModel):
    """A fine-tuning job as OpenAI's clients read it. Times are seconds since the epoch."""

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    error: ErrorObject | None
    fine_tuned_model: str | None = Field(description="Served model and the weight version that the job made.")
    hyperparameters: dict[str, Any]
    method: dict[str, Any]
    model: str
    organization_id: str = "hogwild"
    result_files: list[str] = []
    seed: int
    status: Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
    trained_tokens: int | None
    training_file: str
    validation_file: None = None
    estimated_finish: int | None
    integrations: list[Any] = []
    metadata: dict[str, str]


class JobList(BaseModel):
    """A page of jobs."""

    object: Literal["list"] = "list"
    data: list[JobObject]
    has_more: bool


class EventObject(BaseModel):
    """Something that happened to a job."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any]


class EventList(BaseModel):
    """A page of events."""

    object: Literal["list"] = "list"
    data: list[EventObject]
    has_more: bool


class CheckpointObject(BaseModel):
    """A generation of the checkpoint directory that holds steps of a job."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    metrics: dict[str, float | None]
    step_number: int


class CheckpointList(BaseModel):
    """A page of checkpoints."""

    object: Literal["list"] = "list"
    data: list[CheckpointObject]
    has_more: bool
    first_id: str | None
    last_id: str | None


def training_config(body: CreateRequest, served: ModelInfo) -> dict[str, Any]:
    """The engine's configuration of a request. Raises InvalidRequest."""
    chosen = body.method.supervised.hyperparameters if body.method and body.method.supervised else None
    hyper = chosen or body.hyperparameters or Hyperparameters()
    if hyper.batch_size != "auto":
        raise InvalidRequest("batch_size can only be 'auto': samples are packed to a number of tokens. Use "
                             "hogwild.max_tokens_per_step to make steps smaller or larger.", errors=[
                                 {"pointer": "/hyperparameters/batch_size", "field": "batch_size",
                                  "message": "must be 'auto'"}])
    config = dict(body.hogwild.model_extra or {}) if body.hogwild else {}
    unknown = sorted(set(config) - set(TrainConfig.field_names()))
    if unknown:
        raise InvalidRequest(f"hogwild.{unknown[0][:100]} is no option of POST /train.", errors=[
            {"pointer": f"/hogwild/{unknown[0][:100]}", "field": unknown[0][:100], "message": "is not known"}])
    if hyper.n_epochs != "auto":
        config["epochs"] = hyper.n_epochs
    if body.seed is not None:
        config["seed"] = body.seed
    if hyper.learning_rate_multiplier != "auto":
        config["learning_rate_multiplier"] = hyper.learning_rate_multiplier
    return complete_config(config, served)


def job_object(job: Job, served: str) -> JobObject:
    """A ledger row as OpenAI's object."""
    extra = job.extra
    hyper = ((extra.get("method") or {}).get("supervised") or {}).get("hyperparameters") or extra.get(
        "hyperparameters") or {}
    shown = {"n_epochs": "auto", "learning_rate_multiplier": "auto", "batch_size": "auto", **hyper}
    finish = None
    if job.state == "running" and job.steps and job.steps_applied and not job.paused:
        remaining = max(0, job.steps - job.steps_begun) * job.seconds / job.steps_applied
        finish = int((job.started_at or job.created_at) + job.seconds + remaining)
    error = None
    if job.error is not None and job.state == "failed":
        error = ErrorObject(code=str(job.error.get("type", "internal")), message=str(job.error.get("message", "")))
    return JobObject(
        id=job.id, created_at=int(job.created_at), error=error,
        finished_at=None if job.finished_at is None else int(job.finished_at),
        fine_tuned_model=model_at(served, job.weight_version_last) if job.state == "succeeded" else None,
        hyperparameters=shown, method={"type": "supervised", "supervised": {"hyperparameters": shown}},
        model=extra.get("model", served), seed=int(job.config.get("seed") or 0),
        status="paused" if job.paused else job.state,
        trained_tokens=job.tokens_trained if job.final else None, training_file=extra.get("training_file", ""),
        estimated_finish=finish, metadata=job.metadata)


def model_at(served: str, version: int | None) -> str:
    """`<served model>@v<weight version>`: which weights answer, now that they change in place."""
    return f"{served}@v{version if version is not None else 0}"


_MESSAGES = {
    "queued": "The job is queued.", "running": "A worker took the job.", "begun": "Training has started.",
    "paused": "The job is paused.",
    "resumed": "The job goes on.", "succeeded": "The job has succeeded.", "failed": "The job has failed.",
    "cancelled": "The job was cancelled.", "cancel_requested": "The job will be cancelled after this step.",
    "pause_requested": "The job will pause after this step.", "run_requested": "The job goes on.",
}


def event_objects(rows: Sequence[tuple[bytes, Mapping[bytes, bytes]]], job: Job) -> list[EventObject]:
    """Entries of a job's stream as OpenAI's events."""
    found = []
    for raw_id, fields in rows:
        event_id, kind, data = raw_id.decode(), fields[b"event"].decode(), json.loads(fields[b"data"])
        level: Literal["info", "warn", "error"] = "info"
        message = _MESSAGES.get(kind, kind)
        shown = data
        if kind == "step":
            total = data.get("steps") or job.steps
            loss = data.get("loss")
            message = f"Step {data['step'] + 1}/{total or '?'}" + (f": training loss={loss:.4g}" if loss is not None
                                                                   else "")
            shown = {"step": data["step"] + 1, "total_steps": total, "train_loss": loss,
                     "weight_version": data["weight_version"]}
        elif kind == "interrupted":
            level, message = "warn", f"Step {data['step'] + 1} was interrupted; it is not repeated."
        elif kind == "failed":
            level = "error"
            message = (data.get("error") or {}).get("message") or message
        found.append(EventObject(id=f"ftevent-{event_id}", created_at=int(event_id.partition("-")[0]) // 1000,
                                 level=level, message=message, type="metrics" if kind == "step" else "message",
                                 data=shown))
    return found


def checkpoint_objects(reported: Mapping[str, Any], job: Job, served: str) -> list[CheckpointObject]:
    """Generations that were written with this job's steps, newest first."""
    found = []
    for generation in reported.get("generations", []):
        if job.id not in generation.get("jobs", ()):
            continue
        version = int(generation.get("weight_version") or 0)
        first = job.weight_version_first or 0
        steps = max(0, min(job.steps_applied, version - first + 1))
        found.append(CheckpointObject(
            id=f"ftckpt-{generation['generation']}-{job.id}", created_at=_seconds(generation.get("created_at")),
            fine_tuned_model_checkpoint=model_at(served, version), fine_tuning_job_id=job.id, step_number=steps,
            metrics={"step": float(steps), "train_loss": job.loss_last}))
    return found


def _seconds(value: Any) -> int:
    if isinstance(value, str):
        return int(datetime.fromisoformat(value).timestamp())
    return int(value or 0)
