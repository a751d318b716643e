"""Everything real but vLLM itself, for a while, with a user who changes his mind and a fate that kills at random.

Redis, beat, worker and exporter are killed, stopped and stalled while jobs run and are cancelled, paused and resumed,
and syncs, verifications and rollbacks are asked for. Afterwards every accepted job has ended, files and live weights
are the last generation bit for bit, and each generation that is kept can be gone back to.

Longer, or with other dice: make soak SECONDS=600 SEEDS="3 4 5"
"""

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis
from exporter_server import ExporterServer
from worker_site import Site, make_tiny_model, same, until

from hogwild.config import Settings
from hogwild.errors import Conflict, TooManyRequests
from hogwild.gpu_worker.attach import open_views
from hogwild.manifest import Manifest, manifest_path
from hogwild.tasks.payloads import Sample, pack

SECONDS = float(os.environ.get("HOGWILD_SOAK_S", "25"))
SEEDS = [int(seed) for seed in os.environ.get("HOGWILD_SOAK_SEEDS", "1").split()]
KEEP_LAST = 4
# What an operation may fail with when those who do it are killed, or its generation is pruned before its turn.
PARDONED = ("The worker died", "there is no generation")
# In the worker's log these are nobody's fault but ours, but for what Celery's gossip says when Redis is gone.
OURS = re.compile(
    r"^(?:Assertion|Attribute|Buffer|Index|Key|Name|Runtime|Type|UnboundLocal|Value)Error: (?!.*connection_errors).*",
    re.M,
)

pytestmark = pytest.mark.timeout(SECONDS * 3 + 900)


