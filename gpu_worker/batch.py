"""Samples, the order they are trained in, and packs: several samples in one row without seeing each other.

A plan is a pure function of (lengths, config, pack size): a worker that restarts at step k rebuilds the same one.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hogwild.errors import InvalidRequest
from hogwild.gpu_worker.config import DEFAULT_EPOCHS, LEAST_STEPS, TrainConfig, check_trained

# Packs that stay open while samples are placed: first fit over a few keeps packs full without reordering far.
OPEN_PACKS = 16

Pack = tuple[int, ...]
"""Indices of the samples in one forward pass."""
Step = tuple[Pack, ...]
"""Packs of one optimizer step."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Token ids of one training example; the loss is on `continuation_ids` only.

    Raises:
        InvalidRequest: nothing to learn from, or weights that don't fit.
    """

    context_ids: Sequence[int]
    continuation_ids: Sequence[int]
    weights: Sequence[float] | None = None
    """One factor ≥ 0 for each continuation token; None: all 1."""

    def __post_init__(self) -> None:
        if len(self.continuation_ids) == 0:
            raise InvalidRequest("continuation_ids is empty: there is nothing to learn.", field="continuation_ids")
        if len(self.context_ids) == 0 and len(self.continuation_ids) < 2:
            raise InvalidRequest(
                "Without a context the first token has nothing to be predicted from: give a context or a second token.",
                field="context_ids",
            )
        if self.weights is not None:
            w = np.asarray(self.weights, dtype=np.float64)
            if w.shape != (len(self.continuation_ids),):
                raise InvalidRequest("weights needs one number for each continuation token.", field="weights")
            if not np.isfinite(w).all() or (w < 0).any() or not w[self.first_predicted :].any():
                raise InvalidRequest("weights must be finite, not negative, and not all zero.", field="weights")

    @property
    def first_predicted(self) -> int:
        """Index of the first continuation token with a predecessor: 1 when there is no context."""
        return 0 if len(self.context_ids) else 1

    @property
    def input_tokens(self) -> int:
        """Tokens that run through the model; the last token predicts nothing and stays out."""
        return len(self.context_ids) + len(self.continuation_ids) - 1

    @property
    def loss_tokens(self) -> int:
        return len(self.continuation_ids) - self.first_predicted

    @property
    def total_weight(self) -> float:
        if self.weights is None:
            return float(self.loss_tokens)
        return float(np.asarray(self.weights, dtype=np.float64)[self.first_predicted :].sum())


@dataclass(frozen=True)
class Replayed:
    """Text on which the model is to stay as it was: what it said at each of the text's T positions."""

    ids: Sequence[int]  # T
    likeliest: Tensor  # (T, k) int64
    probabilities: Tensor  # (T, k) float32


@dataclass(frozen=True)
class Batch:
    """One pack as tensors. T input tokens, P of them predict a continuation token, S samples; after the samples come
    replayed texts of Q tokens, each of which has a distribution to stay at."""

    input_ids: Tensor  # (1, T) int64
    position_ids: Tensor  # (1, T) int64, from 0 in every sample
    predictors: Tensor  # (P + Q,) int64: positions in T whose next token carries loss, then those of replayed texts
    targets: Tensor  # (P,) int64
    weights: Tensor  # (P,) float32
    lengths: tuple[int, ...]  # S input lengths and those of the texts, summing to T
    likeliest: Tensor | None = None  # (Q, k) int64
    probabilities: Tensor | None = None  # (Q, k) float32
    frozen: int = 0  # tokens at the beginning that run without gradient; in a batch of one sample only

    @property
    def tokens(self) -> int:
        return self.input_ids.shape[1]


def collate(samples: Sequence[Sample], device: torch.device, replay: Sequence[Replayed] = ()) -> Batch:
    """Samples, then replayed texts, side by side in one row."""
    ids, positions, predictors, targets, weights = [], [], [], [], []
    lengths: list[int] = []
    start = 0

    def place(tokens: "np.ndarray[Any, Any]", predicting: int) -> None:
        """Tokens at the end of the row, the last `predicting` of them as predictors."""
        nonlocal start
        n = len(tokens)
        ids.append(tokens)
        positions.append(np.arange(n, dtype=np.int64))
        predictors.append(start + np.arange(n - predicting, n, dtype=np.int64))
        lengths.append(n)
        start += n

    for s in samples:
        tokens = np.concatenate([np.asarray(s.context_ids, np.int64), np.asarray(s.continuation_ids, np.int64)])
        place(tokens[: s.input_tokens], s.loss_tokens)
        targets.append(tokens[len(tokens) - s.loss_tokens :])
        w = np.ones(len(s.continuation_ids)) if s.weights is None else np.asarray(s.weights, np.float64)
        weights.append(w[s.first_predicted :])
    for text in replay:
        place(np.asarray(text.ids, np.int64), len(text.ids))

    def tensor(parts: list["np.ndarray[Any, Any]"], dtype: torch.dtype) -> Tensor:
        # non_blocking from pageable memory is a plain copy, but does not wait for the kernels already queued.
        return torch.from_numpy(np.concatenate(parts or [np.empty(0)])).to(dtype).to(device, non_blocking=True)

    return Batch(
        input_ids=tensor(ids, torch.int64)[None],
        position_ids=tensor(positions, torch.int64)[None],
        predictors=tensor(predictors, torch.int64),
        targets=tensor(targets, torch.int64),
        weights=tensor(weights, torch.float32),
        lengths=tuple(lengths),
        likeliest=torch.cat([text.likeliest for text in replay]) if replay else None,
        probabilities=torch.cat([text.probabilities for text in replay]) if replay else None,
    )


