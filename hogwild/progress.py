"""The progress bar of a job, on stderr: for `Client.wait` and the command line."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hogwild.client import Job


@contextmanager
def job_bar(show: bool) -> "Iterator[Callable[[Job], None]]":
    """Yields a function that shows a job's present state; does nothing unless `show`."""
    if not show:
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"),
               TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        shown = bar.add_task("queued", total=None, loss="")

        def update(job: "Job") -> None:
            bar.update(shown, description="paused" if job.paused else job.state, total=job.steps,
                       completed=job.steps_applied + job.steps_interrupted,
                       loss="" if job.loss_last is None else f"loss {job.loss_last:.3g}")

        yield update
