"""`hogwild train | jobs | cancel | pause | resume | status | key`: the API from a shell."""

import asyncio
import json
import os
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from hogwild.cli.common import complain
from hogwild.config import Settings, load_settings, url_host
from hogwild.errors import ConfigError, HogwildError, InvalidRequest, TrainingError

if TYPE_CHECKING:
    from hogwild.client import Client, Job

# Without markup: labels, errors and reasons are other people's text.
console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
REFRESH_S = 1.0  # of `jobs --watch`
WAIT_RETRIES = 20  # some two minutes, in which an API that restarts is back

Url = Annotated[str | None, typer.Option("--url", envvar="HOGWILD_URL", help="The API; default: of these settings.",
                                         show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
JobIds = Annotated[list[str], typer.Argument(help="Ids of jobs.", show_default=False)]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for command in (train, jobs, cancel, pause, resume, status, key):
        app.command()(command)


def connect(url: str | None, *, retries: int = 3) -> "Client":
    """A client of the API that the settings name."""
    from hogwild.client import Client

    settings = load_settings()
    secret = settings.api_key.get_secret_value() if settings.api_key else None
    return Client(url or api_url(settings), api_key=secret, retries=retries)


def api_url(settings: Settings) -> str:
    """The API to talk to: `HOGWILD_URL`, else where these settings put it."""
    return os.environ.get("HOGWILD_URL") or f"http://{url_host(settings.api_host)}:{settings.api_port}"


def train(
    file: Annotated[Path | None, typer.Argument(
        help="JSON Lines: chats (`messages`), pairs (`prompt`, `completion`) or token ids (`context_ids`, "
        "`continuation_ids`); - is standard input.", show_default=False)] = None,
    prompt: Annotated[str | None, typer.Option(help="Text before the part to learn.", show_default=False)] = None,
    completion: Annotated[str | None, typer.Option(help="Text to learn.", show_default=False)] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put prompt and completion into the chat template, as a user's "
                                       "message and its answer.")] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the samples.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Default: by optimizer.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="apollo, apollo-mini, adamw or sgd.")] = None,
    option: Annotated[list[str] | None, typer.Option(
        "--option", "-o", help="Any other option of POST /train, as name=JSON; repeatable.",
        show_default=False)] = None,
    label: Annotated[list[str] | None, typer.Option(
        "--label", "-l", help="Metadata, as name=value; repeatable.", show_default=False)] = None,
    priority: Annotated[int | None, typer.Option(min=0, max=9, help="9 goes first; default 5.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(
        help="Tokenizer directory to use here (needs transformers); default: vLLM's /tokenize.",
        show_default=False)] = None,
    vllm: Annotated[str | None, typer.Option("--vllm", help="URL of vLLM, for /tokenize.", show_default=False)] = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Don't wait for the end.")] = False,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Train the live model on texts; waits for the end with a progress bar."""
    content = _content(file, prompt, completion, chat)
    samples = _samples(content, tokenizer, vllm)
    others = _pairs(option, parse=True)
    if wrong := {"samples", "self"} & others.keys():
        raise InvalidRequest(f"-o {wrong.pop()}: that is no option of a job.")
    options: dict[str, Any] = {"steps": steps, "epochs": epochs, "learning_rate": learning_rate,
                               "optimizer": optimizer, "priority": priority, **others}
    if labels := _pairs(label, parse=False):
        options["metadata"] = labels
    with connect(url) as client:
        job = client.train(samples=samples, **options)
        if not detach:
            print(f"{job.id} is {job.state}: {job.samples} samples, {job.tokens} tokens.", file=sys.stderr, flush=True)
            client.retries = WAIT_RETRIES
            job = client.wait(job.id, progress=sys.stderr.isatty() and not as_json)
    if as_json:
        print(json.dumps(job.data))
    elif detach:
        console.print(f"{job.id} is {job.state}: {job.samples} samples, {job.tokens} tokens.")
    else:
        console.print(_sentence(job))
    if job.final and job.state != "succeeded":
        raise TrainingError(f"{job.id} has {job.state}." if job.error is None else
                            f"{job.id} has {job.state}: {job.error.get('message')}")


