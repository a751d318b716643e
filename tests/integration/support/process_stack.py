"""The processes of the job service, really started, killed and restarted."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import redis
from tiny_model import read_weights, update

from hogwild.config import Settings
from hogwild.tasks.ledger import Ledger
from hogwild.tasks.registry import Registry

HERE = Path(__file__).parent
END_S = 250  # no test waits longer for what it expects


class Stack:
    """The processes of one test and their supervisor."""

    def __init__(self, server, directory: Path, free_port, *, step_s: float = 0.03, apis: int = 1) -> None:
        self.server = server
        self.directory = directory
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("HOGWILD_")},
            "HOGWILD_REDIS_URL": server.url, "HOGWILD_SERVED_MODEL_NAME": "tiny", "HOGWILD_SYNC_TICK_S": "2",
            "HOGWILD_RUNTIME_DIR": str(directory / "run"), "HOGWILD_DATA_DIR": str(directory / "data"),
            "FAULT_STEP_S": str(step_s), "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
        self.settings = Settings(redis_url=server.url, served_model_name="tiny", runtime_dir=directory / "run",
                                 data_dir=directory / "data")
        self.client = redis.Redis.from_url(server.url, socket_timeout=10)
        self.ledger = Ledger(self.client, self.settings)
        self.ports = [free_port() for _ in range(apis)]
        self.sent: dict[str, list[int]] = {}  # job → what it is to learn
        python = sys.executable
        celery = [python, "-m", "celery", "-q"]
        self.commands = {
            "worker": [*celery, "-A", "fault_worker", "worker", "-c", "1", "--without-mingle", "--without-gossip"],
            "beat": [*celery, "-A", "hogwild.tasks.schedule:app", "beat", "-s", str(directory / "beat")],
            **{f"api{n}": [python, "-m", "uvicorn", "--factory", "hogwild.api.app:main", "--port", str(port),
                           "--log-level", "warning"] for n, port in enumerate(self.ports)}}
        self.flower_port = free_port()
        self.commands["flower"] = [*celery, "-A", "hogwild.tasks.app", "flower", f"--port={self.flower_port}",
                                   "--address=127.0.0.1"]
        self.environment["FLOWER_UNAUTHENTICATED_API"] = "true"
        self.processes: dict[str, subprocess.Popen] = {}
        self.ending = threading.Event()
        self.supervisor = threading.Thread(target=self._supervise, daemon=True)

    def start(self, *names: str) -> "Stack":
        for name in names:
            self._spawn(name)
        if not self.supervisor.is_alive():
            self.supervisor.start()
        return self

    def _spawn(self, name: str) -> None:
        with (self.directory / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(self.commands[name], cwd=HERE, env=self.environment, stdout=log,
                                                    stderr=log, start_new_session=True)

    def _supervise(self) -> None:
        while not self.ending.wait(0.1):
            for name, process in list(self.processes.items()):
                if process.poll() is not None and not self.ending.is_set():
                    (self.directory / "beat").unlink(missing_ok=True)  # a schedule file that beat died writing
                    self._spawn(name)
            if self.server.process.poll() is not None:
                with contextlib.suppress(RuntimeError):  # killed again while it started: the next round starts it
                    self.server.start()

    def stop(self) -> None:
        self.ending.set()
        if self.supervisor.is_alive():
            self.supervisor.join()
        for process in self.processes.values():
            try:
                family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
            except psutil.NoSuchProcess:
                continue
            for member in family:
                try:
                    member.kill()
                except psutil.NoSuchProcess:
                    continue
            process.wait()

    def child(self) -> int | None:
        """Process id of the worker's child."""
        status = None
        with contextlib.suppress(redis.RedisError):
            status = Registry(self.client, "tiny").worker()
        return status and status.get("pid")

    def kill(self, what: str) -> None:
        """kill -9."""
        if what == "redis":
            self.server.kill()
        elif what == "child":
            pid = self.child()
            if pid and psutil.pid_exists(pid):
                os.kill(pid, signal.SIGKILL)
        else:
            self.processes[what].kill()

    def submit(self, count: int, *, steps: int = 5, clients: int = 4, seed: int = 0) -> list[str]:
        """Submit jobs over HTTP as a careful client does: again with the same key until there is a 202."""
        accepted: dict[int, str] = {}

        def one(n: int, http: httpx.Client) -> None:
            rng = random.Random(f"{seed}/{n}")
            body = {"context_ids": [n % 900], "continuation_ids": [rng.randrange(1000) for _ in range(4)],
                    "steps": steps, "metadata": {"n": str(n)}}
            deadline = time.monotonic() + END_S
            while time.monotonic() < deadline:
                port = self.ports[rng.randrange(len(self.ports))]
                try:
                    answer = http.post(f"http://127.0.0.1:{port}/train", json=body, timeout=10,
                                       headers={"Idempotency-Key": f"{seed}-{n}"})
                except httpx.HTTPError:
                    time.sleep(0.1)
                    continue
                if answer.status_code == 202:
                    accepted[n] = answer.json()["id"]
                    self.sent[accepted[n]] = body["continuation_ids"]
                    return
                assert answer.status_code == 503, answer.text
                time.sleep(0.1)

        def many(first: int) -> None:
            with httpx.Client() as http:
                for n in range(first, count, clients):
                    one(n, http)

        threads = [threading.Thread(target=many, args=(k,)) for k in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(accepted) == count
        return [accepted[n] for n in range(count)]

    def wait_ended(self, jobs: list[str], timeout_s: float = END_S) -> None:
        """`timeout_s`: seconds in which none ends."""
        deadline = time.monotonic() + timeout_s
        open_jobs = list(jobs)
        while open_jobs:
            with contextlib.suppress(redis.RedisError):
                if self.ledger.get(open_jobs[0]).final:
                    open_jobs.pop(0)
                    deadline = time.monotonic() + timeout_s
                    continue
            assert time.monotonic() < deadline, f"not ended: {open_jobs}\n{self.logs()}"
            time.sleep(0.05)

    def wait_steps(self, total: int, timeout_s: float = END_S) -> None:
        """Until so many steps are applied: something is really in flight."""
        self.wait_until(lambda: int(self.client.hget(self.ledger.keys("counters"), "steps_applied") or 0) >= total,
                        timeout_s)

    def wait_until(self, done: Callable[[], bool], timeout_s: float = END_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not done():
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.02)

    def logs(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-1500:]}"
                         for path in sorted(self.directory.glob("*.log")))

    def check(self, jobs: list[str], *, steps: int, ended: str = "succeeded") -> None:
        """Nothing lost, nothing repeated, the weights are a replay of exactly the applied steps."""
        assert len(set(jobs)) == len(jobs)
        made: dict[int, tuple[list[int], int]] = {}
        for job_id in jobs:
            job = self.ledger.get(job_id)
            if ended:
                assert job.state == ended, (job, self.logs())
                assert job.steps_begun == steps
            assert job.steps_begun == job.steps_applied + job.steps_interrupted
            ids = self.sent[job_id]
            rows = self.client.xrange(self.ledger.keys("events", job_id))
            events = [(fields[b"event"].decode(), json.loads(fields[b"data"])) for _, fields in rows]
            applied = [data["step"] for kind, data in events if kind == "step"]
            interrupted = [data["step"] for kind, data in events if kind == "interrupted"]
            assert sorted(applied + interrupted) == list(range(job.steps_begun)), (job_id, events)
            assert len(applied) == job.steps_applied
            for kind, data in events:
                if kind == "step":
                    assert data["weight_version"] not in made, "two steps made one weight version"
                    made[data["weight_version"]] = (ids, data["step"])
        version, weights = read_weights(self.settings.model_runtime_dir / "weights")
        assert sorted(made) == list(range(1, version + 1)), "a step is in the weights that no job knows of"
        expected = (1.0,) * len(weights)
        for n in range(1, version + 1):
            expected = update(expected, *made[n])
        assert weights == expected
        self._nothing_left()

    def _nothing_left(self) -> None:
        """Samples of jobs that ended are gone; when their retention ends, events and losses go with them."""
        forgetful = Ledger(self.client, self.settings.model_copy(update={"job_retention_s": 1e-6}))
        forgetful.purge()
        left = {key.decode().removeprefix(self.ledger.keys.prefix).split(":")[0]
                for key in self.client.keys(f"{self.ledger.keys.prefix}*")}
        assert left <= {"seq", "counters", "model", "worker", "alive", "idem", "dirty", "payload-bytes"}, left


def ready(stack: Stack, *names: str) -> Stack:
    """Start processes and wait until jobs are accepted."""
    stack.start(*names)
    deadline = time.monotonic() + 120
    for port in stack.ports:
        while True:
            try:
                if httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=10).status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            assert time.monotonic() < deadline, stack.logs()
            time.sleep(0.1)
    return stack
