"""Which module holds which command."""

import typer

from hogwild.cli import up


def register(app: typer.Typer) -> None:
    """Add every command to `app`."""
    for module in (up,):
        module.register(app)