def with_frozen_context(sample: Sample, device: torch.device) -> Batch:
    """One sample whose context runs without gradient, except for its last token, which predicts the continuation."""
    return replace(collate([sample], device), frozen=max(0, len(sample.context_ids) - 1))


def check_tokens(samples: Sequence[Sample], vocab_size: int, max_tokens: int | None) -> None:
    """Every id inside the vocabulary, no sample longer than the model can place.

    An id outside the embedding is a device-side assert on CUDA, which would take the whole worker down.

    Raises:
        InvalidRequest: names the sample.
    """
    for i, s in enumerate(samples):
        for field, ids in (("context_ids", s.context_ids), ("continuation_ids", s.continuation_ids)):
            a = np.asarray(ids)
            if a.size and (a.dtype.kind not in "iu" or a.ndim != 1):
                raise InvalidRequest(f"samples[{i}].{field} must be a list of whole numbers.", field=field, sample=i)
            if a.size and (int(a.min()) < 0 or int(a.max()) >= vocab_size):
                raise InvalidRequest(
                    f"samples[{i}].{field} holds a token id outside 0..{vocab_size - 1}.", field=field, sample=i
                )
        if max_tokens is not None and s.input_tokens > max_tokens:
            raise InvalidRequest(
                f"samples[{i}] has {s.input_tokens} input tokens; the model takes {max_tokens}.", sample=i
            )


def fingerprint(samples: Sequence[Sample]) -> str:
    """Of the samples' tokens, in hexadecimal: the same in every process."""
    digest = hashlib.blake2b(digest_size=16)
    for s in samples:
        for ids in (s.context_ids, s.continuation_ids):
            digest.update(len(ids).to_bytes(8, "little") + np.asarray(ids, np.int64).tobytes())
    return digest.hexdigest()


def plan_steps(
    lengths: Sequence[int], config: TrainConfig, pack_tokens: int, least_tokens: int = 0
) -> tuple[Step, ...]:
    """Which samples run in which pack of which step.

    Args:
        lengths: input tokens of each sample.
        pack_tokens: most tokens in a pack; a longer sample gets a pack to itself; 0: one sample a pack.
        least_tokens: a job that names `steps` takes more of them until it has trained so many tokens.

    Raises:
        InvalidRequest: the job trains more samples than are laid out in one plan.
    """
    config.check_length(len(lengths))
    steps: list[Step] = []
    pending: list[Pack] = []
    epoch = tokens = 0
    while True:
        if epoch == config.epochs:
            break
        if config.names_no_length and epoch >= DEFAULT_EPOCHS and len(steps) >= LEAST_STEPS:
            break
        for pack in _packs(lengths, config, epoch, pack_tokens):
            pending.append(pack)
            tokens += sum(lengths[i] for i in pack)
            if len(pending) == config.gradient_accumulation:
                steps.append(tuple(pending))
                pending = []
                if config.steps is not None and len(steps) >= config.steps and tokens >= least_tokens:
                    return tuple(steps)
        epoch += 1
        check_trained(epoch * len(lengths), f"The first {len(steps) + 1:,} steps", "steps")
    if pending:
        steps.append(tuple(pending))
    return tuple(steps)


def _packs(lengths: Sequence[int], config: TrainConfig, epoch: int, pack_tokens: int) -> list[Pack]:
    """First fit over the last few packs, in this epoch's order."""
    order = np.arange(len(lengths))
    if config.shuffle and len(order) > 1:  # a generator takes longer than the rest of a plan of one sample
        np.random.Generator(np.random.PCG64([config.seed, epoch])).shuffle(order)
    packs: list[list[int]] = []
    room: list[int] = []
    for i in order.tolist():
        need = lengths[i]
        for j in range(max(0, len(packs) - OPEN_PACKS), len(packs)):
            if room[j] >= need:
                packs[j].append(i)
                room[j] -= need
                break
        else:
            packs.append([i])
            room.append(pack_tokens - need)
    return [tuple(p) for p in packs]
