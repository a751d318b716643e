"""The Celery app. One queue per served model, one worker per queue, one task at a time.

Every setting below was tried with a killed worker, a killed Redis or a stalled one; the reason stands beside it. The
ledger (`hogwild.tasks.ledger`) is the truth about jobs: Celery only carries "look at job X" to the worker, so a
message that is lost is published again by the reconciler and one that comes twice is refused by the ledger.

    celery -A hogwild.tasks.app worker      # what `hogwild up` runs, with the queue of the served model
"""

from typing import Any

from celery import Celery
from kombu import Queue

from hogwild.config import Settings, load_settings
from hogwild.tasks.connections import redis_url

TRAIN = "hogwild.train"
SYNC = "hogwild.sync"
ROLLBACK = "hogwild.rollback"
VERIFY = "hogwild.verify"
TICK = "hogwild.tick"

# Message priorities in Redis are ten lists per queue, taken from in order; kombu counts 0 as the most urgent.
PRIORITIES = list(range(10))
# The child imports torch, maps the weights and builds the model before it answers; Celery's default of 4 s would kill
# and respawn it for ever.
ATTACH_TIMEOUT_S = 600.0
RESULT_EXPIRES_S = 86_400
# The worker ends a job at its limit between two steps; Celery kills one that hangs in a step so much later. A step may
# take long, and a killed one is torn.
HANGING_S = 900.0
# The visibility timeout must exceed the hard time limit, or a running job's message is delivered a second time.
VISIBILITY_MARGIN_S = 3600.0


def make_app(settings: Settings) -> Celery:
    """A Celery app for the model of `settings`. Connects on first use; imports no task body."""
    url = redis_url(settings)
    visibility = {"visibility_timeout": settings.job_time_limit_s + VISIBILITY_MARGIN_S}
    transport: dict[str, Any] = {
        **visibility,
        "priority_steps": PRIORITIES,
        "queue_order_strategy": "priority",
        # A Redis that vanished without closing the connection must be noticed: kombu's default waits for ever.
        "socket_timeout": 60.0,
        "socket_connect_timeout": 5.0,
        "socket_keepalive": True,
        "health_check_interval": 30,
    }
    app = Celery("hogwild", broker=url, backend=url, include=["hogwild.tasks.worker"])
    app.conf.update(
        # --- the queue ---
        task_default_queue=settings.queue,
        task_queues=[Queue(settings.queue, routing_key=settings.queue)],
        # --- the pool ---
        worker_pool="prefork",  # the only pool that answers pings and keeps time limits while a task computes
        worker_concurrency=1,  # one trainer per copy of the weights
        worker_pool_start_method="spawn",  # CUDA does not survive a fork
        worker_proc_alive_timeout=ATTACH_TIMEOUT_S,
        worker_prefetch_multiplier=1,  # a waiting job stays in Redis, where priorities and other workers can see it
        # --- never lose a job ---
        task_acks_late=True,  # early acks lose the job with the worker
        task_reject_on_worker_lost=True,  # the child died, the parent lives: back to the queue at once; the ledger
        #                                   counts attempts, so a job that kills its worker can't come back for ever
        task_acks_on_failure_or_timeout=True,  # the ledger has the failure, or still has the job
        result_backend_always_retry=True,  # a job that ends while Redis restarts would be recorded as failed
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,  # Redis may be away for long; the process manager decides when to give up
        broker_transport_options=transport,
        result_backend_transport_options={**visibility, "global_keyprefix": "hogwild:result:"},
        visibility_timeout=visibility["visibility_timeout"],  # third place; kombu, the backend and Celery each read one
        # --- never run one twice ---
        worker_deduplicate_successful_tasks=True,  # a redelivered message of a finished task is dropped unread
        worker_cancel_long_running_tasks_on_connection_loss=False,  # True killed the task and lost its message
        task_time_limit=settings.job_time_limit_s + HANGING_S,
        # --- what others see ---
        worker_send_task_events=True,
        task_send_sent_event=True,  # Flower then knows queued tasks, not only received ones
        task_track_started=True,
        worker_hijack_root_logger=False,
        result_expires=RESULT_EXPIRES_S,  # results are a cache of the ledger
        task_serializer="json", result_serializer="json", accept_content=["json"],  # never pickle
        task_store_errors_even_if_ignored=True,
        enable_utc=True, timezone="UTC",
    )
    return app


def __getattr__(name: str) -> Celery:
    """`app`, made from the environment when `celery -A hogwild.tasks.app` asks for it, not when this is imported."""
    if name in ("app", "celery"):
        made = make_app(load_settings())
        globals()["app"] = globals()["celery"] = made
        return made
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
