"""The `hogwild` command. One module per group of commands; importing this never imports torch."""

import sys

import typer

from hogwild import __version__
from hogwild.cli.common import complain
from hogwild.errors import HogwildError

app = typer.Typer(
    name="hogwild",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Train a language model while vLLM serves it.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hogwild {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    pass


def main() -> None:
    """Entry point: errors of ours end with their message and exit code 1, not with a traceback."""
    from hogwild.cli import commands

    commands.register(app)
    try:
        app()
    except HogwildError as error:
        complain(error.message)
        sys.exit(1)
