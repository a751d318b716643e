"""Celery beat: one tick, sent to the model's own queue.

The tick carries no decision: whether a sync is due stands in Redis, so a second beat does no harm and a missed tick is
made up by the next. Ticks expire before the next is sent; while a job runs, the worker asks the same question itself
between steps.
"""

from celery import Celery

from hogwild.config import Settings, load_settings
from hogwild.tasks.app import TICK, make_app


def make_scheduled_app(settings: Settings) -> Celery:
    """The Celery app with its beat schedule."""
    app = make_app(settings)
    app.conf.beat_schedule = {
        "tick": {
            "task": TICK,
            "schedule": settings.sync_tick_s,
            "options": {"queue": settings.queue, "expires": settings.sync_tick_s, "ignore_result": True},
        }
    }
    # beat wakes up this often to look at its schedule; its default of 5 minutes only matters for longer ticks
    app.conf.beat_max_loop_interval = min(settings.sync_tick_s, 30.0)
    return app


def __getattr__(name: str) -> Celery:
    """`app`, made from the environment when `celery -A hogwild.tasks.schedule:app` asks for it."""
    if name == "app":
        made = make_scheduled_app(load_settings())
        globals()["app"] = made
        return made
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
