"""The learning task of `bench/learning.py`: invented facts to learn, ordinary text that must not change.

*Recall* is the share of questions whose greedy answer contains the answer; the questions are phrased as no training
sample is. *Drift* is the relative change of the mean loss on ordinary text that is never trained on.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hogwild.gpu_worker import attention
from hogwild.gpu_worker.batch import Sample, collate
from hogwild.gpu_worker.forward import Forward

DATA = Path(__file__).parent / "data"
ANSWER_TOKENS = 10


@dataclass(frozen=True)
class Task:
    """Samples to train on, questions with answers, ordinary text as token ids."""

    facts: list[Sample]
    questions: list[tuple[str, str]]
    heldout: list[Sample]
    n_facts: int


def load_task(tokenizer: Any, limit: int | None = None) -> Task:
    """The task in a model's own tokens; `limit` keeps only the first facts of each relation (for a quick run)."""
    facts: list[Sample] = []
    questions: list[tuple[str, str]] = []
    n = 0
    for relation in json.loads((DATA / "facts.json").read_text())["relations"]:
        for subject, answer in relation["facts"][:limit]:
            n += 1
            for text in relation["train"]:
                context = tokenizer(text.replace("{s}", subject)).input_ids
                facts.append(Sample(context, tokenizer(f" {answer}.\n").input_ids))
            questions += [(text.replace("{s}", subject), answer) for text in relation["ask"]]
    heldout = [
        Sample(ids[:1], ids[1:])
        for ids in (tokenizer(p).input_ids for p in (DATA / "heldout.txt").read_text().split("\n\n"))
    ]
    return Task(facts, questions, heldout, n)


@torch.no_grad()
def generate(model: Any, tokenizer: Any, prompts: Sequence[str], new_tokens: int, **options: Any) -> list[list[int]]:
    """New token ids for each prompt (left-padded batch)."""
    tokenizer.padding_side = "left"
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    tokenizer.pad_token_id = pad
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True).to(model.device)
    with attention.unpacked(model):  # there is padding
        out = model.generate(**batch, max_new_tokens=new_tokens, pad_token_id=pad, **options)
    return [row.tolist() for row in out[:, batch.input_ids.shape[1] :]]


def recall(model: Any, tokenizer: Any, task: Task) -> float:
    """Share of the questions answered with the right words, greedily."""
    out = generate(model, tokenizer, [q for q, _ in task.questions], ANSWER_TOKENS, do_sample=False)
    texts = [tokenizer.decode(ids, skip_special_tokens=True).lower() for ids in out]
    return sum(a.lower() in t for (_, a), t in zip(task.questions, texts, strict=True)) / len(texts)


@torch.no_grad()
def ordinary_loss(forward: Forward, samples: Sequence[Sample], at_once: int = 4) -> float:
    """Mean loss per token (nats) on text."""
    total = sum(s.total_weight for s in samples)
    parts = [samples[i : i + at_once] for i in range(0, len(samples), at_once)]
    return sum(float(forward.loss(collate(part, forward.device), total)) for part in parts)
