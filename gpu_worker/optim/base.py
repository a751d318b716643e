"""The interface of all optimizers: one parameter at a time, as its gradient appears inside backward.

    begin_job() ─► [ begin_step(lr) ─► step_param(name, p, grad) for each parameter ─► end_step() ] …

State lives here across steps and jobs, in float32, created at a parameter's first update. A gradient that is not
finite changes neither weight nor state of its tensor; the decision is made on the device, so CUDA never waits for the
host until `end_step` fetches one small array.
"""

import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hogwild.errors import TrainingError
from hogwild.gpu_worker.inplace import as_matrices, rounding_key, sum_of_squares

State = dict[str, Tensor]

FORMAT = "hogwild-optimizer"
FORMAT_VERSION = "1"


@dataclass(frozen=True)
class StepStats:
    """What one optimizer step saw."""

    grad_norm: float
    """L2 norm over the finite gradients."""
    nonfinite: tuple[str, ...]
    """Parameters that were left alone."""
    updated: int
    """Parameters that were written."""


class Optimizer(ABC):
    """Base of SGD, AdamW and APOLLO.

    Args:
        weight_decay: decoupled; set anew by each job.
        token_params: names of embeddings and heads, whose rows belong to single tokens.
    """

    kind: ClassVar[str]

    def __init__(self, *, weight_decay: float = 0.0, token_params: Collection[str] = ()) -> None:
        self.weight_decay = weight_decay
        self.token_params = frozenset(token_params)
        self.steps = 0
        """Optimizer steps begun since the state was created; seeds rounding and projections."""
        self.job = ""
        """Fingerprint of the job that the state was updated in last; empty: none, or not known."""
        self.state: dict[str, State] = {}
        self.lr = 0.0
        self._seed = 0
        self._squares: dict[str, Tensor] = {}

    # --- one step --------------------------------------------------------------------------------------------------

    def begin_job(self) -> None:  # noqa: B027  (most optimizers have nothing to do)
        """A new job starts: forget what only makes sense within one stream of gradients."""

    def clear(self) -> None:
        """Drop all state. The count of steps goes on: no random bits are drawn a second time."""
        self.state.clear()
        self._squares.clear()

    def begin_step(self, lr: float, *, seed: int = 0) -> None:
        """Start an optimizer step at learning rate `lr`; `seed` is the job's."""
        self.lr = lr
        self.steps += 1
        self._seed = seed
        self._squares.clear()

    @torch.no_grad()
    def step_param(self, name: str, p: Tensor, grad: Tensor) -> None:
        """Update one parameter in place and spend its gradient.

        Args:
            p: the live weight (any strides); only its data is mutated.
            grad: same shape; overwritten.
        """
        weight, g = as_matrices(p.data), as_matrices(grad)
        key = rounding_key(self._seed, self.steps, name)
        state = self.state.get(name)
        if state is None:
            state = self.state[name] = self.new_state(name, weight)
        self._squares[name] = self.update(name, weight, g, state, key, self.weight_decay if p.ndim > 1 else 0.0)

    def end_step(self) -> StepStats:
        """Finish the step; waits for the device once."""
        if not self._squares:
            return StepStats(0.0, (), 0)
        squares = torch.stack(list(self._squares.values())).double().cpu()
        finite = squares.isfinite()
        bad = tuple(name for name, good in zip(self._squares, finite.tolist(), strict=True) if not good)
        self._squares.clear()
        return StepStats(float(squares[finite].sum().sqrt()), bad, int(finite.sum()))

    def abort_step(self) -> None:
        """Forget a step that was interrupted."""
        self._squares.clear()

    # --- what an optimizer is --------------------------------------------------------------------------------------

    @abstractmethod
    def update(self, name: str, p: Tensor, g: Tensor, state: State, key: int, weight_decay: float) -> Tensor:
        """Apply one update to `p` (B, m, n); returns Σ g² (scalar, not finite when nothing was applied)."""

    @abstractmethod
    def state_shapes(self, name: str, shape: torch.Size) -> dict[str, tuple[int, ...]]:
        """Shapes of the state tensors (all float32) of a parameter of this (B, m, n) shape."""

    def settings(self) -> dict[str, str]:
        """What must agree for a saved state to be used again."""
        return {}

    def is_like(self, other: "Optimizer") -> bool:
        """Whether the other could go on with this one's state."""
        return (self.kind, self.settings()) == (other.kind, other.settings())

    def follow(self, other: "Optimizer") -> None:
        """Take from another of the same kind, made for the next job, what the state does not depend on."""
        self.weight_decay = other.weight_decay

    def new_state(self, name: str, p: Tensor) -> State:
        """Zeroed state for a parameter (B, m, n)."""
        return {
            k: torch.zeros(s, dtype=torch.float32, device=p.device) for k, s in self.state_shapes(name, p.shape).items()
        }

    def is_vector(self, shape: torch.Size) -> bool:
        """Whether (B, m, n) is a norm, a bias or something else too thin to be treated as a matrix."""
        return min(shape[1], shape[2]) < 2

    def state_bytes(self, params: Mapping[str, Tensor]) -> int:
        """Bytes of state that these parameters need in all, known before any of it exists."""
        return sum(self.param_state_bytes(n, p) for n, p in params.items())

    def param_state_bytes(self, name: str, p: Tensor) -> int:
        """The same for one parameter."""
        shapes = self.state_shapes(name, as_matrices(p).shape)
        return sum(4 * torch.Size(s).numel() for s in shapes.values())

    def allocated_bytes(self) -> int:
        """Bytes of state that exist now."""
        return sum(t.nbytes for state in self.state.values() for t in state.values())

    # --- saving ----------------------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write the state as one safetensors file: whole or not at all, also when the machine dies."""
        tensors = {f"{key}/{name}": t.contiguous() for name, state in self.state.items() for key, t in state.items()}
        metadata = {"format": FORMAT, "format_version": FORMAT_VERSION, "kind": self.kind}
        metadata |= {"steps": str(self.steps), "job": self.job}
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            temporary = Path(folder) / "state"
            save_file(tensors, temporary, metadata | self.settings())
            with temporary.open("rb") as f:
                os.fsync(f.fileno())
            temporary.replace(path)
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def load(self, path: Path, params: Mapping[str, Tensor]) -> None:
        """Replace the state by a saved one, for these parameters of the live model.

        Raises:
            TrainingError: the file is of another optimizer or does not fit these parameters; nothing was changed.
        """
        loaded: dict[str, State] = {}
        # safetensors' own error type is not public in every release: anything it raises means an unreadable file.
        try:
            with safe_open(path, "pt") as f:
                metadata = f.metadata() or {}
                wanted = {"format": FORMAT, "format_version": FORMAT_VERSION, "kind": self.kind} | self.settings()
                for key, value in wanted.items():
                    if metadata.get(key) != value:
                        raise TrainingError(
                            f"The optimizer state in {path} has {key} = {metadata.get(key)!r}, this run needs "
                            f"{value!r}: delete the file to start with fresh state."
                        )
                for full in f.keys():  # noqa: SIM118  (safe_open is no mapping)
                    key, name = full.split("/", 1)
                    if name in params:
                        loaded.setdefault(name, {})[key] = f.get_tensor(full).to(params[name].device)
        except (TrainingError, torch.OutOfMemoryError):  # the file is good, there is only no room for it
            raise
        except Exception as e:
            raise TrainingError(f"The optimizer state in {path} can't be read: delete it to start afresh.") from e
        for name, state in loaded.items():
            shapes = self.state_shapes(name, as_matrices(params[name]).shape)
            if {k: tuple(t.shape) for k, t in state.items()} != shapes:
                raise TrainingError(
                    f"The optimizer state in {path} was made for another shape of {name}: delete it to start afresh."
                )
        self.state, self.steps, self.job = loaded, int(metadata["steps"]), metadata.get("job", "")


def measured(g: Tensor) -> tuple[Tensor, Tensor]:
    """(Σ g², whether it is finite): both scalars on the device."""
    squares = sum_of_squares(g)
    return squares, squares.isfinite()
