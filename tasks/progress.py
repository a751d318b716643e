"""What Flower sees of a running task: `task-progress` events with the step, never with the text.

Celery has no such event of its own; Flower shows any custom task event as a state, here PROGRESS, and the `result`
field as the task's result so far.
"""

from contextlib import suppress
from typing import Any


def send_progress(task: Any, step: int, steps: int, *, phase: str = "training", loss: float | None = None,
                  weight_version: int | None = None) -> None:
    """Send "training step 3/8, loss 0.412" from inside a task.

    `task`: the bound Celery task (`bind=True`). `step`: steps done. `phase`: "training", "syncing", "paused", …
    """
    shown = f"{phase} step {step}/{steps}" if steps else phase
    if loss is not None:
        shown += f", loss {loss:.3g}"
    fields: dict[str, Any] = {"phase": phase, "step": step, "steps": steps, "result": shown}
    if loss is not None:
        fields["loss"] = loss
    if weight_version is not None:
        fields["weight_version"] = weight_version
    with suppress(Exception):  # a Redis that went away: what Flower shows must not end the job
        task.send_event("task-progress", retry=False, **fields)
