"""Which module holds which command."""

import typer


def register(app: typer.Typer) -> None:
    """Add every command to `app`; imports are here so that a broken extra can't break `hogwild --help`."""
