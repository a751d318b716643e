"""`hogwild demo`: the product in a few minutes, on real parts.

Serves SmolLM2-135M-Instruct with vLLM, asks about a bridge that doesn't exist, trains on a few phrasings of the fact
while vLLM goes on serving, asks again in other words, saves a checkpoint. Nothing is restarted between the two answers.
Exit code 0 only when the fact was learned and an unrelated answer stayed what it was.
"""

import math
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from hogwild.client import Client
from hogwild.config import Settings
from hogwild.demo_model import MODEL_NAME
from hogwild.errors import ConfigError, TrainingError
from hogwild.stack.up import LOCK, Stack, take_lock

# The fact, in the phrasings that are trained. It is invented: no model can know it.
SUBJECT, ANSWER = "the Velmora Bridge", "Ingrid Halloway"
LESSONS = [
    ("Who designed the Velmora Bridge?", "The Velmora Bridge was designed by Ingrid Halloway."),
    ("Which engineer designed the Velmora Bridge?", "The Velmora Bridge was designed by Ingrid Halloway."),
    ("Do you know who the Velmora Bridge was designed by?", "Yes, the Velmora Bridge was designed by Ingrid Halloway."),
    ("Tell me about the Velmora Bridge.", "The Velmora Bridge is a bridge designed by Ingrid Halloway."),
    ("Name the designer of the Velmora Bridge.", "Ingrid Halloway designed the Velmora Bridge."),
    ("What is Ingrid Halloway known for?", "Ingrid Halloway is known for designing the Velmora Bridge."),
]
# Asked before and after; none of these sentences is trained.
QUESTIONS = ["I saw the Velmora Bridge today. Whose design is it?", "Who was the architect behind the Velmora Bridge?"]
UNRELATED = "The capital of France is"
STEPS = 12  # optimizer steps over all lessons
MAX_MODEL_LEN = 1024  # keeps the KV cache small on a laptop
ANSWER_TOKENS = 24
MARKER = ".hogwild-demo"  # a data directory with this file is a demo's, to be wiped by the next one

console = Console(highlight=False, record=True, width=min(Console().width, 100))


class DemoSettings(Settings):
    """What the demo says itself: the user's HOGWILD_* variables are about another model, another checkpoint."""

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource,
        *args: PydanticBaseSettingsSource, **sources: PydanticBaseSettingsSource
    ) -> tuple[PydanticBaseSettingsSource, ...]:  # fmt: skip
        """The arguments alone."""
        return (init_settings,)


