"""What the job service costs, against a bare FastAPI + `apply_async` that keeps nothing, in the same run.

    python bench/service.py                 about five minutes on two cores
    python bench/service.py --seconds 2 --jobs 10000

One Valkey with `appendfsync always` serves both. Three questions:

    throughput   submits and polls a second, p50 and p99, with 1, 32 and 256 clients; one API process each, no worker.
                 The two are measured turn and turn about, several rounds, and the medians are reported
    dispatch     submit → first step begun (durably), with an idle worker: what the ledger adds to Celery's own way
    ledger       memory and latency with 100,000 jobs in it, against an empty one

The result goes to bench/results/service.json.
"""

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import redis
from rich.console import Console
from rich.progress import track
from rich.table import Table

import hogwild
from hogwild.config import Settings
from hogwild.stack.embedded_redis import server_binary
from hogwild.tasks.ledger import Ledger
from hogwild.tasks.payloads import Sample, pack
from hogwild.tasks.registry import ModelInfo, Registry

ROOT = Path(__file__).parents[1]
PARTS = Path(__file__).parent / "service_parts"
CLIENTS = (1, 32, 256)
GOAL_THROUGHPUT = 0.8  # of the bare service's submits a second
GOAL_DISPATCH_MS = 50.0  # added to its p99
SAMPLE = {"context_ids": list(range(64)), "continuation_ids": list(range(32)), "steps": 1}
console = Console(highlight=False)


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Site:
    """Redis, both APIs, both workers."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port, self.ours, self.bare = free_port(), free_port(), free_port()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.url, self.bare_url = f"redis://127.0.0.1:{self.port}/0", f"redis://127.0.0.1:{self.port}/1"
        self.settings = Settings(redis_url=self.url, served_model_name="bench", queue_limit=10**9,
                                 data_dir=directory, runtime_dir=directory)
        kept = {k: v for k, v in os.environ.items() if not k.startswith("HOGWILD_")}
        self.env = {**kept, "HOGWILD_REDIS_URL": self.url, "HOGWILD_SERVED_MODEL_NAME": "bench",
                    "HOGWILD_QUEUE_LIMIT": str(10**9), "HOGWILD_RUNTIME_DIR": str(directory),
                    "BENCH_BARE_REDIS": self.bare_url, "PYTHONPATH": str(PARTS), "OMP_NUM_THREADS": "1"}
        self.start("redis", [str(server_binary()), "--port", str(self.port), "--dir", str(directory),
                             "--appendonly", "yes", "--appendfsync", "always", "--save", "",
                             "--maxmemory-policy", "noeviction"])
        self.client = redis.Redis.from_url(self.url)
        self.bare_client = redis.Redis.from_url(self.bare_url)
        wait(self.client.ping)
        self.ledger = Ledger(self.client, self.settings)
        self.empty()
        uvicorn = [sys.executable, "-m", "uvicorn", "--log-level", "warning"]
        self.start("api", [*uvicorn, "--factory", "hogwild.api.app:main", "--port", str(self.ours)])
        self.start("bare", [*uvicorn, "bare:app", "--port", str(self.bare)])
        wait(lambda: httpx.get(f"http://127.0.0.1:{self.ours}/readyz").status_code == 200)
        wait(lambda: httpx.get(f"http://127.0.0.1:{self.bare}/docs").status_code == 200)

    def start(self, name: str, argv: list[str]) -> None:
        """Start a process; its output goes to a file."""
        with (self.directory / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(argv, env=self.env, cwd=PARTS, stdout=log, stderr=log)

    def start_workers(self) -> None:
        """Both workers, one child each."""
        celery = [sys.executable, "-m", "celery", "-q", "-A"]
        options = ["worker", "-c", "1", "--without-mingle", "--without-gossip"]
        self.start("worker", [*celery, "worker:app", *options, "-n", "ours@%h"])
        self.start("bare-worker", [*celery, "bare:celery", *options, "-n", "bare@%h"])
        wait(lambda: self.client.exists(self.ledger.keys("worker")), 60)
        wait(lambda: self.bare_client.exists("_kombu.binding.bare"), 60)

    def empty(self) -> None:
        """Both databases, as at the start."""
        for client in (self.client, self.bare_client):
            client.flushdb()
        Registry(self.client, "bench").publish_model(ModelInfo(
            served_model_name="bench", model_path="-", vocab_size=1000, max_model_len=4096))

    def stop(self) -> None:
        """End everything."""
        for name in reversed(self.processes):
            self.processes[name].terminate()
        for process in self.processes.values():
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()


def wait(ready: Callable[[], Any], timeout_s: float = 30) -> None:
    """Until `ready` returns something true; connection errors count as not yet."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            if ready():
                return
        except (httpx.HTTPError, redis.RedisError):
            pass
        if time.monotonic() > deadline:
            raise SystemExit("a part of the benchmark did not start")
        time.sleep(0.05)


