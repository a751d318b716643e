"""`hogwild checkpoint …` and `hogwild rollback`.

`save`, `rollback` and, where there is one, `verify` ask the running worker, through the API; `cancel` takes that back.
The others read the checkpoint directory itself and work beside a running worker or without one; `adopt`, `repair` and
`rollback --offline` write and need the worker stopped. The weights of a vLLM that goes on serving meanwhile follow an
adoption or a rollback when the worker starts again.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from hogwild.cli.jobs import connect
from hogwild.config import load_settings
from hogwild.errors import ConfigError, HogwildError, NotFound

if TYPE_CHECKING:
    from hogwild.checkpoint.store import CheckpointStore
    from hogwild.client import Client

# Without markup: paths and what the worker says are printed as they are.
console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
group = typer.Typer(no_args_is_help=True, help="Save the live weights; list, verify, export and repair what was saved.")

Directory = Annotated[
    Path | None,
    typer.Option(
        "--directory", "-d", help="Checkpoint directory; default: the one of HOGWILD_MODEL.", show_default=False
    ),
]
Generation = Annotated[int | None, typer.Option("--generation", "-g", min=0, help="Default: the last one.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.add_typer(group, name="checkpoint")
    app.command("rollback")(rollback)


@group.command()
def save(as_json: AsJson = False) -> None:
    """Write what was learned to the checkpoint now; done when this returns."""
    result = operation(lambda client: client.checkpoint(wait=False))
    if as_json:
        print(json.dumps(result))
    elif not result.get("blocks_changed"):
        console.print(f"nothing to save: generation {result.get('generation')} holds the live weights.")
    else:
        console.print(
            f"generation {result['generation']}: {result['blocks_changed']:,} of {result['blocks_total']:,} blocks, "
            f"{megabytes(result['bytes_written'])} written in {result['seconds']:.2f} s; training paused for "
            f"{result['pause_seconds']:.3f} s."
        )


def rollback(
    generation: Annotated[int, typer.Argument(min=0, help="One of `hogwild checkpoint list`.")],
    offline: Annotated[
        bool, typer.Option("--offline", help="On disk, with the worker stopped; a running vLLM follows when it starts.")
    ] = False,
    directory: Directory = None,
) -> None:
    """Go back to a saved generation, on disk and in the weights that are being served; serving goes on."""
    if directory and not offline:
        raise ConfigError(
            "--directory goes with --offline: without it, the worker rolls back the model that it trains."
        )
    if offline:
        with opened(directory) as store:
            report: dict[str, Any] = asdict(store.rollback(generation))
    else:
        report = operation(lambda client: client.rollback(generation, wait=False))
    made, changed = report["generation"], report.get("live_blocks_changed", 0)
    live = "" if offline else f", {changed:,} blocks in the live weights"
    if made != generation:
        text = (
            f"generation {made} has the contents of generation {generation}: {report['blocks_changed']:,} blocks on "
            f"disk{live}. To undo this: hogwild rollback {made - 1}"
        )
    elif changed:
        text = f"generation {made} is the last one, and in the files; in the live weights {changed:,} blocks were not."
    else:
        text = f"generation {made} is the last one and is in place: nothing to do."
    console.print(text)


@group.command("list")
def list_generations(directory: Directory = None, as_json: AsJson = False) -> None:
    """Generations that can be rolled back to or exported, newest first."""
    with opened(directory, read_only=True) as store:
        commits = store.generations()[::-1]
        place = store.directory
    if as_json:
        print(json.dumps([asdict(commit) for commit in commits]))
        return
    table = Table(box=None, title=str(place), title_justify="left")
    for heading in ("generation", "saved", "weight version", "made by", "jobs", "blocks", "changed", "undo"):
        table.add_column(heading, justify="right" if heading not in ("saved", "made by", "jobs") else "left")
    for commit in commits:
        jobs = ", ".join(commit.jobs[:3]) + (f" and {len(commit.jobs) - 3} more" if len(commit.jobs) > 3 else "")
        made = commit.kind if commit.restores is None else f"rollback to {commit.restores}"
        saved = datetime.fromisoformat(commit.time).astimezone().strftime("%Y-%m-%d %H:%M:%S")
        table.add_row(
            str(commit.generation), saved, str(commit.weight_version), made, jobs, f"{commit.blocks_changed:,}",
            megabytes(commit.bytes_changed), megabytes(commit.undo_bytes),
        )  # fmt: skip
    console.print(table)


@group.command()
def verify(directory: Directory = None, as_json: AsJson = False) -> None:
    """Prove that every block on disk is what the last generation says, and live weights too if a worker has them.

    Exit code 1 when not. Steps that are not saved yet are no error. With --directory only the disk is looked at.
    """
    from hogwild.checkpoint.reports import VerifyReport

    reason = "a directory was named" if directory else no_worker()
    if reason:
        with opened(directory, read_only=True) as store:
            report = store.verify()
    else:
        result = operation(lambda client: client.verify(wait=False))
        report = VerifyReport(**{field.name: result[field.name] for field in fields(VerifyReport)})
    if as_json:
        compared = ["disk"] if reason else ["disk", "live"]
        print(json.dumps({**asdict(report), "compared": compared, "unsaved": report.unsaved, "ok": report.ok}))
        if not report.ok:
            raise typer.Exit(1)
        return
    report.raise_for_mismatch()
    disk = f"generation {report.generation}: {report.blocks_checked:,} blocks are right on disk"
    if reason:
        console.print(f"{disk}. Live weights were not compared: {reason}.")
    elif report.unsaved:
        console.print(
            f"{disk}. The live weights have steps that are not saved (weight version {report.live_version}, saved "
            f"{report.weight_version}): {sum(report.live.values()):,} of their {report.live_blocks_checked:,} blocks "
            "differ, as they should."
        )
    else:
        console.print(f"{disk}, and {report.live_blocks_checked:,} in the live weights.")


def no_worker() -> str:
    """Why no worker can be asked about the live weights; empty: one can."""
    try:
        with connect(None, retries=0) as client:
            worker = client.status().get("worker") or {}
    except HogwildError as error:
        return error.message.rstrip(".")
    return "" if worker.get("alive") and worker.get("attached") else "no worker is attached"


@group.command()
def export(
    target: Annotated[
        str, typer.Argument(help="An empty or new directory, a file ending in .tar, or - for a tar stream.")
    ],
    generation: Generation = None,
    directory: Directory = None,
) -> None:
    """Write a generation as a clean model directory that `vllm serve` and `from_pretrained` load."""
    with opened(directory, read_only=True) as store:
        if target == "-":
            if sys.stdout.isatty():
                raise ConfigError("a tar stream is no good on a terminal: redirect it, as in `… export - > model.tar`.")
            store.export(sys.stdout.buffer, generation)
            return
        commit = store.export(target, generation)
    console.print(f"generation {commit.generation} is in {target}.")


@group.command()
def adopt(directory: Directory = None) -> None:
    """Accept the weight files as they are: something else has changed them, or the records are damaged.

    Earlier generations can't be rolled back to afterwards. The worker has to be stopped. A vLLM that goes on serving
    gets these weights when the worker starts again, which first saves what only the live weights held.
    """
    with opened(directory, start_anew=True) as store:
        before, lost = store.head.generation, store.lost
        commit = store.head if lost else store.adopt()
    if lost:
        numbers = ", ".join(map(str, lost))
        console.print(
            f"generation {commit.generation} has the files as they are. Lost, as their records were damaged: {numbers}."
        )
    elif commit.generation == before:
        console.print(f"the files are what generation {before} says: nothing to adopt.")
    else:
        console.print(f"generation {commit.generation} has the files as they are.")


@group.command()
def repair(directory: Directory = None) -> None:
    """Finish or take back a sync that was interrupted; opening a checkpoint for writing always does this."""
    with opened(directory) as store:
        console.print(f"generation {store.head.generation} is in place.")


@group.command()
def cancel(
    operation_id: Annotated[str, typer.Argument(help="Of a save, a rollback or a verification that waits.")],
) -> None:
    """Take back what waits for a worker."""
    with connect(None) as client:
        console.print(f"{client.cancel_operation(operation_id)['id']} is cancelled.")


def megabytes(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e6:,.1f} MB" if count >= 100_000 else f"{count / 1e3:,.1f} kB"


@contextmanager
def opened(directory: Path | None, *, read_only: bool = False, start_anew: bool = False) -> "Iterator[CheckpointStore]":
    """The store in a directory, which must be one already: a command never makes a checkpoint."""
    place = directory or load_settings().model_checkpoint_dir
    try:
        from hogwild.checkpoint.store import CheckpointStore
    except ImportError as error:
        raise ConfigError(
            f"this command needs the worker's packages ({error.name}): pip install 'hogwild[worker]'"
        ) from error
    if not (place / ".hogwild" / "generations").is_dir():
        where = (
            "" if directory else " Set HOGWILD_MODEL or HOGWILD_CHECKPOINT_DIR as for `hogwild up`, or use --directory."
        )
        raise NotFound(f"{place} is no checkpoint of Hogwild's.{where}")
    # What is to be forgotten the worker says, which knows `keep_last`; this shell need not.
    with CheckpointStore.open(place, read_only=read_only, start_anew=start_anew, keep_last=sys.maxsize) as store:
        yield store


def operation(ask: "Callable[[Client], dict[str, Any]]") -> dict[str, Any]:
    """Ask the worker, by way of the API, and wait for the end. Raises what went wrong there."""
    with connect(None) as client:
        asked = ask(client)
        if asked["state"] == "pending" and (reason := no_worker()):
            print(
                f"hogwild: {asked['id']} waits for a worker: {reason}. Ctrl-C ends the waiting; it stays queued until "
                f"`hogwild checkpoint cancel {asked['id']}`.",
                file=sys.stderr,
            )
        return client.operation(asked["id"])
