"""Servers on real ports, for clients that need one."""

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI

sys.path.insert(0, str(Path(__file__).parent / "support"))  # modules that tests and their processes share
from process_stack import Stack


class Serving:
    """An application on a port of its own, in a thread."""

    def __init__(self, app: FastAPI) -> None:
        config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", timeout_graceful_shutdown=1)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=lambda: asyncio.run(self.server.serve()), daemon=True)
        self.thread.start()
        deadline = time.monotonic() + 60
        while not self.server.started:
            assert time.monotonic() < deadline, "uvicorn did not start"
            time.sleep(0.01)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(timeout=10)


@pytest.fixture
def serve() -> Iterator[Callable[[Any], str]]:
    """Serves an application and returns its URL: `url = serve(app)`."""
    running: list[Serving] = []

    def start(app: FastAPI) -> str:
        running.append(Serving(app))
        return running[-1].url

    yield start
    for serving in running:
        serving.stop()


def train_as_a_worker_would(ledger: Any, job_id: str, *, steps: int = 4, version: int = 10) -> None:
    """Claim a job and report steps, without weights: for tests of what the API shows."""
    lease = ledger.claim(job_id, "test-worker", weights_version=version)
    assert lease is not None
    ledger.planned(lease, steps)
    for step in range(lease.first_step, steps):
        ledger.begin_step(lease, step, weight_version=version + step)
        ledger.applied(lease, step, version + step + 1, loss=2.0 / (step + 1), tokens=7, seconds=0.01,
                       total_steps=steps)
    ledger.finish(lease, "succeeded")


@pytest.fixture
def run_job() -> Callable[..., None]:
    return train_as_a_worker_would


@pytest.fixture
def stack(own_redis: Any, tmp_path: Path, free_tcp_port: Callable[[], int]) -> Iterator[Callable[..., Stack]]:
    """Makes stacks of real processes with a Redis of their own: `stack(apis=2)`."""
    stacks: list[Stack] = []

    def make(**options: Any) -> Stack:
        redis_options = options.pop("redis_options", {})
        stacks.append(Stack(own_redis(**redis_options), tmp_path, free_tcp_port, **options))
        return stacks[-1]

    yield make
    for made in stacks:
        made.stop()
        made.client.close()
