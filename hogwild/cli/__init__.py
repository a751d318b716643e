"""The `hogwild` command. One module per group of commands; importing this never imports torch."""

import sys

import typer

app = typer.Typer(name="hogwild", no_args_is_help=True, pretty_exceptions_enable=False,
                  help="Train a language model while vLLM serves it.")


def main() -> None:
    """Entry point: errors of ours end with their message and exit code 1, not with a traceback."""
    from rich.console import Console

    from hogwild.cli import commands
    from hogwild.errors import HogwildError

    commands.register(app)
    try:
        app()
    except HogwildError as error:
        Console(stderr=True).print(f"[bold red]hogwild:[/] {error.message}", highlight=False)
        sys.exit(1)
