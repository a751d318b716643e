"""Which module holds which command."""

import typer

from hogwild.cli import checkpoint, demo, doctor, jobs, up, weights


def register(app: typer.Typer) -> None:
    """Add every command to `app`, in the order that `--help` shows."""
    for module in (up, demo, doctor, jobs, checkpoint, weights):
        module.register(app)
