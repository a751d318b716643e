"""What several commands share."""

from rich.console import Console
from rich.markup import escape


def complain(message: str) -> None:
    """Print what went wrong on standard error."""
    console = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
    console.print(f"[bold red]hogwild:[/] {escape(message)}")
