"""Events of jobs from their Redis streams, for any number of followers over one connection.

A blocking read holds a connection of its own; two hundred people who follow a job must not hold two hundred. So one
task per process reads the streams of all followed jobs and hands what it finds to the followers, each of which has
read what lay there before by itself.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import redis

from hogwild.tasks.connections import AsyncClient
from hogwild.tasks.keys import FINAL_STATES, Keys

log = logging.getLogger("hogwild.api")

BLOCK_MS = 250  # one blocking read; a new follower's stream is part of the next one
ENDING_S = 1.0  # how long a follower may take to notice that the server ends
IDLE_S = 10.0  # without an event for this long, a follower looks at the stream and its job itself
BATCH = 500
BACKLOG = 2000  # events that a slow follower may be behind before it reads the stream again by itself

Entry = tuple[str, str, str]  # event id, kind, JSON


class Hub:
    """Reads the streams of all followed jobs of one event loop."""

    def __init__(self, client: AsyncClient, keys: Keys) -> None:
        self.client = client
        self.keys = keys
        self._followers: dict[str, list[asyncio.Queue[Entry | None]]] = {}
        self._read: dict[str, str] = {}  # stream → last id that was handed out
        self._task: asyncio.Task[None] | None = None

    async def follow(self, job_id: str, after: str, ending: Callable[[], bool] = lambda: False) -> AsyncIterator[Entry]:
        """Each event after the id `after`, waiting for new ones until the job has ended or is forgotten.

        Ends early as soon as `ending` says so; it is asked about once a second.
        """
        key = self.keys("events", job_id)
        queue: asyncio.Queue[Entry | None] = asyncio.Queue(BACKLOG)
        await self._join(key, queue)
        clock = asyncio.get_running_loop().time
        behind = True  # the stream may hold events that the hub had handed out before
        try:
            while not ending():
                if behind:
                    # The state first: when it is final, the last event is among what is read after it.
                    state = await self.client.hget(self.keys("job", job_id), "state")
                    entries = _entries(await self.client.xrange(key, f"({after}", "+", count=BATCH))
                    for entry in entries:
                        after = entry[0]
                        yield entry
                        if entry[1] in FINAL_STATES:
                            return
                    if not entries and (state is None or state.decode() in FINAL_STATES):
                        return
                    behind, look_at = len(entries) == BATCH, clock() + IDLE_S
                    continue
                try:
                    async with asyncio.timeout(ENDING_S):
                        new = await queue.get()
                except TimeoutError:
                    behind = clock() >= look_at
                    continue
                look_at = clock() + IDLE_S
                if new is None:  # too slow: some were not kept in the queue
                    behind = True
                elif _order(new[0]) > _order(after):
                    after = new[0]
                    yield new
                    if new[1] in FINAL_STATES:
                        return
        finally:
            self._leave(key, queue)

    async def _join(self, key: str, queue: "asyncio.Queue[Entry | None]") -> None:
        last = _entries(await self.client.xrevrange(key, "+", "-", count=1))
        self._followers.setdefault(key, []).append(queue)
        # What is there already each follower reads by itself: its own place must not be that of the others.
        self._read.setdefault(key, last[0][0] if last else "0-0")
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())

    def _leave(self, key: str, queue: "asyncio.Queue[Entry | None]") -> None:
        self._followers[key].remove(queue)
        if not self._followers[key]:
            del self._followers[key], self._read[key]

    async def _run(self) -> None:
        """Until nobody follows anything."""
        while self._read:
            try:
                answer = await self.client.xread(dict(self._read), count=BATCH, block=BLOCK_MS)
            except redis.RedisError as error:
                log.warning("events can't be read: %s", error)
                await asyncio.sleep(1)
                continue
            for raw_key, raw in answer.items() if isinstance(answer, dict) else answer or []:
                key = raw_key.decode()
                entries = _entries(raw)
                if key not in self._followers or not entries:
                    continue
                self._read[key] = entries[-1][0]
                for queue in self._followers[key]:
                    for entry in entries:
                        _hand(queue, entry)

    async def close(self) -> None:
        """Stop reading."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task


def _hand(queue: "asyncio.Queue[Entry | None]", entry: Entry) -> None:
    try:
        queue.put_nowait(entry)
    except asyncio.QueueFull:
        while not queue.empty():
            queue.get_nowait()
        queue.put_nowait(None)


def _order(event_id: str) -> tuple[int, int]:
    milliseconds, _, number = event_id.partition("-")
    return int(milliseconds), int(number or 0)


def _entries(raw: Any) -> list[Entry]:
    """Entries of a stream. RESP3 wraps them in one more list than RESP2."""
    if raw and isinstance(raw[0], list):
        raw = [entry for part in raw for entry in part]
    return [(event_id.decode(), fields[b"event"].decode(), fields[b"data"].decode()) for event_id, fields in raw]
