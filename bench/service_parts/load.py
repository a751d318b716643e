"""A small load generator: keep-alive HTTP/1.1 over raw streams, so that it does not become what is measured."""

import asyncio
import json
import statistics
import sys
import time


async def client(host: str, port: int, requests: list[bytes], until: float, times: list[float],
                 bad: list[str]) -> None:
    """One connection that sends its requests in turn until the time is over."""
    reader, writer = await asyncio.open_connection(host, port)
    n = 0
    while time.perf_counter() < until:
        started = time.perf_counter()
        writer.write(requests[n % len(requests)])
        head = await reader.readuntil(b"\r\n\r\n")
        lower = head.lower()
        at = lower.index(b"content-length:") + 15
        await reader.readexactly(int(lower[at:lower.index(b"\r", at)]))
        times.append(time.perf_counter() - started)
        if head[9:12] not in (b"200", b"202"):
            bad.append(head[:60].decode())
        n += 1
    writer.close()


async def run(job: dict) -> dict:
    """`job`: host, port, clients, seconds, requests (method, path, body)."""
    raw = []
    for method, path, body in job["requests"]:
        content = json.dumps(body).encode() if body is not None else b""
        raw.append(f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                   f"Content-Length: {len(content)}\r\n\r\n".encode() + content)
    times: list[float] = []
    bad: list[str] = []
    started = time.perf_counter()
    until = started + job["seconds"]
    await asyncio.gather(*(client(job["host"], job["port"], raw[k:] + raw[:k], until, times, bad)
                           for k in (i % len(raw) for i in range(job["clients"]))))
    took = time.perf_counter() - started
    cuts = statistics.quantiles(times, n=100) if len(times) > 1 else [times[0]] * 99
    return {"requests": len(times), "per_second": len(times) / took, "p50_ms": cuts[49] * 1e3, "p99_ms": cuts[98] * 1e3,
            "errors": len(bad), "first_error": bad[0] if bad else None}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(run(json.load(sys.stdin)))))