def jobs(
    job_id: Annotated[str | None, typer.Argument(help="Show one job with its losses.", show_default=False)] = None,
    state: Annotated[str | None, typer.Option(help="Only jobs in this state.", show_default=False)] = None,
    label: Annotated[list[str] | None, typer.Option("--label", "-l", help="Only jobs with this metadata, name=value.",
                                                    show_default=False)] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Jobs to show.")] = 20,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Keep showing, until Ctrl-C.")] = False,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first, or show one."""
    labels = _pairs(label, parse=False)
    with connect(url) as client:

        def look() -> tuple[list[dict[str, Any]], RenderableType]:
            if job_id is not None:
                job = client.job(job_id)
                return [dict(job.data)], _one(job)
            rows = []
            for job in client.jobs(state=state, metadata=labels, page_size=min(limit, 100)):
                rows.append(job)
                if len(rows) == limit:
                    break
            return [dict(job.data) for job in rows], _table(rows)

        data, shown = look()
        if as_json:
            print(json.dumps(data[0] if job_id else data))
            return
        if not watch:
            console.print(shown)
            return
        with Live(shown, console=console, auto_refresh=False) as live:
            try:
                while True:
                    time.sleep(REFRESH_S)
                    live.update(look()[1], refresh=True)
            except KeyboardInterrupt:
                return


def cancel(job_ids: JobIds, url: Url = None) -> None:
    """Cancel jobs; a running one ends after its present step."""
    for job in _each(job_ids, "cancel", url):
        console.print(f"{job.id} is {'being cancelled' if job.state == 'running' else job.state}.")


def pause(job_ids: JobIds, url: Url = None) -> None:
    """Pause jobs; a running one stops after its present step."""
    for job in _each(job_ids, "pause", url):
        console.print(f"{job.id} is {'paused' if job.paused else 'going to pause'}.")


def resume(job_ids: JobIds, url: Url = None) -> None:
    """Let paused jobs go on."""
    for job in _each(job_ids, "resume", url):
        console.print(f"{job.id} is {job.state}.")


def _each(job_ids: list[str], verb: Literal["cancel", "pause", "resume"], url: str | None) -> "Iterator[Job]":
    """Each job after the verb. What goes wrong with one is printed, keeps no other from its turn, and exits with 1."""
    failed = False
    with connect(url) as client:
        for job_id in job_ids:
            try:
                yield getattr(client, verb)(job_id)
            except HogwildError as error:
                failed = True
                complain(f"{job_id}: {error.message}")
    if failed:
        raise typer.Exit(1)


def status(url: Url = None, as_json: AsJson = False) -> None:
    """Model, worker, queue and checkpoint at this moment."""
    with connect(url) as client:
        now = client.status()
    if as_json:
        print(json.dumps(now))
        return
    model, worker, checkpoint = now["model"] or {}, now["worker"] or {}, now["checkpoint"]
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    state = worker.get("state", "unknown") if worker.get("alive") else "no worker reports"
    name = model.get("served_model_name", "none was attached yet")
    table.add_row("model", f"{name} {model.get('dtype', '')}".strip())
    lifecycle = worker.get("lifecycle") or {}
    if worker.get("alive") and lifecycle.get("state", "verified") != "verified":
        state = f"{state}: {lifecycle['reason']}"
    table.add_row("worker", str(state))
    pace = worker.get("pace") or {}
    if pace.get("mode") not in (None, "off", "idle"):
        table.add_row("pace", f"{pace['mode']}, training at {pace['duty']:.0%} of the device"
                      + (f": {pace['note']}" if pace.get("note") else ""))
    table.add_row("weight version", str(now["weight_version"]))
    table.add_row("queue", f"{now['queue_depth']} of {now['queue_limit']}")
    table.add_row("jobs", ", ".join(f"{n} {name}" for name, n in now["jobs"].items() if n) or "none")
    if now["running"]:
        steps = now["running"]["steps"]
        table.add_row("running", f"{now['running']['id']} step {steps['applied']}/{steps['total'] or '?'}")
    table.add_row("checkpoint", f"generation {checkpoint['head']}, {checkpoint['unsaved_steps']} unsaved steps"
                  + (f" since {checkpoint['unsaved_since']}" if checkpoint["unsaved_since"] else ""))
    console.print(table)


def key(
    name: Annotated[str, typer.Argument(help="Whose key it is; it labels that client's jobs.")],
    read_only: Annotated[bool, typer.Option("--read-only", help="May poll and list, not train.")] = False,
) -> None:
    """Make an API key: the key once on standard error, its line for HOGWILD_API_KEYS_FILE on standard output."""
    from hogwild.api.auth import new_key

    secret, line = new_key(name, "read-only" if read_only else "read-write")
    print(f"key (it is not stored; give it to its owner): {secret}", file=sys.stderr)
    print(line)


def _content(file: Path | None, prompt: str | None, completion: str | None, chat: bool) -> bytes:
    if (file is None) == (completion is None):
        raise InvalidRequest("Give either a file of samples or --completion (with --prompt).")
    if file is not None:
        if prompt is not None or chat:
            raise InvalidRequest("--prompt and --chat go with --completion, not with a file.")
        try:
            return sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
        except OSError as error:
            raise InvalidRequest(f"{file} can't be read: {error.strerror}.") from error
    if chat:
        return json.dumps({"messages": [{"role": "user", "content": prompt or ""},
                                        {"role": "assistant", "content": completion}]}).encode()
    return json.dumps({"prompt": prompt or "", "completion": completion}).encode()


def _samples(content: bytes, tokenizer: Path | None, vllm: str | None) -> list[dict[str, Any]]:
    """Samples as `POST /train` takes them. Lines of token ids pass as they are."""
    from hogwild.api.jsonl import parse

    first = next((line for line in content.split(b"\n") if line.strip()), b"")
    if b'"continuation_ids"' in first:
        try:
            return [json.loads(line) for line in content.split(b"\n") if line.strip()]
        except ValueError as error:
            raise InvalidRequest(f"A line of token ids is not JSON: {error}.") from error
    examples = parse(content, max_lines=load_settings().max_job_samples)
    tokenise = _local(tokenizer) if tokenizer else _remote(vllm)
    return [{"context_ids": list(s.context_ids), "continuation_ids": list(s.continuation_ids),
             **({"weights": list(s.weights)} if s.weights is not None else {})}
            for s in asyncio.run(tokenise(examples))]


def _remote(vllm: str | None) -> Any:
    from hogwild.api.tokenizer import Tokenizer
    from hogwild.frontend import Frontend

    settings = load_settings()
    secret = settings.vllm_api_key.get_secret_value() if settings.vllm_api_key else None
    url = vllm or settings.vllm_url
    if url is None:
        published = Frontend.load(settings.model_runtime_dir)
        url = published.url if published else f"http://{url_host(settings.vllm_host)}:{settings.vllm_port}"

    async def run(examples: Any) -> list[Any]:
        async with Tokenizer(url, api_key=secret) as server:
            return [sample for _, sample in await server.samples(examples)]

    return run


def _local(directory: Path) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ConfigError("--tokenizer needs transformers: pip install 'hogwild[worker]', or leave it out to use "
                          "vLLM's tokenizer.") from error
    from hogwild.api.tokenizer import LocalTokenizer

    loaded = AutoTokenizer.from_pretrained(directory)

    async def run(examples: Any) -> list[Any]:
        return [sample for _, sample in await LocalTokenizer(loaded).samples(examples)]

    return run


def _pairs(items: list[str] | None, *, parse: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in items or []:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise InvalidRequest(f"{item!r} must be name=value.")
        try:
            found[name] = json.loads(value) if parse else value
        except ValueError:
            found[name] = value  # a bare word is a string
    return found


def _sentence(job: "Job") -> str:
    loss = "" if job.loss_first is None or job.loss_last is None else \
        f" loss {job.loss_first:.3g} → {job.loss_last:.3g};"
    version = "" if job.weight_version_last is None else f" weight version {job.weight_version_last};"
    return (f"{job.id} has {job.state}: {job.steps_applied} steps, {job.tokens_trained} tokens in "
            f"{job.seconds:.1f} s;{loss}{version}").rstrip(";") + "."


_STYLES = {"queued": "yellow", "running": "cyan", "succeeded": "green", "failed": "red", "cancelled": "dim"}


def _table(rows: "list[Job]") -> RenderableType:
    table = Table(box=None, pad_edge=False)
    table.add_column("job", no_wrap=True, min_width=30)  # an id that is cut off is of no use
    for name in ("state", "steps", "loss", "weights", "age", "labels"):
        table.add_column(name, justify="right" if name in ("steps", "loss", "weights", "age") else "left")
    for job in rows:
        state = "paused" if job.paused else job.state
        labels = " ".join(f"{k}={v}" for k, v in job.metadata.items())
        table.add_row(
            job.id, Text(state, style=_STYLES[job.state]), f"{job.steps_applied}/{job.steps or '?'}",
            "" if job.loss_last is None else f"{job.loss_last:.3g}",
            "" if job.weight_version_last is None else f"v{job.weight_version_last}",
            _age(str(job.data["created_at"])), labels)
    return table if rows else "no jobs"


def _age(created_at: str) -> str:
    """Time since an ISO 8601 moment, in its largest unit."""
    seconds = (datetime.now(UTC) - datetime.fromisoformat(created_at)).total_seconds()
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds / size:.0f}{unit}"
    return f"{max(0, seconds):.0f}s"


def _one(job: "Job") -> RenderableType:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name in ("id", "state", "paused", "priority", "created_at", "started_at", "finished_at", "samples", "tokens",
                 "steps", "plan", "tokens_trained", "seconds", "weight_version", "attempts", "config", "metadata",
                 "error"):
        value = job.data.get(name)
        if value not in (None, {}, False):
            table.add_row(name, json.dumps(value) if isinstance(value, dict) else str(value))
    losses = [value for value in job.data.get("losses") or [] if value is not None]
    return Group(table, Text.assemble(("loss", "dim"), f" {_spark(losses)}") if losses else "")


def _spark(values: list[float], width: int = 60) -> str:
    """A loss curve in one line, first and last value beside it."""
    columns = [values[i * len(values) // min(width, len(values))] for i in range(min(width, len(values)))]
    low, high = min(columns), max(columns)
    bars = "".join("▁▂▃▄▅▆▇█"[round((v - low) / ((high - low) or 1) * 7)] for v in columns)
    return f"{values[0]:.3g} {bars} {values[-1]:.3g}"
