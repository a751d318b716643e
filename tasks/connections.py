"""Connections to Redis: one place for time-outs and retries, because the API and the worker need opposite ones.

The API must answer: it gives up after seconds and says 503, and the client repeats with its Idempotency-Key. The
worker must not: it holds a half-finished job, so it waits for Redis to come back for as long as a restart can take.
Unless it is to end: its last sync comes first then, and that needs the disk and no Redis.
Every ledger script may be sent twice (a reply can get lost after the script ran), so each knows its second time.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import redis
import redis.asyncio
from redis.backoff import ExponentialWithJitterBackoff
from redis.retry import Retry

from hogwild.config import Settings

# redis-py annotates every reply as a union over all decodings and over sync and async; ours are bytes, and where they
# enter they are converted to the types that the rest of the code is checked with.
Client: TypeAlias = Any
AsyncClient: TypeAlias = Any

API_TIMEOUT_S = 5.0  # a client is waiting: long enough for an fsync on a busy disk, short enough for a 503
WORKER_TIMEOUT_S = 30.0  # above a 20 s stall of Redis (a fork, a suspended machine) without giving the socket up
WORKER_RETRIES = 300  # at most 1 s apart: five minutes of a dead Redis are survived in mid-job


def redis_url(settings: Settings) -> str:
    """The Redis of this deployment: the given one, else the embedded server that `hogwild up` starts."""
    return settings.redis_url or f"redis://127.0.0.1:{settings.redis_port}/0"


def api_client(url: str) -> Client:
    """Client of a request handler: fails in seconds. Thread-safe; connects on first use, so it may cross a fork."""
    return redis.Redis.from_url(
        url, socket_timeout=API_TIMEOUT_S, socket_connect_timeout=2.0, health_check_interval=30,
        retry=Retry(ExponentialWithJitterBackoff(base=0.05, cap=0.5), 2))


def async_client(url: str) -> AsyncClient:
    """Client of event streams: few connections, and whoever finds none free waits for one."""
    pool = redis.asyncio.BlockingConnectionPool.from_url(
        url, max_connections=16, timeout=20, socket_timeout=WORKER_TIMEOUT_S, socket_connect_timeout=2.0,
        health_check_interval=30)
    return redis.asyncio.Redis.from_pool(pool)


class _UntilGivenUp(ExponentialWithJitterBackoff):
    """The pauses between a client's attempts, and the end of all as soon as `give_up` says so."""

    def __init__(self, give_up: Callable[[], bool]) -> None:
        super().__init__(base=0.05, cap=1.0)
        self._give_up = give_up

    def __deepcopy__(self, _: object) -> "_UntilGivenUp":
        return self  # every connection gets a copy: of this, and not of what `give_up` may belong to

    def compute(self, failures: int) -> float:
        if self._give_up():
            raise redis.ConnectionError("Redis does not answer, and is not waited for any more.")
        return super().compute(failures)


def _never() -> bool:
    return False


def worker_client(url: str, *, retries: int = WORKER_RETRIES, give_up: Callable[[], bool] = _never) -> Client:
    """Client of the worker: waits out a restart of Redis instead of losing the job.

    `retries`: attempts after the first, at most a second apart. `give_up`: asked after each attempt; once it says True,
    a call that fails is not tried again.
    """
    return redis.Redis.from_url(
        url, socket_timeout=WORKER_TIMEOUT_S, socket_connect_timeout=2.0, health_check_interval=30,
        retry=Retry(_UntilGivenUp(give_up), retries,
                    supported_errors=(redis.ConnectionError, redis.TimeoutError, redis.exceptions.BusyLoadingError,
                                      ConnectionError, TimeoutError)))
