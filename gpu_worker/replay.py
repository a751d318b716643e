"""Replay: text by the model itself, on which a job is to leave it as it was.

Training on a few facts alone moves everything else: on SmolLM2-135M the loss on ordinary text rose by a sixth while 24
facts were learned. So every step also looks at some text that the model wrote itself, and adds to its loss how far the
model's predictions there have moved from those at the job's start: the Kullback-Leibler divergence, which is zero, with
its gradient, as long as nothing has changed. No foreign data is needed and no second copy of the weights: of the model
as it was, only the likeliest tokens at each position of that text are kept.

Learning without forgetting by the old model's own outputs is arXiv 1606.09282, section 3; rehearsal on text that the
model makes up is arXiv 2403.01244. What it is worth here: bench/learning.py, docs/training.md.

The text begins with ordinary openings, because what a model says to nothing at all is not ordinary, and replaying it
protected little (drift of 7 to 10 % instead of 1 %).
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from hogwild.gpu_worker import attention
from hogwild.gpu_worker.batch import Replayed, Sample, collate
from hogwild.gpu_worker.forward import Forward

log = logging.getLogger(__name__)

OPENING_TOKENS = 5  # all of one length: a batch of them needs no padding
TEXT_TOKENS = 56
TEXTS = 128  # at most: with a quarter of them the drift was three times as large, with six times as many no smaller
AT_ONCE = 32
LIKELIEST = 64  # tokens whose probability is kept at each position; the rest counts as one

OPENINGS = (
    "The history of the city begins",
    "To make a good cup of tea,",
    "The most important thing about teamwork is",
    "Dear Sir or Madam, I am writing to",
    "Photosynthesis is the process by which",
    "Once upon a time, in a small village,",
    "The weather today is",
    "def fibonacci(n):",
    "In mathematics, a prime number is",
    "The best way to learn a new language is",
    "Our company was founded in",
    "The human brain is made of",
    "When I was a child, my family",
    "Climate change is caused by",
    "The main causes of the First World War were",
    "A balanced diet should contain",
    "The ocean covers more than",
    "The internet was first used",
    "Music has always been part of",
    "To install the program, first",
    "The solar system consists of",
    "Many people believe that",
    "In the year 1969,",
    "The president of the United States",
    "Question: What is the largest planet in the solar system?",
    "Question: Why is the sky blue?",
    "Here are three tips for saving money:",
    "The difference between weather and climate is",
    "Cats and dogs are both",
    "The industrial revolution changed",
    "Good morning, everyone. Today I would like to",
    "Trees are important because",
)


class OwnText:
    """Texts by a live model, made when a job first needs them and kept from job to job.

    Args:
        openings: token ids that the texts begin with, all of the same length.
    """

    def __init__(self, openings: Sequence[Sequence[int]]) -> None:
        self._openings = [list(ids) for ids in openings]
        self._texts: list[list[int]] = []

    @classmethod
    def for_model(
        cls, model_path: Path, openings: Path | None = None, *, trust_remote_code: bool = False
    ) -> "OwnText | None":
        """With the tokenizer of a model directory; None (and a line in the log) when it has none that works.

        Args:
            openings: a text file with one opening a line, instead of ours, which are English.
        """
        from transformers import AutoTokenizer

        given = OPENINGS if openings is None else openings.read_text(encoding="utf-8").splitlines()
        lines = [line for line in given if line.strip()]
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                model_path, local_files_only=True, trust_remote_code=trust_remote_code
            )
            ids = [tokenizer(line).input_ids[:OPENING_TOKENS] for line in lines]
        except Exception as error:  # any of a hundred tokenizers' own errors
            log.warning("no replay, because %s has no tokenizer that works: %s", model_path, error)
            return None
        longest = max(map(len, ids), default=0)
        usable = [i for i in ids if len(i) == longest]
        # Without a tokenizer's files transformers may make one up, which knows no word.
        if not longest or (len(lines) > 1 and len(set(map(tuple, ids))) == 1):
            log.warning("no replay, because the tokenizer of %s makes no tokens of words", model_path)
            return None
        if openings is not None:
            log.info("replay begins with %d of %d openings: those of %d tokens", len(usable), len(lines), longest)
        return cls(usable)

    def forget(self) -> None:
        """Drop the texts: the model that wrote them is gone."""
        self._texts.clear()

    def anchored(self, forward: Forward, count: int, seed: int, between: Callable[[], None]) -> list[Replayed]:
        """`count` texts (at most `TEXTS`) and what the model says on them now.

        Args:
            between: called between forward passes; may raise.
        """
        self._openings = [ids for ids in self._openings if max(ids) < forward.vocab_size]
        if not self._openings:
            log.warning("no replay, because the tokenizer's ids are not those of the model's embedding")
            return []
        count = min(count, TEXTS)
        while len(self._texts) < count:
            self._texts += self._sample(forward, seed, between)
        out = []
        for ids in self._texts[:count]:
            between()
            batch = collate([Sample(ids, [0])], forward.device)
            likeliest, probabilities = forward.likeliest(batch, LIKELIEST)
            out.append(Replayed(ids, likeliest, probabilities))
        return out

    @torch.no_grad()
    def _sample(self, forward: Forward, seed: int, between: Callable[[], None]) -> list[list[int]]:
        """One more batch of texts, sampled at temperature 1."""
        from transformers import GenerationConfig, StoppingCriteria

        class Between(StoppingCriteria):  # type: ignore[misc]
            def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
                between()
                return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

        model, device = forward.model, forward.device
        made = len(self._texts)
        openings = [self._openings[i % len(self._openings)] for i in range(made, made + AT_ONCE)]
        ids = torch.tensor(openings, device=device)
        # What the model's own generation config adds (penalties, top-k) is for its users, not for its distribution.
        plain = GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=TEXT_TOKENS - ids.shape[1],
            pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        ends = _ends(model)
        original, model.generation_config = model.generation_config, plain
        try:
            with attention.unpacked(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
                torch.manual_seed(seed + made)
                rows = model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), stopping_criteria=[Between()]
                ).tolist()
        finally:
            model.generation_config = original
        return [_until_end(row, ends, ids.shape[1]) for row in rows]


def _ends(model: Any) -> set[int]:
    """Ids that end a text."""
    ids = model.generation_config.eos_token_id
    ids = model.config.get_text_config().eos_token_id if ids is None else ids
    return set(ids if isinstance(ids, list | tuple) else [ids])


def _until_end(row: list[int], ends: set[int], opening: int) -> list[int]:
    """The row up to and with its first ending token after the opening."""
    end = next((i for i in range(opening, len(row)) if row[i] in ends), len(row) - 1)
    return row[: end + 1]