def load(port: int, clients: int, seconds: float, requests: list[Any]) -> dict[str, Any]:
    """One measurement by the load generator, in a process of its own."""
    job = {"host": "127.0.0.1", "port": port, "clients": clients, "seconds": seconds, "requests": requests}
    done = subprocess.run([sys.executable, PARTS / "load.py"], input=json.dumps(job).encode(), check=True,
                          capture_output=True)
    result: dict[str, Any] = json.loads(done.stdout)
    if result["errors"]:
        raise SystemExit(f"{result['errors']} requests failed: {result['first_error']}")
    return result


def throughput(site: Site, seconds: float, rounds: int) -> dict[str, Any]:
    """Submits and polls of both, turn and turn about."""
    found: dict[str, Any] = {}
    for clients in CLIENTS:
        runs: dict[str, list[dict[str, Any]]] = {}
        for turn in range(rounds):
            site.empty()
            sides = [("hogwild", site.ours), ("bare", site.bare)]
            for name, port in sides if turn % 2 == 0 else sides[::-1]:
                ids = [httpx.post(f"http://127.0.0.1:{port}/train", json=SAMPLE).json()["id"] for _ in range(20)]
                load(port, clients, 0.5, [("POST", "/train", SAMPLE)])  # warm
                runs.setdefault(f"{name}_submit", []).append(load(port, clients, seconds,
                                                                  [("POST", "/train", SAMPLE)]))
                runs.setdefault(f"{name}_poll", []).append(load(port, clients, seconds,
                                                                [("GET", f"/train/{i}", None) for i in ids]))
        table: dict[str, Any] = {
            what: {key: statistics.median(run[key] for run in each) for key in ("per_second", "p50_ms", "p99_ms")}
            for what, each in runs.items()}
        for what in ("submit", "poll"):
            table[f"{what}_ratio"] = table[f"hogwild_{what}"]["per_second"] / table[f"bare_{what}"]["per_second"]
        found[str(clients)] = table
    return found


def dispatch(site: Site, count: int) -> dict[str, Any]:
    """Submit → first step, one job at a time, an idle worker each."""
    site.empty()
    site.start_workers()
    times: dict[str, list[float]] = {"hogwild": [], "bare": []}
    with httpx.Client() as http:
        for n in range(count + 10):
            started = time.monotonic()
            job_id = http.post(f"http://127.0.0.1:{site.ours}/train", json=SAMPLE).json()["id"]
            wait(lambda job_id=job_id: site.client.exists(f"bench:{job_id}"))
            began = float(site.client.get(f"bench:{job_id}"))
            bare_started = time.monotonic()
            bare_id = http.post(f"http://127.0.0.1:{site.bare}/train", json=SAMPLE).json()["id"]
            key = f"celery-task-meta-{bare_id}"
            wait(lambda key=key: site.bare_client.exists(key))
            bare_began = float(json.loads(site.bare_client.get(key))["result"])
            if n >= 10:
                times["hogwild"].append(began - started)
                times["bare"].append(bare_began - bare_started)
    found: dict[str, Any] = {}
    for name, values in times.items():
        cuts = statistics.quantiles(values, n=100)
        found[name] = {"p50_ms": cuts[49] * 1e3, "p99_ms": cuts[98] * 1e3}
    found["added_p99_ms"] = found["hogwild"]["p99_ms"] - found["bare"]["p99_ms"]
    found["jobs"] = count
    for name in ("worker", "bare-worker"):
        site.processes.pop(name).terminate()
    return found


