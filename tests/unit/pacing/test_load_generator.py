"""The benchmark's load generator against a server of known speed: its numbers must be that server's."""

import asyncio
import importlib.util
import socket
from pathlib import Path

import pytest

pytest.importorskip("aiohttp", reason="comes with vLLM")

from aiohttp import web

SPEC = importlib.util.spec_from_file_location("bench_load", Path(__file__).parents[3] / "bench" / "load.py")
assert SPEC and SPEC.loader
load = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(load)

FIRST_S, NEXT_S = 0.05, 0.01


@pytest.fixture
async def server():
    bodies = []

    async def completions(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        bodies.append(body)
        response = web.StreamResponse(headers={"X-Hogwild-Weight-Version": str(len(bodies)),
                                               "Content-Type": "text/event-stream"})
        await response.prepare(request)
        await asyncio.sleep(FIRST_S - NEXT_S)
        for i in range(body["max_tokens"]):
            await asyncio.sleep(NEXT_S)
            await response.write(b'data: {"i": %d}\n\n' % i)
        await response.write(b"data: [DONE]\n\n")
        return response

    app = web.Application()
    app.router.add_post("/v1/completions", completions)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    await web.TCPSite(runner, "127.0.0.1", port).start()
    yield f"http://127.0.0.1:{port}", bodies
    await runner.cleanup()


async def test_closed_loop_measures_the_servers_speed(server):
    url, bodies = server
    shape = load.Shape(url=url, model="m", prompt_tokens=7, output_tokens=10, vocabulary=500)

    result = await load.measure(shape, streams=3, seconds=1.5, warmup=0.3)

    assert 0.9 * NEXT_S * 1e3 <= result["itl_ms"]["p50"] <= 2.5 * NEXT_S * 1e3
    assert 0.9 * FIRST_S * 1e3 <= result["ttft_ms"]["p50"] <= 2.5 * FIRST_S * 1e3
    expected = 3 * 10 / (FIRST_S + 9 * NEXT_S)
    assert 0.4 * expected <= result["output_tokens_per_s"] <= 1.1 * expected
    assert result["requests_failed"] == 0
    first, last = result["weight_versions"]
    assert first == 1 and len(bodies) - 3 <= last <= len(bodies)  # what was under way at the end was not answered
    assert len(result["windows"]) == 1 and result["windows"][0]["t"] == 0
    body = bodies[0]
    assert len(body["prompt"]) == 7 and max(body["prompt"]) < 500 and body["stream"] and body["ignore_eos"]
    assert len({tuple(b["prompt"]) for b in bodies}) == len(bodies)  # no prompt twice: nothing comes from a cache


async def test_poisson_arrivals_come_at_the_rate_asked_for(server):
    url, bodies = server
    shape = load.Shape(url=url, model="m", output_tokens=3)

    await load.measure(shape, rate=40, seconds=2.0, warmup=0.0)

    assert 40 <= len(bodies) <= 130  # 80 expected; a loaded machine is late


async def test_a_server_that_refuses_is_counted_not_hidden(server):
    url, _ = server
    shape = load.Shape(url=f"{url}/nowhere", model="m")

    result = await load.measure(shape, streams=2, seconds=0.4, warmup=0.0)

    assert result["requests_failed"] >= 2
    assert result["output_tokens_per_s"] == 0 and result["itl_ms"] == {}


def test_tokens_that_came_in_one_chunk_are_counted():
    seen = load.Recorder()
    seen.first, seen.next, seen.done = [(1.0, 0.1)], [(1.1, 0.1)] * 4, [(1.5, 5)]

    assert load.summarise(seen, 0.0, 2.0, output_tokens=10)["output_tokens_per_s"] == pytest.approx(5 * 2 / 2.0)


def test_windows_leave_out_what_is_not_a_whole_second():
    following = [(10.2, 0.1), (10.4, 0.3), (10.6, 0.2), (12.1, 0.5)]

    assert load.windows(following, 10.0, 12.5) == [
        {"t": 0, "tokens": 3, "p50_ms": pytest.approx(200), "mean_ms": pytest.approx(200)}]
