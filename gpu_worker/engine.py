"""The training step, and the loop around it.

One step is forward, backward, done: a hook on each parameter applies the optimizer as soon as autograd has summed that
parameter's gradient, and frees it. Autograd hands a leaf its gradient once per backward pass, after all uses of it are
in (a tied head and embedding, a layer used twice), and a layer's own backward, recompute included, is over before its
weights change. So the result is bit for bit that of a step taken after backward, at the memory of one gradient.

    Trainer(model) ─► plan(samples, config) ─► run(plan, control)

The weights are those that vLLM is serving. A step whose loss is not finite never reaches backward; a gradient that is
not finite leaves its tensor as it was.
"""

import gc
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hogwild.errors import ConfigError, DoesNotFit, InvalidRequest, NonFinite
from hogwild.gpu_worker.batch import (
    Pack,
    Replayed,
    Sample,
    Step,
    check_tokens,
    collate,
    fingerprint,
    plan_steps,
    with_frozen_context,
)
from hogwild.gpu_worker.config import INTEGERS, TrainConfig
from hogwild.gpu_worker.control import Control, StepReport, TrainResult, Unattended
from hogwild.gpu_worker.forward import Forward
from hogwild.gpu_worker.inplace import SUPPORTED_DTYPES
from hogwild.gpu_worker.memory import (
    LENGTHS,
    Budget,
    Load,
    Profile,
    RowKind,
    T,
    budget,
    free_bytes,
    measure,
    out_of_memory,
    within_memory,
)
from hogwild.gpu_worker.optim import Optimizer, StepStats, build_optimizer
from hogwild.gpu_worker.recompute import Recompute
from hogwild.gpu_worker.replay import TEXT_TOKENS, OwnText
from hogwild.gpu_worker.updates import Updates
from hogwild.gpu_worker.yield_points import layers_of

log = logging.getLogger(__name__)

# Input tokens of the samples that the layers are compiled on.
COMPILED_ROW = (9, 14)

__all__ = ["Control", "Plan", "StepReport", "TrainResult", "Trainer", "Unattended"]


@dataclass(frozen=True)
class Plan:
    """A job, laid out: the same samples, config and pack size always give the same plan."""

    config: TrainConfig
    samples: tuple[Sample, ...]
    steps: tuple[Step, ...]
    pack_tokens: int
    """Most tokens in a pack. Smaller than asked when memory is short: keep it with the job, so that a restart on a
    machine with another amount of free memory lays out the same steps."""
    asked_tokens: int
    """The pack size that the config asks for; 0, as above: one sample a pack."""
    asked_steps: int
    """Steps at that size. A job that names `steps` takes more of them in smaller packs, to train as many tokens."""
    budget: Budget
    layers: int
    """Of the model; the budget says how many of them keep their activations."""
    optimizer_state: int
    """Bytes of the optimizer's state once every parameter has some, whether it is there already or not."""

    @property
    def n_steps(self) -> int:
        return len(self.steps)

    @property
    def tokens(self) -> int:
        """Input tokens of all steps."""
        return sum(self.samples[i].input_tokens for step in self.steps for pack in step for i in pack)

    def account(self) -> dict[str, Any]:
        """For whoever sent the job: the size of its packs and the memory it takes, as JSON. Sizes are bytes."""
        return {
            "pack_tokens": self.pack_tokens,
            "asked_pack_tokens": self.asked_tokens,
            "asked_steps": self.asked_steps,
            "layers": self.layers,
            "kept_layers": self.budget.kept_layers,
            "optimizer_state": self.optimizer_state,
            "memory": {**self.budget.by_kind, "total": self.budget.total, "free": self.budget.free},
        }

    def __str__(self) -> str:
        packs = f"in packs of up to {self.pack_tokens} tokens" if self.pack_tokens else "one sample at a time"
        return (
            f"{self.n_steps} steps {packs}, {self.budget.kept_layers} of {self.layers} layers keep their activations, "
            f"{self.optimizer_state / 1e6:,.0f} MB of optimizer state; needs {self.budget}"
        )


