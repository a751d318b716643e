"""What one training job asks of the engine: every field, its default, its bounds and what it means.

Free of torch, so that the API can check a request with the same code that will run it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from hogwild.errors import InvalidRequest

OptimizerName = Literal["apollo", "apollo-mini", "adamw", "sgd"]
ScheduleName = Literal["constant", "linear", "cosine"]

OPTIMIZERS: tuple[str, ...] = get_args(OptimizerName)
SCHEDULES: tuple[str, ...] = get_args(ScheduleName)

# Rates of jobs that name none: measured with bench/learning.py on a model of this width (docs/training.md). For wider
# ones the adaptive optimizers' are smaller in proportion: each weight moves by about the rate, and what that does to
# an output grows with the number of its inputs (arXiv 2203.03466, table 3).
DEFAULT_LEARNING_RATE: dict[str, float] = {"apollo": 4e-4, "apollo-mini": 2.4e-4, "adamw": 2.4e-4, "sgd": 5e-3}
REFERENCE_WIDTH = 576

# A job that names no warm-up takes so many-th of its steps for it.
WARMUP_SHARE = 8

# A job that names neither epochs nor steps passes over its samples eight times, in four steps each time where it has
# the samples for that, and takes at least as many steps as that makes (same source).
DEFAULT_EPOCHS = 8
STEPS_PER_EPOCH = 4
LEAST_STEPS = DEFAULT_EPOCHS * STEPS_PER_EPOCH

# Tokens in one packed forward pass unless the job says otherwise: enough to keep a GPU compute-bound at 8 B
# parameters, small enough that checkpointed activations stay near 1 GB there.
DEFAULT_PACK_TOKENS = 4096

# Rank of APOLLO's auxiliary space; Mini is rank 1 by definition. The paper's experiments use 256 (arXiv 2412.05270,
# section 5); 32 learned as much on the task of bench/learning.py, at an eighth of the memory.
DEFAULT_RANK = {"apollo": 32, "apollo-mini": 1}

# What the options may be, in the words of pydantic's Field, which says it in the API's document.
INTEGERS: dict[str, dict[str, Any]] = {
    "epochs": {"ge": 1, "le": 100_000},
    "steps": {"ge": 1, "le": 1_000_000},
    "seed": {"ge": 0, "le": 2**62 - 1},  # keeps every derived seed inside 63 bits
    "warmup_steps": {"ge": 0, "le": 1_000_000},
    "gradient_accumulation": {"ge": 1, "le": 100_000},
    "max_tokens_per_step": {"ge": 1, "le": 2**31 - 1},
    "rank": {"ge": 1, "le": 65_536},
    "replay_tokens": {"ge": 1, "le": 1_000_000},
    "max_nonfinite_steps": {"ge": 1, "le": 1_000_000},
}
NUMBERS: dict[str, dict[str, Any]] = {
    "learning_rate": {"gt": 0, "le": 10},
    "learning_rate_multiplier": {"gt": 0, "le": 1_000_000},
    "weight_decay": {"ge": 0, "le": 10},
    "replay": {"ge": 0, "le": 1000},
    "scale": {"gt": 0, "le": 10_000},
}
MOST_PATTERNS = 100
MOST_PATTERN_CHARACTERS = 200

# Samples that one job may train, each counted every time: all of them are laid out before the first step. So many took
# up to 90 s and 3 GB of host memory (two samples a pack, one pack a step).
MOST_TRAINED = 10_000_000


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One job's hyperparameters, checked on construction.

    Raises:
        InvalidRequest: a field is out of bounds; `details["field"]` names it.
    """

    optimizer: str = "apollo"
    """One of `apollo`, `apollo-mini`, `adamw`, `sgd`."""
    learning_rate: float | None = None
    """Peak rate; None: `default_rate`."""
    learning_rate_multiplier: float = 1.0
    """Factor of the peak rate, given or by default."""
    epochs: int | None = None
    """Passes over the samples. Not together with `steps`; neither: `DEFAULT_EPOCHS`, and at least `LEAST_STEPS`
    steps."""
    steps: int | None = None
    """Optimizer steps; the samples are repeated (and shuffled anew) until they are done."""
    context_grad: bool = True
    """False: the context runs without gradient into a KV cache; memory follows the continuation."""
    seed: int = 0
    """Of the shuffling and of the stochastic rounding."""
    shuffle: bool = True
    """Draw a new order for every epoch; False: the order given."""
    warmup_steps: int | None = None
    """Steps over which the rate rises linearly from rate/warmup_steps to its peak; None: an eighth of the job's. The
    moments of the first steps are made of few gradients, and a whole rate along them throws a model far out."""
    schedule: str = "linear"
    """After the warm-up: `constant`, `linear` to zero, or `cosine` to zero."""
    weight_decay: float = 0.0
    """Decoupled: each step multiplies a matrix by 1 - rate · weight_decay. Vectors are never decayed."""
    gradient_accumulation: int = 1
    """Packs in one optimizer step. Above 1 all gradients are held between packs: 4 bytes for each trained weight."""
    trainable: tuple[str, ...] | None = None
    """Shell patterns (fnmatch) over parameter names; only those that match one are trained. None: all."""
    max_tokens_per_step: int | None = None
    """Most input tokens in one optimizer step. None: `DEFAULT_PACK_TOKENS` for each pack, or fewer in a job that names
    neither epochs nor steps. A single longer sample still forms a pack of its own."""
    rank: int | None = None
    """Rank of APOLLO's projection; None: `DEFAULT_RANK`. Only for `apollo`."""
    scale: float | None = None
    """α, APOLLO's factor of every matrix' update; None: √(m / r) of each, with which rates mean what they do for AdamW.
    The paper's experiments have 1 for `apollo` and 128 for `apollo-mini`. Only for these two."""
    replay: float = 1.0
    """Weight, in the loss of every step, of staying as it was: the mean Kullback-Leibler divergence (nats a token) from
    the model at the job's start, on text of its own. 0: no replay."""
    replay_tokens: int = 256
    """About how many tokens of its own text each step replays."""
    max_nonfinite_steps: int = 3
    """The job fails after this many steps in a row with a loss or gradient that is not finite."""

    def __post_init__(self) -> None:
        _choice("optimizer", self.optimizer, OPTIMIZERS)
        _choice("schedule", self.schedule, SCHEDULES)
        for name, bounds in NUMBERS.items():
            if (value := getattr(self, name)) is not None:
                _number(name, value, **bounds)
        for name, bounds in INTEGERS.items():
            if (value := getattr(self, name)) is not None:
                _integer(name, value, **bounds)
        if self.peak_rate > 10.0:
            raise InvalidRequest(
                f"The peak rate would be {self.peak_rate:g}; at most 10 is taken.", field="learning_rate_multiplier"
            )
        for name in ("context_grad", "shuffle"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidRequest(f"{name} must be true or false.", field=name)
        if self.epochs is not None and self.steps is not None:
            raise InvalidRequest("Give either epochs or steps, not both.", field="steps")
        if self.rank is not None and self.optimizer != "apollo":
            raise InvalidRequest(f"rank belongs to the optimizer 'apollo', not to {self.optimizer!r}.", field="rank")
        if self.scale is not None and self.optimizer not in ("apollo", "apollo-mini"):
            raise InvalidRequest(
                f"scale belongs to 'apollo' and 'apollo-mini', not to {self.optimizer!r}.", field="scale"
            )
        if self.trainable is not None:
            patterns: Any = self.trainable
            listed = isinstance(patterns, tuple | list) and len(patterns) > 0
            if not listed or not all(isinstance(p, str) and p for p in patterns):
                raise InvalidRequest("trainable must be a list of patterns such as '*.mlp.*'.", field="trainable")
            if len(patterns) > MOST_PATTERNS or max(map(len, patterns)) > MOST_PATTERN_CHARACTERS:
                raise InvalidRequest(
                    f"trainable may have {MOST_PATTERNS} patterns of {MOST_PATTERN_CHARACTERS} characters: use '*'.",
                    field="trainable",
                )
            object.__setattr__(self, "trainable", tuple(patterns))
        if self.max_tokens_per_step is not None and self.max_tokens_per_step < self.gradient_accumulation:
            raise InvalidRequest(
                "max_tokens_per_step leaves less than one token for each of the gradient_accumulation packs.",
                field="max_tokens_per_step",
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TrainConfig":
        """A job's JSON object, with the names of the fields above; None means the default.

        Raises:
            InvalidRequest: a name that is no field, or a value out of bounds.
        """
        known = cls.field_names()
        for name in values:
            if name not in known:
                raise InvalidRequest(f"Unknown training option {name!r}. Options: {', '.join(known)}.", field=name)
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if v is not None}
        return cls(**given)

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """Names that `from_dict` takes."""
        return tuple(f.name for f in fields(cls))

    @property
    def peak_rate(self) -> float:
        """The learning rate after the warm-up; without one given, that of a model of `REFERENCE_WIDTH`."""
        rate = DEFAULT_LEARNING_RATE[self.optimizer] if self.learning_rate is None else self.learning_rate
        return rate * self.learning_rate_multiplier

    def for_width(self, width: int) -> "TrainConfig":
        """With the rate of a model of hidden size `width` spelled out, where none was given."""
        if self.learning_rate is not None:
            return self
        return replace(self, learning_rate=default_rate(self.optimizer, width))

    @property
    def projection_rank(self) -> int:
        """Rank of APOLLO's auxiliary space; meaningless for the other optimizers."""
        return self.rank or DEFAULT_RANK.get(self.optimizer, 0)

    @property
    def names_no_length(self) -> bool:
        """Whether it is left to the engine how long the job is."""
        return self.epochs is None and self.steps is None

    def check_length(self, samples: int) -> None:
        """That a job of so many samples can be laid out, as far as it can be told before. Raises InvalidRequest."""
        if self.steps is not None:
            packs = self.steps * self.gradient_accumulation  # of one sample or more
            check_trained(packs, f"{self.steps:,} steps of {self.gradient_accumulation:,} packs", "steps")
        else:
            epochs = self.epochs or DEFAULT_EPOCHS
            check_trained(epochs * samples, f"{epochs:,} epochs of {samples:,} samples", "epochs")

    def pack_tokens(self, total: int) -> int:
        """Most input tokens in one pack (one forward and backward pass), for samples of `total` tokens."""
        if self.max_tokens_per_step is not None:
            return self.max_tokens_per_step // self.gradient_accumulation
        if self.names_no_length:
            return min(DEFAULT_PACK_TOKENS, -(-total // (STEPS_PER_EPOCH * self.gradient_accumulation)))
        return DEFAULT_PACK_TOKENS

    def rate_at(self, step: int, n_steps: int) -> float:
        """Learning rate of `step` (from 0) of a job of `n_steps` steps."""
        warmup = n_steps // WARMUP_SHARE if self.warmup_steps is None else self.warmup_steps
        if step < warmup:
            return self.peak_rate * (step + 1) / warmup
        if self.schedule == "constant":
            return self.peak_rate
        # Position after the warm-up in [0, 1): the last step still moves, a step at rate 0 would be wasted.
        position = (step - warmup) / max(1, n_steps - warmup)
        if self.schedule == "linear":
            return self.peak_rate * (1.0 - position)
        return self.peak_rate * 0.5 * (1.0 + math.cos(math.pi * position))


def default_rate(optimizer: str, width: int) -> float:
    """Peak rate of a job that names none, for a model of hidden size `width`."""
    scale = 1.0 if optimizer == "sgd" else min(1.0, REFERENCE_WIDTH / width)
    return DEFAULT_LEARNING_RATE[optimizer] * scale


def check_trained(count: int, what: str, field: str) -> None:
    """That `what` (whose length `field` says) trains no more than `MOST_TRAINED` samples. Raises InvalidRequest."""
    if count > MOST_TRAINED:
        raise InvalidRequest(
            f"{what} train at least {count:,} samples, each counted every time; one job may train {MOST_TRAINED:,}. "
            "Name fewer steps or epochs, or a smaller gradient_accumulation, or send several jobs.",
            field=field,
        )


def _choice(field: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InvalidRequest(f"{field} must be one of {', '.join(choices)}; got {value!r:.99}.", field=field)


def _integer(field: str, value: object, *, ge: int, le: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not ge <= value <= le:
        raise InvalidRequest(f"{field} must be a whole number from {ge} to {le:,}; got {value!r:.99}.", field=field)


def _number(field: str, value: object, *, gt: float | None = None, ge: float | None = None, le: float) -> None:
    # Compared as it came: an integer need not fit into a float, and NaN is neither above nor at least anything.
    good = isinstance(value, int | float) and not isinstance(value, bool) and value <= le
    if good and gt is not None:
        good = value > gt  # type: ignore[operator]
    if good and ge is not None:
        good = value >= ge  # type: ignore[operator]
    if not good:
        bound = f"above {gt}" if gt is not None else f"at least {ge}"
        raise InvalidRequest(f"{field} must be a number {bound} and at most {le:,}; got {value!r:.99}.", field=field)
