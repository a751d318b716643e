"""Load on an OpenAI-compatible server, and what its clients felt: a closed loop of streams, or Poisson arrivals.

    python bench/load.py --url http://127.0.0.1:8000 --model NAME --streams 16 --seconds 10
    python bench/load.py --url http://127.0.0.1:8000 --model NAME --rate 4 --seconds 10

Prints one JSON object. Prompts are random token ids, so that no prefix is cached. A request streams half to one and a
half times `--output-tokens` tokens (`ignore_eos`), evenly distributed: were all of one length, the streams of a closed
loop would end together and wait for each other's prompts, and whatever brings them out of step would look like a gain.
What happens in the first `--warmup` seconds is not counted, and at the end requests in flight are cut off, so that all
of the measured time has the full load.

Needs aiohttp, which vLLM brings along: with httpx, 64 fast streams keep this process busier than vLLM's.
"""

import argparse
import asyncio
import json
import random
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp


@dataclass
class Recorder:
    """What arrived when; times are time.time(), so that they can be laid beside a job's events."""

    first: list[tuple[float, float]] = field(default_factory=list)  # arrival, time to first token (s)
    next: list[tuple[float, float]] = field(default_factory=list)  # arrival, inter-token latency (s)
    done: list[tuple[float, int, int]] = field(default_factory=list)  # end of a request, tokens, chunks they came in
    versions: list[tuple[float, int]] = field(default_factory=list)  # start of a response, weight version
    failed: int = 0


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What each request asks for."""

    url: str
    model: str
    prompt_tokens: int = 256
    output_tokens: int = 128  # the mean
    vocabulary: int = 30_000
    api_key: str | None = None


async def request(session: aiohttp.ClientSession, shape: Shape, rng: random.Random, seen: Recorder) -> None:
    """One streamed completion."""
    tokens = rng.randint(-(-shape.output_tokens // 2), shape.output_tokens * 3 // 2)
    body = {
        "model": shape.model, "max_tokens": tokens, "ignore_eos": True, "temperature": 0, "stream": True,
        "prompt": [rng.randrange(100, shape.vocabulary) for _ in range(shape.prompt_tokens)],
    }  # fmt: skip
    headers = {"Authorization": f"Bearer {shape.api_key}"} if shape.api_key else {}
    sent = time.time()
    last, chunks = 0.0, 0
    try:
        async with session.post(f"{shape.url}/v1/completions", json=body, headers=headers) as response:
            response.raise_for_status()
            if version := response.headers.get("x-hogwild-weight-version"):
                seen.versions.append((time.time(), int(version)))
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                now = time.time()
                if chunks:
                    seen.next.append((now, now - last))
                else:
                    seen.first.append((now, now - sent))
                last = now
                chunks += 1
        seen.done.append((last, tokens, chunks))
    except aiohttp.ClientError:
        seen.failed += 1
        await asyncio.sleep(0.1)


async def closed_loop(session: aiohttp.ClientSession, shape: Shape, streams: int, seen: Recorder) -> None:
    """`streams` clients, each of which asks again as soon as it was answered. Runs until cancelled."""

    async def client(number: int) -> None:
        rng = random.Random(number)
        while True:
            await request(session, shape, rng, seen)

    await asyncio.gather(*(client(n) for n in range(streams)))


async def poisson(session: aiohttp.ClientSession, shape: Shape, rate: float, seen: Recorder) -> None:
    """Requests that come at random, `rate` a second, whether or not earlier ones are done. Runs until cancelled."""
    rng = random.Random(0)
    async with asyncio.TaskGroup() as group:
        while True:
            group.create_task(request(session, shape, random.Random(rng.random()), seen))
            await asyncio.sleep(rng.expovariate(rate))


async def measure(shape: Shape, *, streams: int | None = None, rate: float | None = None, seconds: float,
                  warmup: float = 2.0) -> dict[str, Any]:  # fmt: skip
    """Run one load and summarise what arrived within the `seconds` after `warmup`."""
    seen = Recorder()
    timeout = aiohttp.ClientTimeout(total=None, connect=30)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        load = closed_loop(session, shape, streams, seen) if streams else poisson(session, shape, rate or 1.0, seen)
        task = asyncio.create_task(load)
        await asyncio.wait([task], timeout=warmup + seconds)
        if task.done():
            task.result()  # it never ends by itself: this raises what went wrong
        end = time.time()
        task.cancel()
        await asyncio.wait([task])
    summary = summarise(seen, end - seconds, end)
    return {"streams": streams, "rate": rate, "prompt_tokens": shape.prompt_tokens,
            "output_tokens": shape.output_tokens, **summary}  # fmt: skip


def summarise(seen: Recorder, start: float, end: float) -> dict[str, Any]:
    """Throughput and latencies between two times (s since the epoch); latencies in ms."""
    def within(pairs: list[Any]) -> list[Any]:
        return [p for p in pairs if start < p[0] <= end]

    first, following, done = within(seen.first), within(seen.next), within(seen.done)
    # A slow reader gets several tokens in one chunk: finished requests say how many that was on average.
    chunks = sum(chunks for _, _, chunks in seen.done)
    per_chunk = sum(tokens for _, tokens, _ in seen.done) / chunks if chunks else 1.0
    itl = sorted(latency for _, latency in following)
    ttft = sorted(latency for _, latency in first)
    return {
        "start": start, "seconds": end - start, "requests_finished": len(done), "requests_failed": seen.failed,
        "tokens_per_chunk": per_chunk, "output_tokens_per_s": (len(first) + len(following)) * per_chunk / (end - start),
        "ttft_ms": percentiles(ttft), "itl_ms": percentiles(itl),
        "windows": windows(following, start, end),
        "weight_versions": [min((v for _, v in seen.versions), default=None),
                            max((v for _, v in seen.versions), default=None)],
    }  # fmt: skip


def percentiles(ordered: list[float]) -> dict[str, float]:
    """mean, p50, p99 and max of sorted seconds, in ms; empty when there are none."""
    if not ordered:
        return {}
    return {"mean": statistics.fmean(ordered) * 1e3, "p50": quantile(ordered, 0.5) * 1e3,
            "p99": quantile(ordered, 0.99) * 1e3, "max": ordered[-1] * 1e3}  # fmt: skip


def quantile(ordered: list[float], q: float) -> float:
    """Of sorted values, without interpolation."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * q))]


def windows(following: list[tuple[float, float]], start: float, end: float) -> list[dict[str, float]]:
    """Whole one-second windows that have tokens: seconds since `start`, tokens, inter-token p50 and mean in ms."""
    found: dict[int, list[float]] = {}
    for at, latency in following:
        found.setdefault(int(at - start), []).append(latency)
    return [
        {"t": t, "tokens": len(it), "p50_ms": quantile(sorted(it), 0.5) * 1e3, "mean_ms": statistics.fmean(it) * 1e3}
        for t, it in sorted(found.items())
        if t + 1 <= end - start
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", required=True)
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--streams", type=int)
    how.add_argument("--rate", type=float, help="requests a second")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--warmup", type=float, default=2.0)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=30_000)
    parser.add_argument("--api-key")
    args = parser.parse_args()
    shape = Shape(url=args.url.rstrip("/"), model=args.model, prompt_tokens=args.prompt_tokens,
                  output_tokens=args.output_tokens, vocabulary=args.vocabulary, api_key=args.api_key)  # fmt: skip
    result = asyncio.run(measure(shape, streams=args.streams, rate=args.rate, seconds=args.seconds, warmup=args.warmup))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