class Trainer:
    """Trains one live model. The optimizer's state stays here from job to job.

    Args:
        model: a transformers causal language model, float32 or bf16, whose parameters are the live weights. It is put
            into eval mode: there is no dropout. Parameters that do not require gradients are never trained.
        aliases: names of what is in each parameter, for the `trainable` patterns; None: the checkpoint tensors, when
            the model was built over live weights.
        memory_limit: most bytes that training may take beside the weights; None: what is free.
        compile_layers: run the decoder layers through torch.compile, where that works with the model. Costs up to a
            minute before the first step, and pays on a GPU, where it fuses what lies between the matrix products.
        own_text: where the text that jobs replay comes from; None: they replay nothing.

    Raises:
        ConfigError: a parameter's dtype can't be trained in place.
    """

    def __init__(
        self,
        model: Any,
        *,
        aliases: Mapping[str, Sequence[str]] | None = None,
        memory_limit: int | None = None,
        compile_layers: bool = False,
        own_text: OwnText | None = None,
    ) -> None:
        # Dropout would have the step recompute other layers than it ran, and vLLM serve a model that nobody measured.
        self.model = model.eval()
        self.own_text = own_text
        # named_parameters() gives a tied weight once, under its first name.
        self.params: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad}
        for name, p in self.params.items():
            if p.dtype not in SUPPORTED_DTYPES:
                raise ConfigError(f"{name} is {p.dtype}: only float32 and bfloat16 weights can be trained in place.")
        known: Mapping[str, Sequence[str]] = getattr(model, "hogwild_sources", {}) if aliases is None else aliases
        self.aliases = {n: tuple(known.get(n, ())) for n in self.params}
        self.forward = Forward(model)
        tokens = {id(m.weight) for m in (model.get_input_embeddings(), self.forward.head) if m is not None}
        self.token_params = frozenset(n for n, p in self.params.items() if id(p) in tokens)
        self.optimizer: Optimizer | None = None
        self.memory_limit = memory_limit
        self.recompute = Recompute(layers_of(model), compile_layers=compile_layers)
        self._profiles: dict[tuple[RowKind, bool], Profile] = {}
        self._compiled: set[bool] = set()  # the ways tried: activations kept (True), recomputed (False)
        self._replayed: list[Replayed] | None = None  # of the running job; None: to be made

    def close(self) -> None:
        """Take the wrappers off the model."""
        self.recompute.close()

    @property
    def device(self) -> torch.device:
        return self.forward.device

    # --- planning --------------------------------------------------------------------------------------------------

    def plan(self, samples: Sequence[Sample], config: TrainConfig, *, pack_tokens: int | None = None) -> Plan:
        """Lay out a job and check that it can run.

        Args:
            pack_tokens: of an earlier plan of this job, when it is being resumed.

        Raises:
            InvalidRequest: no samples or too many, ids outside the vocabulary, a pattern that matches nothing, a
                context to freeze and a model that can't.
            DoesNotFit: more memory is needed than free, for the job or for measuring that; `details` has the numbers.
        """
        if not samples:
            raise InvalidRequest("There are no samples to train on.", field="samples")
        check_tokens(samples, self.forward.vocab_size, self.forward.max_tokens)
        self.trainable(config)
        if not config.context_grad and any(len(s.context_ids) > 1 for s in samples):
            self._within_memory(self.forward.try_frozen_context, "Trying a frozen context")
        config = config.for_width(self.forward.head_weight.shape[1])
        lengths = [s.input_tokens for s in samples]
        packs = self.forward.abilities.packs
        asked = config.pack_tokens(sum(lengths)) if packs else 0
        size = asked if pack_tokens is None or not packs else pack_tokens
        if not 0 < size < asked:
            asked = size
        whole = plan_steps(lengths, config, asked)
        while True:
            steps, laid_out = whole, config
            if size != asked:
                steps, laid_out = _in_smaller_packs(lengths, config, size, whole)
            need = self._budget(samples, steps, config)
            if need.fits:
                if size != asked:
                    log.info(
                        "memory is short: packs of %d tokens instead of %d, and %d steps instead of %d",
                        size, asked, len(steps), len(whole),
                    )  # fmt: skip
                state = build_optimizer(config, self.token_params).state_bytes(self.trainable(config))
                layers = len(self.recompute.layers)
                if need.kept_layers < layers and not _eager(config) and not self._compile(keep=False):
                    continue  # what was measured holds no more
                return Plan(laid_out, tuple(samples), steps, size, asked, len(whole), need, layers, state)
            if pack_tokens is not None or size <= max(lengths):
                raise need.refuse(f"A pack of {max(size, max(lengths))} tokens")
            size = max(size // 2, max(lengths))

    def _budget(self, samples: Sequence[Sample], steps: Sequence[Step], config: TrainConfig) -> Budget:
        replayed = self._texts_per_step(config) * TEXT_TOKENS
        packs = {pack for step in steps for pack in step}
        loads = [_load([samples[i] for i in pack], config.context_grad, replayed) for pack in packs]
        heaviest = Load(*(max(sizes) for sizes in zip(*(astuple(load) for load in loads), strict=True)))
        kind: RowKind = "frozen"
        if config.context_grad:
            several = self.forward.abilities.packs and (replayed or max(map(len, packs)) > 1)
            kind = "packed" if several else "one"
        trained, eager = self.trainable(config), _eager(config)
        profile = self.profile(kind, eager=eager)
        wanted, current = build_optimizer(config, self.token_params), self.optimizer
        free = free_bytes(self.device, self.memory_limit)
        state = wanted.state_bytes(trained)
        if current is not None and current.is_like(wanted):
            state -= sum(current.param_state_bytes(n, p) for n, p in trained.items() if n in current.state)
        elif current is not None:
            free += current.allocated_bytes()  # goes before the first step
        whole = self.forward.abilities.head == "whole"
        return budget(
            profile, heaviest, params=trained, tokens=self.token_params, head=self.forward.head_weight,
            layer_gradients=self._layer_gradients(trained, eager=eager), optimizer_bytes=state, whole_logits=whole,
            accumulates=config.gradient_accumulation > 1, free=free,
        )  # fmt: skip

    def profile(self, kind: RowKind = "one", *, eager: bool = False) -> Profile:
        """Activation sizes of the model in rows of that kind, measured at the first call; `eager`: not compiled."""
        if (kind, eager) not in self._profiles:
            if not eager:
                self._compile(keep=True)
            self.recompute.kept, self.recompute.eager = len(self.recompute.layers), eager
            row = partial(self.forward.row, samples=2 if kind == "packed" else 1)

            def measured() -> Profile:
                cache = self.forward.cache_bytes_per_token()
                return measure(
                    self.model, self.recompute.layers, row, cache_bytes=cache, frozen=kind == "frozen" and cache > 0
                )

            self._profiles[kind, eager] = self._within_memory(
                measured, f"Measuring the model with rows of {max(LENGTHS)} tokens"
            )
        return self._profiles[kind, eager]

    def _compile(self, *, keep: bool) -> bool:
        """Compile the layers with their activations kept or recomputed, unless they are; False: it can't be done now.

        What can't be compiled costs speed and not a job: from then on nothing is, and all is measured anew.
        """
        if not self.recompute.compiles or keep in self._compiled:
            return True
        self.recompute.kept, self.recompute.eager = len(self.recompute.layers) if keep else 0, False
        started = time.perf_counter()
        try:
            self._within_memory(self._pass_short_rows, "Compiling the decoder layers")
        except DoesNotFit:  # says nothing about the model
            raise
        except Exception as e:  # whatever a compiler can raise
            self.recompute.compiles = False
            self._profiles.clear()
            why = str(e).split("\n", 1)[0]
            log.warning("torch.compile does not work with this model, training without it: %s", why)
            return False
        self._compiled.add(keep)
        log.info("decoder layers compiled in %.1f s", time.perf_counter() - started)
        return True

    def _pass_short_rows(self) -> None:
        """Both passes of all layers, on rows that are as short as can be; no gradient is kept."""
        trained = [p for layer in self.recompute.layers for p in layer.parameters() if p.requires_grad]
        samples = [Sample([0] * n, [0]) for n in COMPILED_ROW]
        for row in (samples[:1], samples) if self.forward.abilities.packs else (samples[:1],):
            with torch.enable_grad():
                hidden = self.forward.hidden(collate(row, self.device))
            # One parameter of the first layer: backward then passes through all of them, and keeps no gradient.
            torch.autograd.grad(hidden.float().sum(), trained[0])

    def _layer_gradients(self, trained: Mapping[str, Tensor], *, eager: bool = False) -> int:
        """Most bytes of gradients of layers that exist at once: a compiled backward pass hands out a layer's together,
        otherwise each is freed when the next but one is made."""
        sizes = {id(p): p.numel() * p.element_size() for n, p in trained.items() if n not in self.token_params}
        if eager or not self.recompute.compiles:
            return sum(sorted(sizes.values())[-2:])
        return max((sum(sizes.get(id(p), 0) for p in layer.parameters()) for layer in self.recompute.layers), default=0)

    def trainable(self, config: TrainConfig) -> dict[str, Tensor]:
        """The parameters that a job trains, by name.

        Raises:
            InvalidRequest: a pattern matches no parameter, or only a part of one: all of it would be trained.
        """
        patterns = config.trainable
        if patterns is None:
            return dict(self.params)

        def matches(name: str) -> bool:
            return any(fnmatchcase(name, pattern) for pattern in patterns)

        chosen: set[str] = set()
        for pattern in patterns:
            hits = {n for n in self.params if any(fnmatchcase(x, pattern) for x in (n, *self.aliases[n]))}
            if not hits:
                raise InvalidRequest(f"trainable: {pattern!r} matches no parameter of the model.", field="trainable")
            chosen |= hits
        for n in sorted(chosen):
            parts = {x: matches(x) for x in self.aliases[n]}
            if not matches(n) and not all(parts.values()):
                one, other = (next(x for x, matched in parts.items() if matched is wanted) for wanted in (True, False))
                raise InvalidRequest(
                    f"trainable: {one} matches a pattern and {other} does not, but both are in one tensor, {n}. They "
                    "are trained together, as all experts of a layer are: match all of it, or nothing.",
                    field="trainable",
                )
        return {n: p for n, p in self.params.items() if n in chosen}

    # --- running ---------------------------------------------------------------------------------------------------

    def run(self, plan: Plan, control: Control | None = None, first_step: int = 0) -> TrainResult:
        """Train from `first_step` to the end of the plan.

        Raises:
            NonFinite: `max_nonfinite_steps` in a row had a loss or gradient that is not finite.
            DoesNotFit: CUDA ran out of memory; it was freed again. `details["interrupted"]` says whether part of the
                step's weights had been written.
            JobCancelled, or whatever else the control raises.
        """
        control = control or Unattended()
        config = plan.config
        optimizer = self._optimizer_for(config)
        job = fingerprint(plan.samples)
        if first_step == 0 or optimizer.job != job:  # not when the job of before, or of a saved state, goes on
            optimizer.begin_job()
        optimizer.job = job
        self.recompute.kept, self.recompute.eager = plan.budget.kept_layers, _eager(config)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        result = TrainResult(first_step=first_step, n_steps=plan.n_steps)
        self._replayed = None
        if first_step < plan.n_steps:
            self._replay(plan, control)  # before a step has begun: it takes a while
        bad_in_a_row = 0
        with Updates(self.trainable(config), self.params, optimizer) as updates, _older_objects_left_alone():
            for step in range(first_step, plan.n_steps):
                control.before_step(step)
                report = self._step(plan, step, self._replay(plan, control), updates, control)
                result.losses.append(report.loss)
                result.tokens += report.tokens
                result.loss_tokens += report.loss_tokens
                result.seconds += report.seconds
                bad_in_a_row = bad_in_a_row + 1 if report.nonfinite else 0
                result.nonfinite_steps += bool(report.nonfinite)
                control.after_step(report)
                if bad_in_a_row >= config.max_nonfinite_steps:
                    raise NonFinite(
                        f"{bad_in_a_row} steps in a row had a loss or gradient that is not finite; those weights were "
                        "left as they were. Lower the learning rate, or look at the samples' weights.",
                        step=step,
                        tensors=list(report.nonfinite[:8]),
                    )
        result.optimizer_bytes = optimizer.allocated_bytes()
        if self.device.type == "cuda":
            result.peak_bytes = torch.cuda.max_memory_allocated(self.device)
        return result

    def _step(
        self, plan: Plan, step: int, replay: list[Replayed], updates: Updates, control: Control
    ) -> StepReport:
        started = time.perf_counter()
        config, packs = plan.config, plan.steps[step]
        samples = [plan.samples[i] for pack in packs for i in pack]
        total_weight = sum(s.total_weight for s in samples)
        rate = config.rate_at(step, plan.n_steps)
        n = self._texts_per_step(config)
        texts = [replay[(step * n + i) % len(replay)] for i in range(n)] if replay else []
        loss, moved, stats = math.nan, math.nan, StepStats(0.0, (), 0)
        said = ""
        try:
            loss, moved = self._passes(plan, step, total_weight, rate, texts, updates, control)
            if math.isfinite(loss + moved):
                stats = updates.end()
        except torch.OutOfMemoryError as e:
            said = out_of_memory(e)
        finally:
            touched = updates.touched
            updates.abort()
        if said:
            # Outside the except block, whose traceback holds the tensors that have to go.
            self._free_cached()
            raise DoesNotFit(
                f"Step {step} ran out of memory and was given up: {said}",
                step=step,
                tokens=sum(s.input_tokens for s in samples),
                interrupted=touched > 0,
            )
        return StepReport(
            step=step,
            n_steps=plan.n_steps,
            loss=loss,
            tokens=sum(s.input_tokens for s in samples),
            loss_tokens=sum(s.loss_tokens for s in samples),
            seconds=time.perf_counter() - started,
            learning_rate=rate,
            grad_norm=stats.grad_norm,
            replay_divergence=moved / config.replay if texts else None,
            nonfinite=stats.nonfinite if math.isfinite(loss + moved) else ("loss",),
            applied=stats.updated > 0,
        )

    def _passes(
        self, plan: Plan, step: int, total_weight: float, rate: float, texts: list[Replayed], updates: Updates,
        control: Control,
    ) -> tuple[float, float]:  # fmt: skip
        """Forward and backward of every pack, the last one with the replayed texts; returns the step's loss and
        weighted divergence. Stops before the backward of one that isn't finite: nothing has been written then."""
        packs = plan.steps[step]
        totals = (0.0, 0.0)
        for n, pack in enumerate(packs):
            control.between_micro_steps()
            last = n == len(packs) - 1
            losses = self._losses(plan, pack, total_weight, texts if last else [])
            loss, moved = losses.tolist()  # waits for the forward pass
            totals = (totals[0] + loss, totals[1] + moved)
            if not math.isfinite(sum(totals)):
                return totals
            if last:
                updates.begin(rate, plan.config.seed)
            torch.autograd.backward(losses.sum())
            del losses  # before the next forward pass: it holds the graph
        return totals

    def _losses(self, plan: Plan, pack: Pack, total_weight: float, texts: list[Replayed]) -> Tensor:
        """(cross-entropy, weighted divergence) of one pack, float32 (2,)."""
        samples = [plan.samples[i] for i in pack]
        weight = plan.config.replay / max(1, sum(len(text.ids) for text in texts))
        packs = self.forward.abilities.packs
        if plan.config.context_grad and packs:
            rows = [collate(samples, self.device, texts)]
        else:
            rows = (
                [collate(samples, self.device)]
                if plan.config.context_grad
                else [with_frozen_context(sample, self.device) for sample in samples]
            )
            together = [texts] if packs and texts else [[text] for text in texts]
            rows += [collate([], self.device, some) for some in together]
        return self.forward.losses(rows, total_weight, weight)

    def _texts_per_step(self, config: TrainConfig) -> int:
        if self.own_text is None or config.replay == 0:
            return 0
        return max(1, config.replay_tokens // TEXT_TOKENS)

    def _replay(self, plan: Plan, control: Control) -> list[Replayed]:
        """The texts of the running job, with what the model said on them at its start, or after the last rollback."""
        per_step, own_text = self._texts_per_step(plan.config), self.own_text
        if own_text is None or per_step == 0:
            return []
        if self._replayed is None:
            self._replayed = self._within_memory(
                lambda: own_text.anchored(
                    self.forward, per_step * plan.n_steps, plan.config.seed, control.between_micro_steps
                ),
                "Making the text to replay",
                hint="`replay: 0` trains without.",
            )
        return self._replayed

    def _within_memory(self, run: Callable[[], T], what: str, **options: Any) -> T:
        return within_memory(run, what, device=self.device, limit=self.memory_limit, **options)

    def _free_cached(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # --- optimizer -------------------------------------------------------------------------------------------------

    def _optimizer_for(self, config: TrainConfig) -> Optimizer:
        """The live optimizer when it is of the right kind, otherwise a fresh one: state of two kinds is never held."""
        wanted = build_optimizer(config, self.token_params)
        current = self.optimizer
        if current is None or not current.is_like(wanted):
            self.optimizer = current = wanted
        current.follow(wanted)
        return current

    def rolled_back(self) -> None:
        """Forget what describes weights that are gone: optimizer state, and the text to replay with what the model said
        on it. Takes effect in a running job too, when called between its steps."""
        if self.optimizer is not None:
            self.optimizer.clear()
        if self.own_text is not None:
            self.own_text.forget()
        self._replayed = None
        self._free_cached()

    def save_optimizer(self, path: Path) -> None:
        """Write the optimizer's state; nothing when no job has run yet."""
        if self.optimizer is not None:
            self.optimizer.save(path)

    def load_optimizer(self, path: Path, config: TrainConfig) -> None:
        """Take up saved state for jobs with this config's optimizer.

        Raises:
            TrainingError: the file is of another optimizer or another model.
            DoesNotFit: there is no room for it; the file is as good as before.
        """
        optimizer = build_optimizer(config, self.token_params)
        most = optimizer.state_bytes(self.params)
        what = f"Loading the optimizer's state (up to {most / 1e6:,.0f} MB)"
        self._within_memory(lambda: optimizer.load(path, self.params), what, optimizer=most)
        self.optimizer = optimizer


@contextmanager
def _older_objects_left_alone() -> Iterator[None]:
    """Python's collector looks at nothing that is there now: the modules' hundreds of thousands of objects take it a
    few tenths of a second, in which a step's kernels run out, and a step makes enough objects to send it there every
    few steps. What a step itself makes is collected as ever."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _eager(config: TrainConfig) -> bool:
    """Whether a job runs layers in a way that they are not compiled for; each such way would compile them again."""
    return config.trainable is not None or not config.context_grad


def _in_smaller_packs(
    lengths: Sequence[int], config: TrainConfig, size: int, whole: Sequence[Step]
) -> tuple[tuple[Step, ...], TrainConfig]:
    """The steps of a plan in packs of another size: as many tokens as in the `whole` plan, and its share of warm-up."""
    tokens = sum(lengths[i] for step in whole for pack in step for i in pack)
    steps = plan_steps(lengths, config, size, least_tokens=tokens)
    if config.warmup_steps is None:
        return steps, config
    warmup = min(round(config.warmup_steps * len(steps) / len(whole)), INTEGERS["warmup_steps"]["le"])
    return steps, replace(config, warmup_steps=warmup)


def _load(samples: Sequence[Sample], context_grad: bool, replayed: int) -> Load:
    """What one pack puts through the model, with so many tokens of text to replay."""
    if context_grad:
        rows = [(sum(s.input_tokens for s in samples) + replayed, 0)]
    else:
        contexts = [max(0, len(s.context_ids) - 1) for s in samples]
        rows = [(s.input_tokens - frozen, frozen) for s, frozen in zip(samples, contexts, strict=True)]
        rows.append((replayed, 0))
    return Load(
        tokens=sum(tokens for tokens, _ in rows),
        predictors=sum(s.loss_tokens for s in samples) + replayed,
        frozen=sum(frozen for _, frozen in rows),
        pairs=sum(tokens * (tokens + frozen) for tokens, frozen in rows),
    )
