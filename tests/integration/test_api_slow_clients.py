"""Clients that trickle, hang up or stay: they cost one connection and nothing else."""

import asyncio
import json

import httpx
import pytest

from hogwild.api import problems
from hogwild.api.app import create_app
from hogwild.tasks.ledger import Ledger
from hogwild.tasks.payloads import Sample, pack
from hogwild.tasks.registry import ModelInfo, Registry

BODY = json.dumps({"context_ids": [1], "continuation_ids": [2, 3]}).encode()


@pytest.fixture
def url(serve, settings, redis_client, monkeypatch):
    monkeypatch.setattr(problems, "CHUNK_TIMEOUT_S", 0.5)
    monkeypatch.setattr(problems, "BODY_TIMEOUT_S", 1.0)
    Registry(redis_client, "tiny").publish_model(
        ModelInfo(served_model_name="tiny", model_path="/m", vocab_size=10, max_model_len=8))
    return serve(create_app(settings))


async def connect(url, length):
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"POST /train HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                 f"Content-Length: {length}\r\n\r\n".encode())
    return reader, writer


async def test_body_that_stops_coming_is_answered_408(url):
    reader, writer = await connect(url, len(BODY))
    writer.write(BODY[:5])
    async with asyncio.timeout(30):
        assert b" 408 " in await reader.readline()
    writer.close()


async def test_body_that_trickles_is_answered_408(url):
    reader, writer = await connect(url, len(BODY))
    async with asyncio.timeout(30):
        answer = asyncio.create_task(reader.readline())
        for byte in BODY:
            if answer.done():
                break
            writer.write(bytes([byte]))
            await asyncio.sleep(0.1)
        assert b" 408 " in await answer
    writer.close()


async def test_client_that_hangs_up_in_its_body_queues_nothing(url, redis_client, settings):
    _, writer = await connect(url, len(BODY))
    writer.write(BODY[:-1])
    writer.close()
    await asyncio.sleep(0.3)
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        assert (await http.get("/train")).json()["data"] == []
        assert (await http.get("/livez")).status_code == 200


async def test_two_hundred_followers_of_one_job_all_see_its_end(url, redis_client, settings, run_job):
    ledger = Ledger(redis_client, settings)
    job_id, _ = ledger.submit(pack([Sample([1], [2, 3])]), {})

    async def follow(http):
        async with http.stream("GET", f"/train/{job_id}/events") as response:
            return [line async for line in response.aiter_lines() if line.startswith("event: ")][-1]

    limits = httpx.Limits(max_connections=300)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as http:
        followers = [asyncio.create_task(follow(http)) for _ in range(200)]
        await asyncio.sleep(1)
        assert (await http.get("/livez")).status_code == 200
        await asyncio.to_thread(run_job, ledger, job_id)
        async with asyncio.timeout(60):
            assert set(await asyncio.gather(*followers)) == {"event: succeeded"}