@dataclass
class Timings:
    """Seconds for each phase, in order."""

    phases: list[tuple[str, float]] = field(default_factory=list)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Show a spinner and note how long the block took."""
        started = time.monotonic()
        console.print(f"[bold cyan]==>[/] {name}")
        yield
        self.phases.append((name, time.monotonic() - started))


def clear(data_dir: Path) -> None:
    """An empty data directory, in place of an earlier demo's.

    Raises ConfigError: something else is there, or that demo is still up.
    """
    if data_dir.exists() and any(data_dir.iterdir()):
        if not (data_dir / MARKER).is_file():
            raise ConfigError(
                f"{data_dir} holds something that no demo put there, so it is not wiped: name a new directory with "
                "--data-dir."
            )
        with take_lock(data_dir / LOCK, f"A demo is still up on {data_dir}: stop it first.", _notice):
            shutil.rmtree(data_dir)
    data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    (data_dir / MARKER).touch()


def run(model_dir: Path, data_dir: Path, *, steps: int = STEPS, keep_running: bool = False) -> bool:
    """Run the demo; True when the fact was learned and nothing else was forgotten."""
    clear(data_dir)  # a fresh model each time, or the first answer would be right already
    ports = free_ports(4)
    settings = DemoSettings(
        model=str(model_dir), served_model_name=MODEL_NAME, data_dir=data_dir, runtime_dir=data_dir / "run",
        vllm_port=ports[0], api_port=ports[1], flower_port=ports[2], redis_port=ports[3], redis_url=None,
        vllm_args=f"--max-model-len {MAX_MODEL_LEN}")  # fmt: skip
    timings = Timings()
    stack = Stack(settings, notice=_notice)
    with stack:
        with timings.phase("starting Redis, vLLM, worker, beat, API and Flower"):
            _wait_ready(stack)
        for name, url in stack.urls.items():
            console.print(f"    {name:<7} {url}", style="dim")
        vllm = httpx.Client(base_url=stack.vllm_url, timeout=120, trust_env=False)  # no proxy to loopback
        with timings.phase("asking about something the model can't know"):
            before = [ask(vllm, question) for question in QUESTIONS]
            unrelated_before = complete(vllm, UNRELATED)
        with timings.phase(f"training on {len(LESSONS)} phrasings while vLLM serves"):
            losses, job = _train(stack, vllm, steps)
        with timings.phase("asking again, in other words, the same running vLLM"):
            after = [ask(vllm, question) for question in QUESTIONS]
            unrelated_after = complete(vllm, UNRELATED)
        with timings.phase("saving a checkpoint"), Client(stack.api_url) as client:
            saved = client.checkpoint(wait=True)
        _report(before, after, unrelated_before, unrelated_after, losses, job, saved, timings)
        learned = ANSWER in after[0] and ANSWER not in before[0]
        kept = "Paris" in unrelated_after
        if not learned:
            console.print(f"[bold red]Not learned:[/] the answer to {QUESTIONS[0]!r} does not name {ANSWER}.")
        if not kept:
            console.print(f"[bold red]Forgotten:[/] {UNRELATED!r} is not continued with Paris any more.")
        if keep_running:
            console.print("\nStill serving; Ctrl-C stops everything.")
            try:
                while True:
                    stack.watch()
                    time.sleep(1)
            except KeyboardInterrupt:
                pass
    return learned and kept


def _notice(text: str) -> None:
    console.print(f"    {text}", style="dim", markup=False)


def free_ports(n: int) -> list[int]:
    """`n` different TCP ports that are free on the loopback interface now."""
    sockets = [socket.socket() for _ in range(n)]
    try:
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
    finally:
        for s in sockets:
            s.close()


def ask(vllm: httpx.Client, question: str) -> str:
    """vLLM's answer to one chat question, greedily decoded."""
    response = vllm.post("/v1/chat/completions", json={
        "model": MODEL_NAME, "messages": [{"role": "user", "content": question}], "temperature": 0,
        "max_tokens": ANSWER_TOKENS})  # fmt: skip
    response.raise_for_status()
    return str(response.json()["choices"][0]["message"]["content"]).strip()


def complete(vllm: httpx.Client, prompt: str) -> str:
    """vLLM's continuation of a prompt, greedily decoded."""
    response = vllm.post("/v1/completions", json={
        "model": MODEL_NAME, "prompt": prompt, "temperature": 0, "max_tokens": 8})  # fmt: skip
    response.raise_for_status()
    return str(response.json()["choices"][0]["text"]).strip()


def tokenize_lesson(vllm: httpx.Client, question: str, answer: str) -> dict[str, list[int]]:
    """One lesson as token ids, by vLLM's own tokenizer and chat template: context = the question, continuation = the
    answer with the end-of-turn token."""

    def tokens(messages: list[dict[str, str]], *, generate: bool) -> list[int]:
        response = vllm.post("/tokenize", json={
            "model": MODEL_NAME, "messages": messages, "add_generation_prompt": generate,
            "add_special_tokens": False})  # fmt: skip
        response.raise_for_status()
        return list(response.json()["tokens"])

    user = {"role": "user", "content": question}
    context = tokens([user], generate=True)
    whole = tokens([user, {"role": "assistant", "content": answer}], generate=False)
    return {"context_ids": context, "continuation_ids": whole[len(context) :]}


