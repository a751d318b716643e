"""What the service is measured against: FastAPI and `apply_async` with Celery's defaults, nothing kept.

The samples travel in the message. Same Redis server, another database.
"""

import os
import time

from celery import Celery
from fastapi import FastAPI
from pydantic import BaseModel

url = os.environ["BENCH_BARE_REDIS"]
celery = Celery("bare", broker=url, backend=url)
celery.conf.update(task_default_queue="bare", worker_prefetch_multiplier=1)
app = FastAPI()


class Body(BaseModel):
    """One sample, as the service takes it."""

    context_ids: list[int]
    continuation_ids: list[int]
    steps: int = 1


@celery.task(name="bare.train")
def train(context_ids: list[int], continuation_ids: list[int]) -> float:
    """The moment at which a first step would begin."""
    return time.monotonic()


@app.post("/train", status_code=202)
def submit(body: Body) -> dict[str, str]:
    """Accept a job."""
    return {"id": train.apply_async((body.context_ids, body.continuation_ids)).id}


@app.get("/train/{job_id}")
def poll(job_id: str) -> dict[str, str]:
    """State of a job, from the result backend."""
    return {"id": job_id, "state": celery.AsyncResult(job_id).state}
