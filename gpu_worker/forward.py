"""From a batch to its loss, on any Hugging Face causal language model, without tables of architectures.

What a model can do is found out by trying it on a few tokens when the trainer is built:

- *head*: is `lm_head(hidden)` all that happens after the backbone? Then the loss is fused with it. Otherwise (logits
  that are soft-capped, scaled, …) the model's own forward is run on chunks of hidden states, with its backbone replaced
  by one that hands those out. A model that is not made of backbone and head gets its logits whole.
- *packing*: do samples side by side, told apart by their positions, leave each other alone? Otherwise each sample gets
  a forward pass of its own.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hogwild.errors import InvalidRequest
from hogwild.gpu_worker import attention
from hogwild.gpu_worker.batch import Batch, Sample, collate, with_frozen_context
from hogwild.gpu_worker.loss import Anchor, anchor_loss, chunk_rows, chunked_losses, linear_losses, target_loss

log = logging.getLogger(__name__)

HeadKind = Literal["linear", "own", "whole"]

# Relative error (L2) that separates rounding from a different computation in the probes.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
HEAD_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
PROBE_TOKENS = 12
TRIED_TOKENS = 4  # of a frozen context


@dataclass(frozen=True)
class Abilities:
    """What the probes found."""

    head: HeadKind
    packs: bool


class Forward:
    """Runs a causal language model for its loss.

    Args:
        model: a transformers model with a language-model head. On CUDA in bf16 its attention implementation is set to
            the packed one of `attention.py` when that works for it.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        config = model.config.get_text_config()
        self.vocab_size: int = int(config.vocab_size)
        self.max_tokens: int | None = getattr(config, "max_position_embeddings", None)
        self.backbone: Any = model.base_model
        self.head: Any = model.get_output_embeddings()
        self.abilities = self._find_abilities()

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def head_weight(self) -> Tensor:
        """The output embedding, (V, H)."""
        weight: Tensor = self.head.weight
        return weight

    # --- measuring -------------------------------------------------------------------------------------------------

    def row(self, tokens: int, frozen: int = 0, *, samples: int = 1) -> Tensor:
        """Hidden states of a row of `samples` equal parts: (1, tokens, H); (tokens, H) behind `frozen` tokens."""
        ids = [i % self.vocab_size for i in range(frozen + tokens)]
        if frozen:
            return self._predictors(with_frozen_context(Sample(ids[: frozen + 1], [0] * tokens), self.device))
        return self.hidden(collate([Sample(ids[: tokens // samples], [0])] * samples, self.device))

    def cache_bytes_per_token(self) -> float:
        """Keys and values that one token leaves in all layers; 0.0 when the model has no such cache."""
        try:
            cache = self.try_frozen_context()
        except InvalidRequest:
            return 0.0
        return float(sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)) / TRIED_TOKENS

    def try_frozen_context(self) -> Any:
        """The cache that `TRIED_TOKENS` tokens leave.

        Raises:
            InvalidRequest: the model can't run behind a frozen context.
        """
        return self._frozen_cache(torch.zeros(1, TRIED_TOKENS, dtype=torch.int64, device=self.device))

    # --- losses ----------------------------------------------------------------------------------------------------

    def loss(self, batch: Batch, total_weight: float) -> Tensor:
        """Σ weight · CE over the batch's continuation tokens, divided by `total_weight`: a float32 scalar."""
        return self.losses([batch], total_weight)[0]

    def losses(self, batches: Sequence[Batch], total_weight: float, replay_weight: float = 0.0) -> Tensor:
        """(`loss`, `replay_weight` · Σ KL over the replayed positions) of rows that run one after the other: float32
        (2,), to be summed. Rows with replayed texts come last.

        The rows share one use of the head: each use would hold a gradient as large as the head until backward.
        """
        if self.abilities.head == "whole":
            return torch.stack([self._losses_of_logits(b, total_weight, replay_weight) for b in batches]).sum(0)
        hidden = torch.cat([self._predictors(b) for b in batches])
        targets, weights = torch.cat([b.targets for b in batches]), torch.cat([b.weights for b in batches])
        return self._head_losses(hidden, targets, weights / total_weight, _anchor(batches, replay_weight))

    @torch.no_grad()
    def likeliest(self, batch: Batch, k: int) -> tuple[Tensor, Tensor]:
        """The `k` likeliest next tokens at each of the batch's T positions, and their probabilities: (T, k) each."""
        if self.abilities.head == "whole":
            parts = [self.model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits[0]]
        else:
            hidden = self.hidden(batch)[0]
            head = self.head if self.abilities.head == "linear" else self._own_head
            parts = [head(h) for h in hidden.split(chunk_rows(self.vocab_size))]
        found = [logits.float().softmax(-1).topk(min(k, self.vocab_size)) for logits in parts]
        return torch.cat([f.indices for f in found]), torch.cat([f.values for f in found])

    def hidden(self, batch: Batch) -> Tensor:
        """Last hidden states, (1, T, H)."""
        extra = {}
        if len(batch.lengths) > 1 and self.model.config._attn_implementation == attention.NAME:
            extra = attention.boundaries(batch.lengths, self.device)
        out: Tensor = self.backbone(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **extra
        ).last_hidden_state
        return out

    def _predictors(self, batch: Batch) -> Tensor:
        """Hidden states (P + Q, H) of the positions that the loss is about.

        With a frozen context memory follows the continuation: the context's keys and values are constants.
        """
        if not batch.frozen:
            return self.hidden(batch)[0].index_select(0, batch.predictors)
        hidden: Tensor = self.backbone(
            input_ids=batch.input_ids[:, batch.frozen :],
            position_ids=batch.position_ids[:, batch.frozen :],
            past_key_values=self._frozen_cache(batch.input_ids[:, : batch.frozen]),
            use_cache=True,
        ).last_hidden_state[0]
        return hidden.index_select(0, batch.predictors - batch.frozen)

    def _losses_of_logits(self, batch: Batch, total_weight: float, replay_weight: float) -> Tensor:
        if batch.frozen:
            raise _not_behind_a_frozen_context()
        logits = self.model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            logits_to_keep=batch.predictors,
        ).logits[0]
        n, anchor = batch.targets.shape[0], _anchor([batch], replay_weight)
        kept = logits.new_zeros(()).float() if anchor is None else anchor_loss(logits[n:], anchor)
        return torch.stack([target_loss(logits[:n], batch.targets, batch.weights / total_weight), kept])

    def _head_losses(self, hidden: Tensor, targets: Tensor, weights: Tensor, anchor: Anchor | None) -> Tensor:
        if self.abilities.head == "linear":
            return linear_losses(hidden, self.head.weight, self.head.bias, targets, weights, anchor)
        return chunked_losses(hidden, self._own_head, targets, weights, anchor, self.vocab_size)

    def _own_head(self, hidden: Tensor) -> Tensor:
        """Logits (rows, V) for hidden states (rows, H), by the model's own forward."""
        with self._backbone_gives(hidden[None]):
            ids = torch.zeros(1, hidden.shape[0], dtype=torch.int64, device=hidden.device)
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits[0]
        return logits

    @contextmanager
    def _backbone_gives(self, hidden: Tensor) -> Iterator[None]:
        from transformers.modeling_outputs import BaseModelOutputWithPast

        class Output(BaseModelOutputWithPast):  # type: ignore[misc]
            """What else a head may ask for (router logits, cross attentions) was not computed."""

            def __getattr__(self, name: str) -> None:
                if name.startswith("__"):
                    raise AttributeError(name)

        original = self.backbone.forward
        self.backbone.forward = lambda *args, **kwargs: Output(last_hidden_state=hidden)
        try:
            yield
        finally:
            self.backbone.forward = original

    def _frozen_cache(self, ids: Tensor) -> Any:
        """Run context ids (1, n) without gradient; returns a cache that later calls read but never change.

        A cache that grows when it is read would grow again when a checkpointed layer is recomputed in backward. What a
        layer keeps beside keys and values (a hybrid's recurrent states, an indexer's keys) models also write past the
        cache's methods, so it can't be held still.

        Raises:
            InvalidRequest: layers keep something else than keys and values, or the model is not made of backbone and
                head.
        """
        from transformers import DynamicCache

        if self.abilities.head == "whole":
            raise _not_behind_a_frozen_context()
        cache = DynamicCache(config=self.model.config.get_text_config())
        with torch.no_grad():
            self.backbone(input_ids=ids, past_key_values=cache, use_cache=True)
        for layer in cache.layers:
            keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
            more = any(name.startswith("update_") for name in dir(layer))  # `update` is for keys and values
            if more or not isinstance(keys, Tensor) or not isinstance(values, Tensor):
                raise _not_behind_a_frozen_context()
            layer.update = _reader(keys, values)
        return cache

    # --- probes ----------------------------------------------------------------------------------------------------

    def _find_abilities(self) -> Abilities:
        original = self.model.config._attn_implementation
        if self.device.type == "cuda" and self.model.dtype == torch.bfloat16 and original == "sdpa":
            attention.register()
            self.model.set_attn_implementation(attention.NAME)
            try:
                abilities = self._probe()
                if abilities.packs:
                    return abilities
                log.info("packed flash attention does not isolate the samples of a row in this model: using masks")
            except (attention.Unsupported, RuntimeError) as e:
                log.info("packed flash attention is not possible with this model, using masks: %s", e)
            self.model.set_attn_implementation(original)
        return self._probe()

    @torch.no_grad()
    def _probe(self) -> Abilities:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, self.vocab_size, (3, PROBE_TOKENS), generator=generator).to(self.device)
        first, second, other = ids[0], ids[1], ids[2]
        head = self._probe_head(first[None])
        if head == "whole":
            return Abilities(head, packs=False)
        packed = self._probe_hidden(first, second)
        alone = self._probe_hidden(second)
        beside_other = self._probe_hidden(other, second)
        # Two questions: do the positions start again, and does anything of the neighbour come through?
        n = PROBE_TOKENS
        packs = self._same(packed[n:], alone) and self._same(packed[n:], beside_other[n:])
        return Abilities(head, packs)

    def _probe_head(self, ids: Tensor) -> HeadKind:
        if self.backbone is self.model or self.head is None:
            return "whole"
        wanted = self.model(input_ids=ids, use_cache=False).logits[0]
        out = self.backbone(input_ids=ids, use_cache=False)
        hidden = getattr(out, "last_hidden_state", None)
        if not isinstance(hidden, Tensor):
            return "whole"
        # The same product of the same rows: a head that does more must not pass for rounding. Soft-capping shows in
        # large logits only, so the plain head has to agree with the model's own on large hidden states too.
        own = self._same(self._own_head(hidden[0]), wanted, HEAD_TOLERANCE)
        large = 8.0 * hidden[0]
        if (
            isinstance(self.head, nn.Linear)
            and self._same(self.head(hidden[0]), wanted, HEAD_TOLERANCE)
            and (not own or self._same(self.head(large), self._own_head(large), HEAD_TOLERANCE))
        ):
            return "linear"
        return "own" if own else "whole"

    def _probe_hidden(self, *rows: Tensor) -> Tensor:
        samples = [Sample(context_ids=r.tolist(), continuation_ids=[0]) for r in rows]
        return self.hidden(collate(samples, self.device))[0]

    @staticmethod
    def _same(a: Tensor, b: Tensor, tolerance: Mapping[torch.dtype, float] = TOLERANCE) -> bool:
        if a.shape != b.shape:
            return False
        error = torch.linalg.vector_norm((a - b).float()) / torch.linalg.vector_norm(b.float())
        return bool(error <= tolerance.get(b.dtype, 1e-4))


def _anchor(batches: Sequence[Batch], weight: float) -> Anchor | None:
    said = [(b.likeliest, b.probabilities) for b in batches if b.likeliest is not None and b.probabilities is not None]
    if not said:
        return None
    likeliest, probabilities = zip(*said, strict=True)
    return Anchor(torch.cat(likeliest), torch.cat(probabilities), weight)


def _not_behind_a_frozen_context() -> InvalidRequest:
    return InvalidRequest(
        "context_grad: false needs a model of backbone and head whose layers all keep keys and values, and nothing "
        "else: send the job with context_grad: true.",
        field="context_grad",
    )


def _reader(keys: Tensor, values: Tensor) -> Any:
    def update(key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)

    return update