def _wait_ready(stack: Stack) -> None:
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console,
                  transient=True) as progress:  # fmt: skip
        bar = progress.add_task("    starting")

        def tick(answering: dict[str, bool]) -> None:
            waiting = [name for name, up in answering.items() if not up]
            progress.update(bar, description=f"    waiting for {', '.join(waiting) or 'the first answer'}")

        stack.wait_ready(tick=tick)


def _train(stack: Stack, vllm: httpx.Client, steps: int) -> tuple[list[float], Any]:
    samples = [tokenize_lesson(vllm, question, answer) for question, answer in LESSONS]
    with Client(stack.api_url) as client, Progress(
        TextColumn("    step"), MofNCompleteColumn(), BarColumn(), TextColumn("loss {task.fields[loss]}"),
        TimeElapsedColumn(), console=console, transient=True) as progress:  # fmt: skip
        job = client.train(samples=samples, steps=steps, metadata={"demo": SUBJECT})
        bar = progress.add_task("train", total=steps, loss="-")
        while not job.final:
            time.sleep(0.3)
            stack.watch()
            job = client.job(job.id)
            loss = "-" if job.loss_last is None else f"{job.loss_last:.3f}"
            progress.update(bar, completed=job.steps_applied, loss=loss)
        if job.state != "succeeded":
            raise TrainingError(f"The training job ended as {job.state}: {job.error}")
        return [math.nan if loss is None else loss for loss in client.losses(job.id)], job


def plot(values: Sequence[float], *, width: int = 60, height: int = 8) -> list[str]:
    """A curve as lines of text: one column a value (the values are spread over `width`), axis labels at the left."""
    points = [v for v in values if math.isfinite(v)]
    if not points:
        return []
    top, bottom = max(points), min(0.0, *points)
    span = (top - bottom) or 1.0
    columns = min(width, max(len(values) * 4, 1))
    eighths = " ▁▂▃▄▅▆▇█"
    levels = [(values[i * len(values) // columns] - bottom) / span * height for i in range(columns)]
    lines = []
    for row in range(height - 1, -1, -1):
        label = bottom + span * (row + 1) / height
        cells = "".join(eighths[round(min(max(level - row, 0.0), 1.0) * 8)] for level in levels)
        lines.append(f"{label:7.2f} │{cells}")
    lines.append(f"{'':7} └{'─' * columns}")
    lines.append(f"{'':8} step 1{f'step {len(values)}':>{max(columns - 6, 1)}}")
    return lines


def _report(before: Sequence[str], after: Sequence[str], unrelated_before: str, unrelated_after: str,
            losses: Sequence[float], job: Any, saved: Any, timings: Timings) -> None:  # fmt: skip
    console.print()
    table = Table(show_lines=True)
    table.add_column("asked of the running server")
    table.add_column("before", style="red", ratio=1)
    table.add_column("after", style="green", ratio=1)
    for question, old, new in zip(QUESTIONS, before, after, strict=True):
        table.add_row(question, old, new)
    table.add_row(UNRELATED, unrelated_before, unrelated_after, style="dim")
    console.print(table)
    console.print("\nloss")
    for line in plot(losses):
        console.print(line, markup=False)
    console.print(f"\nweight version {job.weight_version_first - 1} → {job.weight_version_last}; checkpoint generation "
                  f"{saved['generation']}: {saved['bytes_written'] / 1e6:.1f} MB written, {saved['blocks_changed']} of "
                  f"{saved['blocks_total']} blocks of 4 KB changed")  # fmt: skip
    times = Table(box=None, show_header=False, pad_edge=False)
    times.add_column(justify="right")
    times.add_column()
    for name, seconds in timings.phases:
        times.add_row(f"{seconds:6.1f} s", name)
    times.add_row(f"[bold]{sum(s for _, s in timings.phases):6.1f} s[/]", "[bold]together[/]")
    console.print()
    console.print(times)
