"""What passes between the engine and whoever runs it: reports out, permission to go on in.

The engine knows nothing of ledgers, queues or HTTP. Around every optimizer step it calls a `Control`; pausing, pacing,
cancelling, syncing and rolling back all happen inside those calls, when no weight is being written.

    before_step(k) ─► between_micro_steps() ─► pack ─► … ─► last pack, weights written ─► after_step(…)
"""

from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One optimizer step, after it was applied (or dropped)."""

    step: int
    """Index from 0 within the job."""
    n_steps: int
    loss: float
    """Weighted mean cross-entropy (nats) over the step's continuation tokens, before the update. May be nan."""
    tokens: int
    """Input tokens that ran through the model."""
    loss_tokens: int
    """Continuation tokens in the loss."""
    seconds: float
    learning_rate: float
    grad_norm: float
    """L2 norm over all finite gradients; 0.0 when the step was dropped."""
    replay_divergence: float | None = None
    """Mean divergence (nats a token) from the model at the job's start on the replayed text, before the update; None:
    nothing was replayed."""
    nonfinite: tuple[str, ...]
    """Parameters left untouched because their gradient was not finite; `("loss",)` when the loss was not."""
    applied: bool
    """False: no weight was written, because the loss or every gradient was not finite."""

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


@dataclass(kw_only=True)
class TrainResult:
    """A finished run: from `first_step` to the end of the plan."""

    first_step: int
    n_steps: int
    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    loss_tokens: int = 0
    seconds: float = 0.0
    nonfinite_steps: int = 0
    optimizer_bytes: int = 0
    """Size of the optimizer's state, in bytes."""
    peak_bytes: int | None = None
    """Most CUDA memory that this process had allocated during the run; None on CPU."""


class Control(Protocol):
    """The engine's side of job control. Any of these may raise `JobCancelled` (or another error) to end the run."""

    def before_step(self, step: int) -> None:
        """No gradient exists and no weight is being written. May block: pause, pace, sync, roll back."""

    def after_step(self, report: StepReport) -> None:
        """The weights of this step are in place."""

    def between_micro_steps(self) -> None:
        """Before each forward pass: the yield point of the pacing governor."""


class Unattended:
    """A control that never interferes: for tests, benches and library use."""

    def before_step(self, step: int) -> None:
        pass

    def after_step(self, report: StepReport) -> None:
        pass

    def between_micro_steps(self) -> None:
        pass
