"""What a job will need, before it starts: a refusal with numbers instead of an out-of-memory in somebody's server.

Needed on top of the weights, which vLLM holds:

    optimizer state not yet there
    + gradients held between packs, float32   (accumulation only)
    + the largest of three moments of the step:
        backward begins   activations of all layers + logits of one chunk + the head's gradient
        in the layers     activations of all layers + one layer recomputed and differentiated + its gradients
                          (+ the head's gradient, when the head is tied: it waits for the embedding's)
        backward ends     the embedding's gradient (tied: the head's beside it)

Bytes per token are measured on the model by `measure`, for each kind of row, not derived from a table of architectures.
They are linear in its length where attention is fused; a mask or the attention's weights grow with its square. Behind a
frozen context a layer that keeps its activations also has the context's keys and values beside those of its own tokens
(and is not compiled). The rest is arithmetic on shapes.
"""

from collections.abc import Callable, Mapping, Set
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

import psutil
import torch
from torch import Tensor, nn

from hogwild.errors import DoesNotFit
from hogwild.gpu_worker.loss import CHUNK_BYTES
from hogwild.gpu_worker.recompute import ActivationMeter

# The allocator's fragments, cuBLAS workspaces and what the estimate does not know.
SLACK = 1.1
FIXED_BYTES = 64 << 20
# Never plan the last of the device's memory: vLLM shares it.
RESERVE = 0.05

# Row lengths of the measurement, evenly spaced and multiples of 16, to which some kernels pad their masks.
LENGTHS = (16, 48, 80)

GIVE_LESS = "Give vLLM less (--gpu-memory-utilization)."

T = TypeVar("T")

RowKind = Literal["one", "packed", "frozen"]
"""One sample; several of them side by side; one behind a context that runs without gradient."""

# Backward of one layer holds its saved activations and about as much again in gradients of them.
BACKWARD_OF_ACTIVATIONS = 2.0


@dataclass(frozen=True)
class Profile:
    """Activation bytes of a model in one kind of row: for each token, unless said otherwise."""

    layer: float
    """Kept by one layer (the largest), when it is not checkpointed."""
    elsewhere: float
    """Kept outside the layers: embedding, last norm."""
    boundary: float
    """One hidden state: what a checkpointed layer keeps."""
    cache: float
    """Keys and values of one token in all layers, for a frozen context."""
    layers: int
    context: float = 0.0
    """Kept by one layer for each token of a frozen context."""
    pair: float = 0.0
    """Kept by one layer for each pair of a token and one in its row: masks, attention that is not fused."""


@dataclass(frozen=True)
class Load:
    """The heaviest pack of a job."""

    tokens: int
    """Differentiated input tokens."""
    predictors: int
    """Positions with loss."""
    frozen: int = 0
    """Context tokens that run without gradient."""
    pairs: int = 0
    """Sum over the rows: differentiated tokens × all tokens."""


@dataclass(frozen=True)
class Budget:
    """Needed bytes, by what they are for, and what there is."""

    optimizer: int
    gradients: int
    activations: int
    working: int
    head: int
    embedding: int
    cache: int
    total: int
    free: int
    kept_layers: int

    @property
    def fits(self) -> bool:
        return self.total <= self.free

    @property
    def by_kind(self) -> dict[str, int]:
        """The bytes without `total` and `free`."""
        return {name: size for name, size in asdict(self).items() if name not in ("total", "free", "kept_layers")}

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / 1e6:,.0f} MB" for name, size in self.by_kind.items() if size)
        return f"{self.total / 1e6:,.0f} MB on top of the weights ({parts}); {self.free / 1e6:,.0f} MB are free"

    def refuse(self, what: str) -> DoesNotFit:
        """The error to raise when it doesn't."""
        return DoesNotFit(
            f"{what} needs {self}. Send shorter samples, train fewer parameters, choose apollo-mini, "
            "or give vLLM less (--gpu-memory-utilization).",
            **asdict(self),
        )


def free_bytes(device: torch.device, limit: int | None) -> int:
    """Memory that training may still take on a device, at most `limit`."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        allocated = torch.cuda.memory_allocated(device)
        cached = torch.cuda.memory_reserved(device) - allocated
        available = free + cached - int(RESERVE * min(free, total // 4))
        return available if limit is None else min(available, limit - allocated)
    available = int(psutil.virtual_memory().available * (1 - RESERVE))
    return available if limit is None else min(available, limit)


def out_of_memory(error: BaseException | None) -> str:
    """What the device's allocator said, when that is behind this error (a compiler wraps what it meets); else ''."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = getattr(error, "inner_exception", None) or error.__cause__
    return "" if error is None else str(error).split("\n", 1)[0] or "out of memory"


