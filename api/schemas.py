"""Bodies of requests and answers. What is checked here: types and shapes; what the model decides: `validation.py`."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StringConstraints

from hogwild.gpu_worker.config import (
    INTEGERS,
    MOST_PATTERN_CHARACTERS,
    MOST_PATTERNS,
    NUMBERS,
    OptimizerName,
    ScheduleName,
)

# The limits of OpenAI's API, which its clients already know.
Metadata = Annotated[
    dict[Annotated[str, StringConstraints(min_length=1, max_length=64)],
         Annotated[str, StringConstraints(max_length=512)]],
    Field(max_length=16, description="Labels of your own: up to 16 pairs, shown and filtered by, never interpreted.")]
Pattern = Annotated[str, StringConstraints(min_length=1, max_length=MOST_PATTERN_CHARACTERS)]
FiniteFloat = Annotated[float, Field(allow_inf_nan=False, strict=True)]

_EXAMPLE_SAMPLE: dict[str, Any] = {"context_ids": [504, 3575, 282, 4649, 314], "continuation_ids": [7042, 30]}


class Strict(BaseModel):
    """Unknown fields are errors: a misspelt option must not be ignored."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class SampleIn(Strict):
    """One sample: the model learns to continue `context_ids` with `continuation_ids`."""

    context_ids: list[StrictInt] = Field([], description="Token ids before the part that is learned; may be empty.")
    continuation_ids: list[StrictInt] = Field(description="Token ids to learn: the loss is taken on these only.")
    weights: list[FiniteFloat] | None = Field(
        None, description="Weight of each continuation token in the loss, 0 or more; default: 1 each.")


class TrainRequest(Strict):
    """A training job: one sample at the top level, or several in `samples`."""

    model_config = ConfigDict(json_schema_extra={"examples": [
        {**_EXAMPLE_SAMPLE, "steps": 8},
        {"samples": [_EXAMPLE_SAMPLE, {"context_ids": [], "continuation_ids": [504, 3575], "weights": [0, 1]}],
         "epochs": 4, "learning_rate": 1e-4, "optimizer": "apollo", "metadata": {"source": "corrections"}}]})

    context_ids: list[StrictInt] | None = Field(None, description="As in a sample.")
    continuation_ids: list[StrictInt] | None = Field(None, description="As in a sample.")
    weights: list[FiniteFloat] | None = Field(None, description="As in a sample.")
    samples: list[SampleIn] | None = Field(None, description="Several samples, instead of the three fields above.")

    learning_rate: FiniteFloat | None = Field(
        None, **NUMBERS["learning_rate"], description="Peak rate; default: by optimizer and width.")
    learning_rate_multiplier: FiniteFloat | None = Field(
        None, **NUMBERS["learning_rate_multiplier"], description="Factor of the peak rate, given or by default.")
    steps: StrictInt | None = Field(None, **INTEGERS["steps"], description="Optimizer steps; not with epochs.")
    epochs: StrictInt | None = Field(
        None, **INTEGERS["epochs"], description="Passes over the samples; not with steps.")
    optimizer: OptimizerName | None = Field(
        None, description="Default: HOGWILD_OPTIMIZER.")
    context_grad: StrictBool | None = Field(
        None, description="False: the context runs without gradient, memory follows the continuation's length.")
    seed: StrictInt | None = Field(None, **INTEGERS["seed"], description="Of shuffling and stochastic rounding.")
    shuffle: StrictBool | None = Field(None, description="Draw a new order for every epoch (default).")
    warmup_steps: StrictInt | None = Field(
        None, **INTEGERS["warmup_steps"], description="Steps of linear warm-up; default: an eighth of them.")
    schedule: ScheduleName | None = Field(None, description="Rate after the warm-up.")
    weight_decay: FiniteFloat | None = Field(
        None, **NUMBERS["weight_decay"], description="Decoupled weight decay.")
    gradient_accumulation: StrictInt | None = Field(
        None, **INTEGERS["gradient_accumulation"], description="Packs in one step.")
    trainable: list[Pattern] | None = Field(
        None, min_length=1, max_length=MOST_PATTERNS,
        description="Shell patterns over parameter names; default: all.")
    max_tokens_per_step: StrictInt | None = Field(
        None, **INTEGERS["max_tokens_per_step"], description="Input tokens in one step.")
    rank: StrictInt | None = Field(None, **INTEGERS["rank"], description="Rank of APOLLO's projection.")
    scale: FiniteFloat | None = Field(
        None, **NUMBERS["scale"], description="α, APOLLO's factor of each update; default: √(m / r) of each matrix.")
    replay: FiniteFloat | None = Field(
        None, **NUMBERS["replay"],
        description="Weight of staying as it was on text of its own (default 1); 0: no replay.")
    replay_tokens: StrictInt | None = Field(
        None, **INTEGERS["replay_tokens"], description="Tokens of its own text in each step (default 256).")
    max_nonfinite_steps: StrictInt | None = Field(
        None, **INTEGERS["max_nonfinite_steps"],
        description="Steps in a row without finite gradient before the job fails.")

    priority: StrictInt = Field(5, ge=0, le=9, description="9 goes first, 0 last.")
    metadata: Metadata = {}


