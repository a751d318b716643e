"""`hogwild up`: the whole stack in the foreground. Every setting is an option; `--help` lists them all."""

import inspect
import signal
import sys
import time
from types import FrameType
from typing import Annotated, Any, NoReturn, get_args

import typer
from pydantic_core import PydanticUndefined
from rich.console import Console
from rich.markup import escape

from hogwild.config import Settings, load_settings

# One colour a service, so that interleaved logs can be told apart.
COLOURS = {"redis": "red", "vllm": "cyan", "worker": "green", "api": "blue", "beat": "magenta", "flower": "yellow"}
WIDTH = max(map(len, COLOURS))

console = Console(highlight=False, soft_wrap=True, emoji=False)


def register(app: typer.Typer) -> None:
    """Add `up` to the command line."""
    app.command("up", help=(up.__doc__ or "").strip())(with_settings(up))


def up(settings: Settings, *, no_vllm: bool) -> None:
    """Run everything in the foreground: Redis, vLLM, worker, beat, API, Flower.

    Settings come from these options or from HOGWILD_<NAME> in the environment; an option wins. Ctrl-C stops all of
    it in order, after a last checkpoint of what was trained.
    """
    from hogwild.stack.up import Stack

    stack = Stack(settings, vllm=not no_vllm, notice=_notice, log_line=_log_line)
    signal.signal(signal.SIGTERM, _terminate)
    started = time.monotonic()
    try:
        with stack:
            stack.wait_ready()
            _notice(f"ready after {time.monotonic() - started:.0f} s", style="green")
            for name, url in stack.urls.items():
                _notice(f"  {name:<{WIDTH}}  {url}")
            _notice(f"  {'logs':<{WIDTH}}  {stack.supervisor.logs}")
            while True:
                stack.watch()
                time.sleep(1)
    except (KeyboardInterrupt, SystemExit):
        _notice("stopped; nothing of it is running any more")


def _terminate(_signal: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(0)


def _notice(text: str, *, style: str = "") -> None:
    """`text` is not markup: the last lines of a service's log are in it."""
    console.print(f"[bold]{'hogwild':<{WIDTH}} |[/] {escape(text)}", style=style)


def _log_line(service: str, line: str) -> None:
    console.print(f"[{COLOURS.get(service, 'white')}]{service:<{WIDTH}} |[/] {escape(line)}")


def with_settings(command: Any) -> Any:
    """Turn `command(settings, *, no_vllm)` into a function whose options are the fields of Settings."""
    parameters = [
        inspect.Parameter(
            "no_vllm",
            inspect.Parameter.KEYWORD_ONLY,
            default=False,
            annotation=Annotated[bool, typer.Option("--no-vllm", help="Join a vLLM that is already running.")],
        )
    ]
    for name, field in Settings.model_fields.items():
        default = field.get_default(call_default_factory=True)
        text = field.description or ""
        if default not in (None, PydanticUndefined, "", []):
            text += f" (default: {default})"  # brackets would be markup
        choices = [a for a in get_args(field.annotation) if isinstance(a, str)]
        parameters.append(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[
                    str | None,
                    typer.Option(
                        f"--{name.replace('_', '-')}",
                        help=text,
                        show_default=False,
                        metavar="|".join(choices) or "VALUE",
                        rich_help_panel="Settings (HOGWILD_<NAME> in the environment)",
                    ),
                ],
            )
        )

    def wrapper(**options: Any) -> None:
        no_vllm = options.pop("no_vllm")
        given = {k: v for k, v in options.items() if v is not None}
        command(load_settings(**given), no_vllm=no_vllm)

    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapper
