"""The benchmark's load generator against a server of known speed: its numbers must be that server's."""

import asyncio
import importlib.util
import itertools
import socket
import statistics
import time
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
    """URL; the bodies of all requests; when each was received and its tokens were written, by the wall clock."""
    bodies, times = [], []

    async def completions(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        bodies.append(body)
        times.append([time.time()])
        mine = times[-1]
        response = web.StreamResponse(headers={"X-Hogwild-Weight-Version": str(len(bodies)),
                                               "Content-Type": "text/event-stream"})
        await response.prepare(request)
        await asyncio.sleep(FIRST_S - NEXT_S)
        for i in range(body["max_tokens"]):
            await asyncio.sleep(NEXT_S)
            await response.write(b'data: {"i": %d}\n\n' % i)
            mine.append(time.time())
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
    yield f"http://127.0.0.1:{port}", bodies, times
    await runner.cleanup()


async def test_closed_loop_measures_the_servers_speed(server):
    url, bodies, times = server
    shape = load.Shape(url=url, model="m", prompt_tokens=7, output_tokens=10, vocabulary=500)

    result = await load.measure(shape, streams=3, seconds=1.5, warmup=0.3)

    # What this server really did, which on a busy machine is less than it was told to
    gaps = [b - a for t in times for a, b in itertools.pairwise(t[1:])]
    firsts = [t[1] - t[0] for t in times if len(t) > 1]
    start, end = result["start"], result["start"] + result["seconds"]
    written = sum(start <= t < end for each in times for t in each[1:])
    assert NEXT_S * 0.9e3 <= result["itl_ms"]["p50"] == pytest.approx(statistics.median(gaps) * 1e3, rel=0.3)
    assert FIRST_S * 0.9e3 <= result["ttft_ms"]["p50"] == pytest.approx(statistics.median(firsts) * 1e3, rel=0.3)
    assert result["output_tokens_per_s"] == pytest.approx(written / result["seconds"], rel=0.1)
    assert result["requests_failed"] == 0
    first, last = result["weight_versions"]
    assert first == 1 and len(bodies) - 3 <= last <= len(bodies)  # what was under way at the end was not answered
    assert len(result["windows"]) == 1 and result["windows"][0]["t"] == 0
    body = bodies[0]
    assert len(body["prompt"]) == 7 and max(body["prompt"]) < 500 and body["stream"] and body["ignore_eos"]
    lengths = {b["max_tokens"] for b in bodies}  # out of step: prompts are not all read at once
    assert len(lengths) > 3 and lengths <= set(range(5, 16))
    assert len({tuple(b["prompt"]) for b in bodies}) == len(bodies)  # no prompt twice: nothing comes from a cache


async def test_poisson_arrivals_come_at_the_rate_asked_for(server):
    url, bodies, _ = server
    shape = load.Shape(url=url, model="m", output_tokens=3)
    ticks = 0

    async def clock() -> None:  # as many sleeps of the mean gap as this machine finds the time for
        nonlocal ticks
        while True:
            await asyncio.sleep(1 / 40)
            ticks += 1

    ticking = asyncio.create_task(clock())
    await load.measure(shape, rate=40, seconds=2.0, warmup=0.0)
    ticking.cancel()

    assert 0.5 * ticks <= len(bodies) <= 1.65 * ticks


async def test_a_server_that_refuses_is_counted_not_hidden(server):
    url, *_ = server
    shape = load.Shape(url=f"{url}/nowhere", model="m")

    result = await load.measure(shape, streams=2, seconds=3.0, warmup=0.0)

    assert result["requests_failed"] >= 2
    assert result["output_tokens_per_s"] == 0 and result["itl_ms"] == {}


def test_tokens_that_came_in_one_chunk_are_counted():
    seen = load.Recorder()
    seen.first, seen.next, seen.done = [(1.0, 0.1)], [(1.1, 0.1)] * 4, [(1.5, 10, 5)]

    assert load.summarise(seen, 0.0, 2.0)["output_tokens_per_s"] == pytest.approx(5 * 2 / 2.0)


def test_windows_leave_out_what_is_not_a_whole_second():
    following = [(10.2, 0.1), (10.4, 0.3), (10.6, 0.2), (12.1, 0.5)]

    assert load.windows(following, 10.0, 12.5) == [
        {"t": 0, "tokens": 3, "p50_ms": pytest.approx(200), "mean_ms": pytest.approx(200)}]