class RollbackRequest(Strict):
    """Which state of the weights to return to."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"generation": 3}]})

    generation: StrictInt = Field(ge=0, lt=2**62, description="A generation of `GET /checkpoint`.")


class StepsOut(BaseModel):
    """Optimizer steps of a job."""

    total: int | None = Field(description="Steps of the plan; null until a worker has planned the job.")
    begun: int
    applied: int
    interrupted: int = Field(description="Begun but not finished, because a worker died; never repeated.")


class LossOut(BaseModel):
    """Mean loss on the continuation tokens."""

    first: float | None
    last: float | None


class VersionsOut(BaseModel):
    """Weight versions that the job's first and last step made."""

    first: int | None
    last: int | None


class MemoryOut(BaseModel):
    """Bytes on top of the weights, by what they are for. Not all of them are there at the same moment."""

    optimizer: int = Field(description="State that was not there yet.")
    gradients: int = Field(description="Held between the packs of a step, float32.")
    activations: int
    working: int = Field(description="Of one layer in backward, with its gradients.")
    head: int = Field(description="Logits of a chunk, and the head's gradient.")
    embedding: int = Field(description="The embedding's gradient.")
    cache: int = Field(description="Keys and values of a context without gradient.")
    total: int = Field(description="At the worst moment.")
    free: int = Field(description="When the job was planned.")


class PlanOut(BaseModel):
    """How the worker laid the job out, and what that takes."""

    pack_tokens: int = Field(description="Most tokens in one pass; 0: one sample at a time.")
    asked_pack_tokens: int = Field(description="The same with enough memory.")
    asked_steps: int = Field(description="Steps with enough memory.")
    layers: int
    kept_layers: int = Field(description="Layers that keep their activations; the others are recomputed.")
    optimizer_state: int = Field(description="Bytes of the optimizer's whole state.")
    memory: MemoryOut


class JobOut(BaseModel):
    """A job. Times are ISO 8601, UTC."""

    id: str
    object: Literal["train.job"] = "train.job"
    state: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    paused: bool
    requested: Literal["run", "pause", "cancel"] = Field(description="What was asked for last.")
    kind: Literal["train", "fine_tuning"]
    priority: int
    created_at: str
    started_at: str | None
    finished_at: str | None
    samples: int
    tokens: int
    steps: StepsOut
    plan: PlanOut | None = Field(description="Null until a worker has planned the job.")
    tokens_trained: int
    seconds: float
    loss: LossOut
    losses: list[float | None] | None = Field(
        None, description="Loss of each of the last 1,000 applied steps; only when one job is asked for.")
    weight_version: VersionsOut
    attempts: int
    error: dict[str, Any] | None
    config: dict[str, Any]
    metadata: dict[str, str]


class AcceptedOut(BaseModel):
    """A job was accepted: it is on disk."""

    id: str
    object: Literal["train.job"] = "train.job"
    state: str
    samples: int
    tokens: int


class JobPage(BaseModel):
    """Jobs, newest first."""

    object: Literal["list"] = "list"
    data: list[JobOut]
    has_more: bool
    next_cursor: str | None = Field(description="Give it as `cursor` to get the next page.")


class OperationOut(BaseModel):
    """A sync, rollback or verification that was asked for. Times are ISO 8601, UTC."""

    id: str
    object: Literal["operation"] = "operation"
    kind: Literal["sync", "rollback", "verify"]
    state: Literal["pending", "running", "succeeded", "failed"]
    params: dict[str, Any]
    created_at: str
    started_at: str | None
    finished_at: str | None
    result: dict[str, Any] | None
    error: dict[str, Any] | None


class CheckpointOut(BaseModel):
    """What is saved and what is not."""

    object: Literal["checkpoint"] = "checkpoint"
    directory: str | None
    head: int | None = Field(description="Newest generation.")
    generations: list[dict[str, Any]] = Field(description="Generations that can be rolled back to, newest first.")
    unsaved_steps: int
    unsaved_since: str | None
    last_sync: dict[str, Any] | None


class StatusOut(BaseModel):
    """The service at one moment."""

    object: Literal["status"] = "status"
    model: dict[str, Any] | None = Field(description="Null until a worker attached for the first time.")
    worker: dict[str, Any] | None = Field(description="Last report of the worker; `alive`: it still reports.")
    weight_version: int | None
    jobs: dict[str, int] = Field(description="Number of jobs in each state.")
    queue_depth: int
    queue_limit: int
    running: JobOut | None
    checkpoint: CheckpointOut