class Forked:
    """An exporter that somebody else is the parent of, as `Site` uses a process."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)

    def kill(self) -> None:
        with suppress(psutil.NoSuchProcess):
            self._process.kill()

    def wait(self) -> None:
        until(lambda: self.poll() is not None, 30, "an exporter's end")

    def poll(self) -> int | None:
        alive = self._process.is_running() and self._process.status() != psutil.STATUS_ZOMBIE
        return None if alive else -signal.SIGKILL


class Soak(Site):
    """A site whose parts are killed and come back."""

    def __init__(self, settings: Settings, client: redis.Redis, model_dir: Path, server: Any, seed: int) -> None:
        super().__init__(settings, client, model_dir)
        self.server = server
        self.dice = random.Random(seed)
        self.exporters = ExporterServer(self.env)
        self.beat: subprocess.Popen[bytes] | None = None
        self.jobs: list[str] = []
        self.operated: list[str] = []
        self.fates: Counter[str] = Counter()
        self.ending = threading.Event()

    # --- what there is ------------------------------------------------------------------------------------------------

    def start_exporter(self, model_dir: Path | None = None) -> None:
        pid = self.exporters.start(model_dir or self.model_dir, self.settings.model_runtime_dir)
        self.exporter = Forked(pid)  # type: ignore[assignment]

    def start_beat(self) -> None:
        (self.settings.data_dir / "beat").unlink(missing_ok=True)
        with (self.settings.data_dir / "beat.log").open("ab") as log:
            self.beat = subprocess.Popen(
                [sys.executable, "-m", "celery", "-A", "hogwild.tasks.schedule:app", "beat", "--schedule",
                 str(self.settings.data_dir / "beat"), "--pidfile", ""],
                env=self.env, stdout=log, stderr=log)  # fmt: skip

    def supervise(self) -> None:
        """As `hogwild up` does: what ended is started again."""
        if self.server.process.poll() is not None:
            self.server.start()
        if self.worker is None or self.worker.poll() is not None:
            self.start_worker()
        if self.beat is None or self.beat.poll() is not None:
            self.start_beat()
        if self.exporter is None or self.exporter.poll() is not None:
            self.start_exporter()

    def stop(self) -> None:
        self.ending.set()
        if self.server.process.poll() is not None:
            self.server.start()
        if self.beat is not None:
            self.beat.kill()
            self.beat.wait()
        if self.worker is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.worker.pid, signal.SIGCONT)
            self.worker.terminate()
            try:
                self.worker.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(self.worker.pid, signal.SIGKILL)
                self.worker.wait()
        self.exporters.close()

    # --- fate ---------------------------------------------------------------------------------------------------------

    def strike(self) -> None:
        """One of the things that happen to a deployment."""
        fate = self.dice.choice(["child", "child", "worker", "stop", "exporter", "exporter", "redis", "beat", "stall"])
        self.fates[fate] += 1
        print(f"{time.time():.3f} {fate}", flush=True)
        if fate == "exporter":
            self.exporter.kill()
            self.exporter.wait()
            time.sleep(self.dice.choice([0.0, 0.3, 1.5]))
        elif fate == "redis":
            self.server.kill()
            time.sleep(self.dice.choice([0.0, 1.0]))
        elif fate == "beat":
            self.beat.kill()
            self.beat.wait()
        elif fate == "stop":
            self.worker.terminate()
        elif fate == "worker":
            with suppress(ProcessLookupError):
                os.killpg(self.worker.pid, signal.SIGKILL)
            self.worker.wait()
        else:
            for child in psutil.Process(self.worker.pid).children() if self.worker.poll() is None else ():
                with suppress(psutil.NoSuchProcess):
                    if fate == "child":
                        child.kill()
                    else:
                        child.suspend()
                        time.sleep(1.0)
                        child.resume()

    # --- a user -------------------------------------------------------------------------------------------------------

    def persist(self, ask: Callable[[], Any]) -> Any:
        """Ask until Redis answers."""
        while True:
            try:
                return ask()
            except (redis.ConnectionError, redis.TimeoutError, redis.exceptions.BusyLoadingError):
                time.sleep(0.1)

    def use(self, dice: random.Random) -> None:
        """Ask for something every now and then, until the end."""
        while not self.ending.wait(dice.uniform(0.05, 0.6)):
            waiting = sum(self.persist(self.ledger.counts)[state] for state in ("queued", "running"))
            others = ["cancel", "pause", "sync", "sync", "verify", "rollback", "rollback"]
            wish = dice.choice(["train"] * max(0, 5 - waiting) + others)
            if wish == "train":
                self.train(dice)
            elif wish in ("cancel", "pause") and self.jobs:
                with suppress(Conflict):
                    self.persist(lambda want=wish: self.ledger.request(dice.choice(self.jobs[-3:]), want))
            elif wish in ("sync", "verify"):
                self.ask_for(wish)
            elif wish == "rollback":
                known = (self.persist(self.registry.checkpoint) or {}).get("generations", [])
                if known:
                    self.ask_for("rollback", generation=dice.choice(known)["generation"])

    def ask_for(self, kind: Any, **params: Any) -> None:
        with suppress(TooManyRequests):  # without a worker they pile up
            self.operated.append(self.persist(lambda: self.operations.submit(kind, **params)))

    def train(self, dice: random.Random) -> None:
        payload = pack([Sample([dice.randrange(64) for _ in range(4)], [5, 6, 7])])
        config = {
            "steps": dice.choice([1, 5, 40, 150]),
            "optimizer": dice.choice(["sgd", "apollo-mini"]),
            "learning_rate": 1e-3,
        }
        key = f"key-{dice.random()}"
        self.jobs.append(self.persist(lambda: self.ledger.submit(payload, config, idempotency_key=key)[0]))


@pytest.fixture
def soak(request: pytest.FixtureRequest, own_redis: Any, tmp_path: Path) -> Iterator[Soak]:
    server = own_redis()
    settings = Settings(
        redis_url=server.url, served_model_name="tiny", runtime_dir=tmp_path / "run",
        data_dir=tmp_path / "data", sync_quiet_s=1.0, sync_max_age_s=4.0, sync_tick_s=0.5, keep_last=KEEP_LAST,
        serve_share=0.0,
    )  # fmt: skip
    settings.data_dir.mkdir()
    with redis.Redis.from_url(server.url, socket_timeout=10) as client:
        made = Soak(settings, client, make_tiny_model(tmp_path / "model"), server, request.param)
        try:
            made.supervise()
            until(made.attached, 120, "attaching")
            yield made
        finally:
            made.stop()
            print(made.log.read_text(errors="replace")[-20000:])


@pytest.mark.parametrize("soak", SEEDS, indirect=True)
def test_nothing_is_lost_or_torn_whatever_happens(soak: Soak) -> None:
    user = threading.Thread(target=soak.use, args=(random.Random(soak.dice.random()),))
    user.start()
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        time.sleep(soak.dice.uniform(0.2, 3.0))
        soak.strike()
        soak.supervise()
    soak.ending.set()
    user.join()
    print(dict(soak.fates), len(soak.jobs), "jobs", len(soak.operated), "operations")

    def ended() -> bool:
        soak.supervise()
        for job in soak.jobs:
            if soak.ledger.get(job).paused:
                with suppress(Conflict):
                    soak.ledger.request(job, "run")
        everything = [soak.ledger.get(job) for job in soak.jobs] + [soak.operations.get(op) for op in soak.operated]
        return all(one.final for one in everything)

    until(ended, 300, "the end of all jobs and operations")
    # Every job that was accepted has ended as it was wished, with each of its steps begun once at most
    jobs = [soak.ledger.get(job) for job in soak.jobs]
    assert {job.state for job in jobs} <= {"succeeded", "cancelled"}, [job for job in jobs if job.state == "failed"]
    for job in jobs:
        assert job.steps_applied + job.steps_interrupted == job.steps_begun, job
        assert job.state == "cancelled" or job.steps_begun == job.config["steps"], job
    assert sum(job.steps_interrupted for job in jobs) <= soak.fates["child"] + soak.fates["worker"]
    failed = [op for op in map(soak.operations.get, soak.operated) if op.state == "failed"]
    assert all(any(text in op.error["message"] for text in PARDONED) for op in failed), failed
    # Files and live weights are the last generation
    until(soak.attached, what="attaching")
    assert soak.operate("sync").state == "succeeded"
    consistent(soak)
    # and every generation that is kept can be gone back to, and come back from
    last, weights = soak.registry.checkpoint()["generations"], soak.disk()
    for generation in [g["generation"] for g in last[1:]] + [last[0]["generation"]]:
        undone = soak.operate("rollback", generation=generation)
        if undone.state == "failed":  # a rollback makes a generation, and the oldest one is forgotten for it
            assert f"there is no generation {generation}" in undone.error["message"], undone
            continue
        consistent(soak)
    assert same(soak.disk(), weights)
    faults = OURS.findall(soak.log.read_text(errors="replace"))
    assert not faults, faults


def consistent(soak: Soak) -> None:
    found = soak.operate("verify")
    assert found.state == "succeeded", found
    assert (found.result["ok"], found.result["unsaved"], found.result["live"]) == (True, False, {}), found
    manifest = Manifest.load(manifest_path(soak.settings.model_runtime_dir))
    disk = soak.disk()
    with open_views(manifest) as views:
        equal = len(views) == len(disk) and same(dict(views), disk)
    assert equal