def fill(site: Site, count: int) -> None:
    """Submit jobs straight to the ledger, from a few threads: the server writes them to disk together."""
    threads = 16
    shown = iter(track(range(count), f"{count:,} jobs into the ledger", console=console, transient=True))
    lock = threading.Lock()

    def some(first: int) -> None:
        for n in range(first, count, threads):
            site.ledger.submit(pack([Sample([n % 1000], [n // 1000 % 1000, n % 7])]), {"steps": 1},
                               metadata={"n": str(n % 10)})
            with lock:
                next(shown, None)

    workers = [threading.Thread(target=some, args=(k,)) for k in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def memory(site: Site) -> tuple[int, int]:
    """Redis' memory in bytes, and the number of jobs."""
    return site.client.info("memory")["used_memory"], site.client.zcard(site.ledger.keys("jobs"))


def ledger(site: Site, count: int, seconds: float) -> dict[str, Any]:
    """Memory and latency of an empty ledger and of a full one."""
    found: dict[str, Any] = {"jobs": count}
    site.empty()
    for name in ("empty", "full"):
        if name == "full":
            before, there = memory(site)
            fill(site, count)
            after, now = memory(site)
            found["bytes_per_job"] = (after - before) / (now - there)
        base = f"http://127.0.0.1:{site.ours}"
        job = httpx.post(f"{base}/train", json=SAMPLE).json()["id"]
        found[name] = {
            what: {key: value for key, value in load(site.ours, 1, seconds, [request]).items()
                   if key in ("p50_ms", "p99_ms")}
            for what, request in {
                "submit": ("POST", "/train", SAMPLE), "poll": ("GET", f"/train/{job}", None),
                "list": ("GET", "/train?limit=20", None), "list_queued": ("GET", "/train?state=queued", None),
                "status": ("GET", "/train/status", None), "metrics": ("GET", "/metrics", None)}.items()}
    found["slowdown"] = {what: found["full"][what]["p50_ms"] / found["empty"][what]["p50_ms"] for what in found["full"]}
    return found


def show(result: dict[str, Any]) -> None:
    """Tables of the result."""
    table = Table("clients", "", "jobs/s", "p50 ms", "p99 ms", "bare jobs/s", "p50 ms", "p99 ms", "ratio")
    for clients, row in result["throughput"].items():
        for what in ("submit", "poll"):
            ours, bare = row[f"hogwild_{what}"], row[f"bare_{what}"]
            table.add_row(clients, what, *(f"{side[key]:.1f}" for side in (ours, bare)
                                           for key in ("per_second", "p50_ms", "p99_ms")),
                          f"{row[f'{what}_ratio']:.2f}")
    console.print(table)
    sent, kept = result["dispatch"], result["ledger"]
    ours, bare = sent["hogwild"], sent["bare"]
    console.print(f"submit → first step: p50 {ours['p50_ms']:.1f} ms, p99 {ours['p99_ms']:.1f} ms; bare "
                  f"{bare['p50_ms']:.1f} and {bare['p99_ms']:.1f} ms; added at p99 {sent['added_p99_ms']:.1f} ms")
    table = Table(f"ledger of {kept['jobs']:,} jobs", "empty p50 ms", "full p50 ms", "empty p99 ms", "full p99 ms",
                  "slowdown")
    for what, slower in kept["slowdown"].items():
        table.add_row(what, *(f"{kept[side][what][key]:.2f}" for key in ("p50_ms", "p99_ms")
                              for side in ("empty", "full")), f"{slower:.2f}")
    console.print(table)
    console.print(f"{kept['bytes_per_job']:.0f} bytes of Redis memory for each queued job, its samples, message and "
                  "events included")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="of each throughput measurement")
    parser.add_argument("--dispatches", type=int, default=300)
    parser.add_argument("--jobs", type=int, default=100_000, help="in the full ledger")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "service.json")
    options = parser.parse_args()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hw-bench-")))
        site = Site(directory)
        stack.callback(site.stop)
        result = {
            "measured_at": datetime.now(UTC).isoformat(timespec="seconds"), "hogwild": hogwild.__version__,
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
            "python": platform.python_version(), "redis": site.client.info("server")["redis_version"],
            "sample_tokens": len(SAMPLE["context_ids"]) + len(SAMPLE["continuation_ids"]),  # type: ignore[arg-type]
            "seconds": options.seconds, "rounds": options.rounds,
            "throughput": throughput(site, options.seconds, options.rounds),
            "dispatch": dispatch(site, options.dispatches),
            "ledger": ledger(site, options.jobs, options.seconds)}
    goals = {
        "submit throughput ≥ 80 % of bare": min(row["submit_ratio"] for row in result["throughput"].values())
        >= GOAL_THROUGHPUT,
        "dispatch p99 ≤ 50 ms above bare": result["dispatch"]["added_p99_ms"] <= GOAL_DISPATCH_MS}
    result["goals_met"] = goals
    show(result)
    for goal, met in goals.items():
        console.print(f"{'[green]met[/]' if met else '[red]not met[/]'}  {goal}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
