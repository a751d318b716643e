"""Which module holds which command."""

import typer

from hogwild.cli import demo, up


def register(app: typer.Typer) -> None:
    """Add every command to `app`."""
    for module in (up, demo):
        module.register(app)
