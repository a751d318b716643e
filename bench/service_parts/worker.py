"""The service's worker without a model: claims a job, begins its first step, notes the moment, ends it."""

import os
import time
from typing import Any

from celery import signals

from hogwild.config import Settings
from hogwild.tasks.app import TRAIN, make_app
from hogwild.tasks.connections import redis_url, worker_client
from hogwild.tasks.ledger import Ledger
from hogwild.tasks.registry import Registry

settings = Settings()
app = make_app(settings)
app.conf.include = []
_state: dict[str, Any] = {}


@signals.worker_process_init.connect  # type: ignore[untyped-decorator]
def start(**_: Any) -> None:
    """In the child: connect and announce."""
    client = worker_client(redis_url(settings))
    _state["ledger"] = Ledger(client, settings)
    _state["id"] = f"bench-{os.getpid()}"
    Registry(client, settings.model_name).register_worker(_state["id"], "bench", alive_s=3600)


@app.task(name=TRAIN)  # type: ignore[untyped-decorator]
def train(job_id: str) -> float | None:
    """The moment at which the first step began, durably."""
    ledger: Ledger = _state["ledger"]
    lease = ledger.claim(job_id, _state["id"], weights_version=0)
    if lease is None:
        return None
    ledger.samples(lease)
    ledger.planned(lease, 1)
    ledger.begin_step(lease, 0, weight_version=0)
    began = time.monotonic()
    ledger.applied(lease, 0, 1, loss=1.0, tokens=1, seconds=0.001)
    ledger.finish(lease, "succeeded")
    ledger.client.set(f"bench:{job_id}", repr(began))
    return began