def within_memory(
    run: Callable[[], T], what: str, *, device: torch.device, limit: int | None, hint: str = GIVE_LESS, **details: Any
) -> T:
    """What `run` returns.

    Args:
        what: does `run`, in words that "ran out of memory" can follow.
        hint: what the user can do about it.
        details: more numbers for the error.

    Raises:
        DoesNotFit: it ran out of memory, and its tensors and the allocator's cache were freed. `free`: bytes there are
            now.
    """
    try:
        return run()
    except Exception as e:
        said = out_of_memory(e)
        if not said:
            raise
    # Outside the except block, whose traceback holds the tensors that have to go.
    if device.type == "cuda":
        torch.cuda.empty_cache()
    free = free_bytes(device, limit)
    raise DoesNotFit(
        f"{what} ran out of memory: {said} Now {free / 1e6:,.0f} MB are free. {hint}", free=free, **details
    )


def measure(
    model: nn.Module, layers: list[nn.Module], row: Callable[[int, int], Tensor], *, cache_bytes: float, frozen: bool
) -> Profile:
    """Profile a model with short rows; nothing must be checkpointed meanwhile.

    Args:
        row: runs so many tokens behind a frozen context of so many, returns hidden states (…, H).
        cache_bytes: keys and values of one token in all layers.
        frozen: with a frozen context.
    """
    boundary = 0

    def kept(tokens: int, context: int) -> tuple[int, int]:
        nonlocal boundary
        with torch.enable_grad(), ActivationMeter(model, layers) as meter:
            hidden = row(tokens, context)
        boundary = hidden.shape[-1] * hidden.element_size()
        return max(meter.by_layer, default=0), meter.elsewhere

    first, middle, last = LENGTHS
    context, span = first if frozen else 0, last - first
    (short, outside), (half, _), (long, outside_long) = (kept(tokens, context) for tokens in LENGTHS)
    # f(t) = a + layer · t + pair · t · (t + context): the second difference is 2 · pair · (middle - first)²
    pair = max(0.0, (long - 2 * half + short) / (2 * (middle - first) ** 2))
    of_context = (kept(first, last)[0] - short) / span - pair * first if frozen else 0.0
    return Profile(
        layer=max(0.0, (long - short) / span - pair * (first + last + context)),
        elsewhere=max(0.0, (outside_long - outside) / span),
        boundary=float(boundary),
        cache=cache_bytes,
        layers=len(layers),
        context=max(0.0, of_context),
        pair=pair,
    )


def budget(
    profile: Profile, load: Load, *, params: Mapping[str, Tensor], tokens: Set[str], head: Tensor, whole_logits: bool,
    layer_gradients: int, optimizer_bytes: int, accumulates: bool, free: int,
) -> Budget:  # fmt: skip
    """What `load` needs, keeping the activations of as many layers as the free memory allows.

    Args:
        params: the trained parameters.
        tokens: names of the embedding and of the head.
        head: the output embedding's weight, (V, H).
        whole_logits: logits are made for all predictors at once.
        layer_gradients: bytes of a layer's gradients that exist at once.
        optimizer_bytes: state that does not exist yet.
        accumulates: gradients are held from pack to pack, in float32.
    """
    vocabulary = head.shape[0]
    sizes = {name: p.numel() * p.element_size() for name, p in params.items()}
    of_tokens = [size for name, size in sizes.items() if name in tokens]
    trained_head = sum(sizes[name] for name, p in params.items() if p is head)
    tied_head = trained_head if len(tokens) == 1 else 0
    row = profile.boundary
    # float32 logits, the same in the model's precision, and one temporary.
    logits = 3 * min(4 * vocabulary * load.predictors, 2**63 if whole_logits else CHUNK_BYTES)
    head_bytes = logits + 2 * int(load.predictors * row) + trained_head
    of_layer = profile.layer * load.tokens + profile.context * load.frozen + profile.pair * load.pairs
    # A frozen context runs layer by layer without gradient: one layer's activations at a time.
    working = int(BACKWARD_OF_ACTIVATIONS * of_layer + profile.layer * load.frozen)
    working += layer_gradients + tied_head
    # The gradient and one temporary as large; the layers' activations are gone by then.
    embedding = 2 * max(of_tokens, default=0) + tied_head
    gradients = sum(4 * p.numel() for p in params.values()) if accumulates else 0  # float32
    cache = int(profile.cache * load.frozen)
    least = int(load.tokens * (row * profile.layers + profile.elsewhere))

    def total(activations: int) -> int:
        step = max(activations + max(head_bytes, working), embedding)
        peak = step + gradients + cache + optimizer_bytes
        return int(peak * SLACK) + FIXED_BYTES

    extra = max(1.0, of_layer - row * load.tokens)
    kept = min(profile.layers, max(0, int((free - total(least)) / (extra * SLACK))))
    activations = least + int(kept * extra)
    return Budget(
        optimizer=optimizer_bytes, gradients=gradients, activations=activations, working=working, head=head_bytes,
        embedding=embedding, cache=cache, total=total(activations), free=free, kept_layers=kept,
    )  # fmt: skip
