"""Streams of events: each follower sees all of them to the last, and none keeps a server from ending."""

import asyncio
from types import SimpleNamespace

import httpx
import pytest
from fastapi import FastAPI

from hogwild.api import events
from hogwild.api.app import create_router
from hogwild.api.events import Hub
from hogwild.tasks.connections import async_client
from hogwild.tasks.ledger import Ledger
from hogwild.tasks.payloads import Sample, pack


@pytest.fixture
def ledger(redis_client, settings):
    return Ledger(redis_client, settings)


@pytest.fixture
def job_id(ledger):
    return ledger.submit(pack([Sample([1], [2, 3])]), {})[0]


@pytest.fixture
async def hub(ledger, settings):
    made = Hub(async_client(settings.redis_url), ledger.keys)
    yield made
    await made.close()
    await made.client.aclose()


async def test_stream_ends_when_the_server_is_told_to_exit(settings, job_id):
    # Given a follower on the port of a server that handles its signals itself, as vLLM does
    app = FastAPI()
    app.include_router(create_router(settings))
    app.state.server = SimpleNamespace(should_exit=False)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as http:
        follower = asyncio.create_task(http.get(f"/train/{job_id}/events"))
        await asyncio.sleep(1.5)
        assert not follower.done()
        # When it is told to exit
        app.state.server.should_exit = True
        # Then the stream ends, with what had happened
        async with asyncio.timeout(20):
            assert "event: queued" in (await follower).text


async def test_last_event_id_of_one_follower_is_not_that_of_another(hub, ledger, job_id):
    async def follow(after, seen):
        async for _, kind, _ in hub.follow(job_id, after):
            seen.append(kind)

    ahead, good = [], []
    followers = [asyncio.create_task(follow("999999999999999-0", ahead))]
    await asyncio.sleep(0.3)
    followers.append(asyncio.create_task(follow("0-0", good)))
    await asyncio.sleep(0.5)
    ledger.request(job_id, "pause")
    ledger.request(job_id, "cancel")
    async with asyncio.timeout(5):  # long before a follower looks by itself
        await followers[1]
    assert good[0] == "queued" and good[-1] == "cancelled" and "paused" in good
    followers[0].cancel()


async def test_last_event_that_the_hub_lost_is_read_before_the_stream_ends(hub, ledger, job_id, monkeypatch):
    monkeypatch.setattr(events, "IDLE_S", 0.5)
    monkeypatch.setattr(events, "ENDING_S", 0.1)
    monkeypatch.setattr(events, "_hand", lambda queue, entry: None)
    seen = []
    async with asyncio.timeout(20):
        async for _, kind, _ in hub.follow(job_id, "0-0"):
            seen.append(kind)
            if kind == "queued":
                ledger.request(job_id, "cancel")
    assert seen[-1] == "cancelled"


async def test_stream_of_an_ended_job_ends_at_once_after_its_last_event(hub, ledger, job_id):
    ledger.request(job_id, "cancel")
    last = [event_id async for event_id, _, _ in hub.follow(job_id, "0-0")][-1]
    async with asyncio.timeout(5):
        assert [entry async for entry in hub.follow(job_id, last)] == []
