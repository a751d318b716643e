"""The worker's syncs in one process, with a real Redis, a real checkpoint and a real weight state.

What happens when they fail or come too late, and what others see of it.
"""

import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import redis
import torch
from fastapi.testclient import TestClient
from safetensors.torch import save_file

from hogwild.api.app import create_app
from hogwild.checkpoint import views
from hogwild.checkpoint.durable import FileLock
from hogwild.checkpoint.store import CheckpointStore
from hogwild.config import Settings
from hogwild.errors import CheckpointError, JobCancelled, ServiceUnavailable
from hogwild.stack import services
from hogwild.tasks import connections, control, prefix_cache, runtime, saving
from hogwild.tasks.control import WorkerStopping
from hogwild.tasks.payloads import Sample, pack
from hogwild.tasks.runtime import Live, Runtime
from hogwild.tasks.saving import Saver
from hogwild.weight_state import WeightState


class Trainer:
    """One whose optimizer has a state of eight bytes."""

    def __init__(self) -> None:
        self.optimizer = SimpleNamespace(allocated_bytes=lambda: 8, kind="none")

    def save_optimizer(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"moments")

    def rolled_back(self) -> None:
        pass

    def close(self) -> None:
        pass


class Bench:
    """A worker that is attached to weights of this process."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        model = folder / "model"
        model.mkdir()
        save_file({"w": torch.randn(64, 1024)}, model / "model.safetensors")
        (model / "config.json").write_text("{}")
        self.settings = settings
        self.runtime = Runtime(settings, stop_file=folder / "stop")
        self.runtime.stopping = lambda: False  # type: ignore[method-assign]
        self.views = {"w": torch.zeros(64, 1024)}
        self.weights = WeightState.create(folder / "weights.state", "0" * 32)
        self.trainer = Trainer()
        self.saver = Saver(
            settings,
            store=CheckpointStore.open(settings.model_checkpoint_dir, source=model, keep_last=8),
            dirty=self.runtime.dirty,
            operations=self.runtime.operations,
            registry=self.runtime.registry,
        )
        self.attachment: Any = SimpleNamespace(
            views=self.views,
            weights=self.weights,
            manifest=SimpleNamespace(model_path=str(model), device="cpu"),
            nbytes=self.views["w"].nbytes,
            alive=lambda: True,
            closed=False,
        )
        self.attachment.close = lambda: setattr(self.attachment, "closed", True)
        governor: Any = SimpleNamespace(status=dict, close=lambda: None)
        self.runtime._saver = self.saver
        self.live = Live(self.attachment, self.trainer, self.saver, governor, lambda: None)
        self.runtime._live = self.live
        self.runtime.lifecycle.attachment = self.attachment
        self.saver.store.restore(self.views)
        self.saver.publish()

    def step(self, amount: float = 1.0) -> int:
        """A training step, as a job does it."""
        self.weights.begin()
        self.views["w"] += amount
        version = self.weights.applied()
        self.runtime.dirty.mark_dirty(version)
        return version

    def status(self) -> dict[str, Any]:
        self.runtime.heartbeat()
        return self.runtime.registry.worker() or {}


@pytest.fixture
def bench(settings: Settings, redis_client: redis.Redis, tmp_path: Path) -> Iterator[Bench]:
    made = Bench(settings.model_copy(update={"sync_quiet_s": 0.0}), tmp_path)
    yield made
    made.saver.close()
    made.runtime.client.close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The saver's own clock; `clock.now` is moved by the test."""
    moved = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(saving, "time", SimpleNamespace(monotonic=lambda: moved.now, time=time.time, sleep=time.sleep))
    return moved


def failing(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def wait_until(done: Callable[[], Any], timeout: float = 30.0) -> None:
    deadline = time.monotonic() + timeout
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def metric(settings: Settings, name: str) -> float:
    with TestClient(create_app(settings)) as http:
        lines = http.get("/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith(f"{name} ")).split()[1])


# --- a sync that fails ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("pinned")])
def test_a_sync_that_runs_out_of_memory_does_not_end_the_job_beside_it(
    bench: Bench, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    bench.step()
    with monkeypatch.context() as patched:
        patched.setattr(bench.saver.store, "begin_sync", failing(error))
        bench.runtime.between_steps()  # a job's look around: whatever it raises ends the job
        bench.runtime._asked_due_at = 0.0
        bench.runtime.between_steps()
    assert bench.saver.error is not None and bench.saver.error["failures"] == 1  # and no more within the pause
    assert type(error).__name__ in bench.saver.error["message"]
    clock.now += 5.0
    bench.runtime.tick()
    assert bench.saver.store.head.weight_version == 1


def test_an_operation_that_runs_out_of_memory_fails_with_its_reason(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.step()
    sync, rollback = bench.runtime.operations.submit("sync"), bench.runtime.operations.submit("rollback", generation=0)
    with monkeypatch.context() as patched:
        patched.setattr(bench.saver.store, "begin_sync", failing(torch.OutOfMemoryError("no room")))
        bench.runtime.between_steps()
        wait_until(lambda: not bench.saver.busy)
        bench.runtime.between_steps()
    for operation in (sync, rollback):
        ended = bench.runtime.operations.get(operation)
        assert ended.state == "failed" and "no room" in ended.error["message"]


def test_what_training_keeps_of_the_card_is_free_when_a_sync_begins(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    begin = bench.saver.store.begin_sync
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: seen.append("emptied"))
    monkeypatch.setattr(bench.saver.store, "begin_sync", lambda *a, **k: (seen.append("begun"), begin(*a, **k))[1])
    bench.step()
    bench.runtime.tick()
    assert seen == ["emptied", "begun"]


def test_the_pause_after_failures_doubles_up_to_ten_minutes_for_ever(
    bench: Bench, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.step()
    monkeypatch.setattr(bench.saver.store, "begin_sync", failing(CheckpointError("the disk is full")))
    pauses = []
    for _ in range(9):
        bench.runtime.tick()
        pauses.append(bench.saver.error["retry_in_s"])
        bench.runtime.tick()  # too early: nothing is tried
        clock.now += pauses[-1]
    assert pauses == [5, 10, 20, 40, 80, 160, 320, 600, 600]
    assert bench.saver.error["failures"] == 9
    bench.saver._failures = 5000  # a month of them
    bench.runtime.tick()
    assert bench.saver.error["retry_in_s"] == 600


def test_a_failed_sync_is_seen_and_leaves_the_steps_unsaved(
    bench: Bench, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.step()
    bench.step()
    with monkeypatch.context() as patched:
        patched.setattr(bench.saver.store, "begin_sync", failing(CheckpointError("the disk is full")))
        bench.runtime.tick()
    assert bench.status()["sync_error"]["message"] == "the disk is full"
    state = bench.runtime.dirty.state()
    assert (state.dirty, state.steps, state.weight_version) == (True, 2, 2)
    assert metric(bench.settings, "hogwild_syncs_failed_total") == 1
    # When it works again
    clock.now += 5.0
    bench.runtime.tick()
    assert bench.status()["sync_error"] is None
    assert not bench.runtime.dirty.state().dirty
    assert metric(bench.settings, "hogwild_syncs_failed_total") == 1


def test_a_commit_beside_training_that_fails_is_tried_again(
    bench: Bench, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bench.step()
    with monkeypatch.context() as patched:
        patched.setattr(bench.saver.store, "_write", failing(MemoryError()))
        bench.runtime.between_steps()
        bench.saver._join()
    assert "MemoryError" in caplog.text
    assert bench.runtime.dirty.state().steps == 1
    bench.runtime._asked_due_at, clock.now = 0.0, clock.now + 5.0
    bench.runtime.between_steps()
    bench.saver._join()
    assert bench.saver.store.head.weight_version == 1


def test_a_failure_that_redis_is_yet_to_count_does_not_put_off_the_next_try(
    bench: Bench, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = threading.Event()
    monkeypatch.setattr(saving, "record_failed_sync", lambda *_: counted.wait(30))
    bench.step()
    with monkeypatch.context() as patched:
        patched.setattr(bench.saver.store, "begin_sync", failing(MemoryError()))
        bench.runtime.between_steps()
    bench.runtime._asked_due_at, clock.now = 0.0, clock.now + 5.0
    bench.runtime.between_steps()
    bench.saver._join()
    counted.set()
    assert bench.saver.store.head.weight_version == 1


def test_two_beats_that_tick_at_once_make_one_sync(bench: Bench) -> None:
    bench.step()
    ticks = [threading.Thread(target=bench.runtime.tick) for _ in range(2)]
    for tick in ticks:
        tick.start()
    for tick in ticks:
        tick.join()
    assert bench.saver.store.head.generation == 1
    assert metric(bench.settings, "hogwild_syncs_total") == 1


def test_generations_are_counted_and_nothing_else(bench: Bench) -> None:
    for asked in ({"kind": "sync"}, {"kind": "rollback", "generation": 0}):  # neither has anything to write
        bench.runtime.operations.submit(**asked)
        bench.runtime.tick()
        bench.runtime.between_steps()
    wait_until(lambda: not bench.saver.busy)
    assert bench.saver.store.head.generation == metric(bench.settings, "hogwild_syncs_total") == 0
    bench.step()
    bench.runtime.operations.submit("rollback", generation=0)  # saves the step first
    bench.runtime.between_steps()
    wait_until(lambda: not bench.saver.busy)
    assert bench.saver.store.head.generation == metric(bench.settings, "hogwild_syncs_total") == 2


def test_what_is_asked_for_during_a_commit_waits_and_the_job_does_not(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, write = threading.Event(), bench.saver.store._write
    monkeypatch.setattr(bench.saver.store, "_write", lambda *args: (slow.wait(30), write(*args))[1])
    operations = bench.runtime.operations
    bench.step()
    first = operations.submit("sync")
    bench.runtime.between_steps()
    others = [operations.submit("sync"), operations.submit("rollback", generation=0)]
    for _ in range(3):
        bench.step()
        bench.runtime.between_steps()  # or would wait for ever, as this commit does
    assert [operations.get(op).state for op in (first, *others)] == ["running", "pending", "pending"]
    slow.set()
    for done in (first, *others):
        wait_until(lambda: not bench.saver.busy)
        bench.runtime.between_steps()
        wait_until(lambda done=done: operations.get(done).final)
    assert [operations.get(op).state for op in (first, *others)] == ["succeeded"] * 3
    assert operations.get(others[0]).result["weight_version"] == 4


# --- nothing that was asked for is done twice -------------------------------------------------------------------------


@pytest.fixture
def deaf(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A Redis that does not hear how operations ended, while `deaf.now`."""
    state, finish = SimpleNamespace(now=True), bench.runtime.operations._finish

    def script(**arguments: Any) -> Any:
        if state.now:
            raise redis.ConnectionError("away for five minutes")
        return finish(**arguments)

    monkeypatch.setattr(bench.runtime.operations, "_finish", script)
    return state


@pytest.mark.parametrize("then", ["tick", "its message", "a job's look around", "put back, and its message"])
def test_a_rollback_that_could_not_be_reported_is_not_done_again(
    bench: Bench, deaf: SimpleNamespace, then: str
) -> None:
    operations = bench.runtime.operations
    bench.step()
    bench.runtime.tick()
    operation = operations.submit("rollback", generation=0)
    bench.runtime.run_operation(operation)
    assert (bench.saver.store.head.kind, operations.get(operation).state) == ("rollback", "running")
    # Given training since
    for _ in range(5):
        bench.step()
    trained = bench.views["w"].clone()
    # When Redis hears again
    deaf.now = False
    if then == "put back, and its message":  # a failover to a replica that had not heard of its start
        bench.runtime.client.hset(operations.keys("op", operation), "state", "pending")
    if then == "tick":
        bench.runtime.tick()
    if then == "a job's look around":
        bench.runtime.between_steps()
    bench.runtime.run_operation(operation)
    # Then it hears what was done, and the training stays
    done = operations.get(operation)
    assert (done.state, done.attempts, done.result["generation"]) == ("succeeded", 1, 2)
    assert torch.equal(bench.views["w"], trained)
    assert not operations.pending()


def test_a_rollback_that_redis_did_not_see_to_its_end_has_not_failed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.step()
    bench.runtime.tick()
    operation = bench.runtime.operations.submit("rollback", generation=0)
    with monkeypatch.context() as patched:
        patched.setattr(bench.runtime.registry, "publish_checkpoint", failing(redis.ConnectionError("away")))
        bench.runtime.run_operation(operation)
    assert bench.runtime.operations.get(operation).state == "succeeded"
    assert not bench.weights.restoring


def test_a_failure_that_could_not_be_reported_is_reported_later(bench: Bench, deaf: SimpleNamespace) -> None:
    operations = bench.runtime.operations
    operation = operations.submit("rollback", generation=99)
    bench.runtime.run_operation(operation)
    assert operations.get(operation).state == "running"
    deaf.now = False
    bench.runtime.tick()
    assert "no generation 99" in operations.get(operation).error["message"]


def test_a_rollback_whose_worker_died_before_it_said_so_is_not_done_again(bench: Bench, deaf: SimpleNamespace) -> None:
    operations = bench.runtime.operations
    bench.step()
    bench.runtime.tick()
    operation = operations.submit("rollback", generation=0)
    bench.runtime.run_operation(operation)
    operations._ended.clear()  # with the worker
    deaf.now = False
    # Given training of the next one, which was busy with a commit when it looked for operations first
    bench.step()
    trained = bench.views["w"].clone()
    operations.reconcile(bench.runtime.worker_id)
    bench.runtime.run_operation(operation)
    done = operations.get(operation)
    assert (done.state, done.attempts) == ("succeeded", 2)
    assert (done.result["generation"], done.result["restored"], done.result["weight_version"]) == (2, 0, 2)
    assert torch.equal(bench.views["w"], trained)


@pytest.mark.parametrize("kind", ["sync", "verify"])
def test_what_outlives_the_job_that_it_was_asked_for_in_is_not_done_twice(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    operations, store = bench.runtime.operations, bench.saver.store
    name = {"sync": "_write", "verify": "verify"}[kind]
    slow, real, times = threading.Event(), getattr(store, name), []
    monkeypatch.setattr(store, name, lambda *args: (times.append(1), slow.wait(30), real(*args))[2])
    bench.step()
    operation = operations.submit(kind)
    bench.runtime.client.delete(*operations.messages.queue_keys())
    bench.runtime.between_steps()
    # When the job ends, and beat ticks while the committer is still at it
    bench.runtime.tick()
    assert (operations.get(operation).state, operations.pending()) == ("running", [])
    assert not any(bench.runtime.client.llen(key) for key in operations.messages.queue_keys())
    slow.set()
    wait_until(lambda: not bench.saver.busy)
    bench.runtime.tick()
    done = operations.get(operation)
    assert (done.state, done.attempts, len(times)) == ("succeeded", 1, 1)


# --- a rollback that is on disk and only partly live -----------------------------------------------------------------


@pytest.fixture
def mixture(bench: Bench, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Live weights that a rollback got to in part; `mixture.tries` more tries to bring in the rest will fail.

    Who waits does so on the saver's clock.
    """
    state, restore = SimpleNamespace(tries=3, slept=0), bench.saver.store.restore

    def unreadable(views: Any, writing: Callable[[], None] = lambda: None) -> Any:
        if state.tries:
            state.tries -= 1
            writing()
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return restore(views, writing=writing)

    def sleep(seconds: float) -> None:
        state.slept += 1
        clock.now += seconds
        assert state.slept < 100

    monkeypatch.setattr(bench.saver.store, "restore", unreadable)
    monkeypatch.setattr(runtime, "time", SimpleNamespace(monotonic=lambda: clock.now, sleep=sleep))
    bench.step()
    bench.runtime.tick()
    operation = bench.runtime.operations.submit("rollback", generation=0)
    bench.runtime.run_operation(operation)
    assert bench.runtime.operations.get(operation).state == "failed"
    assert bench.weights.restoring
    return state


def test_no_step_is_trained_on_a_mixture(bench: Bench, mixture: SimpleNamespace, clock: SimpleNamespace) -> None:
    bench.runtime.client.delete(bench.runtime.dirty.keys("dirty"))  # what Redis forgets is no reason to wait for ever
    began = clock.now
    bench.runtime.between_steps()
    assert not bench.weights.restoring
    assert clock.now - began >= 15  # two tries failed: 5 and 10 s
    assert bench.saver.error is None
    # Then the job goes on, and what it trains from here stays
    assert bench.step() == 3
    bench.runtime.dirty.settle(3, 2, 2)
    wait_until(lambda: not bench.saver.busy)
    bench.runtime.tick()
    assert (bench.saver.store.head.weight_version, bench.weights.version) == (3, 3)


@pytest.mark.parametrize("wish", ["cancel", "pause", "stop"])
@pytest.mark.parametrize("when", ["before its first step", "between two steps"])
def test_a_job_that_waits_for_a_rollback_to_be_whole_ends_when_it_is_told_to(
    bench: Bench, mixture: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, wish: Any, when: str
) -> None:
    mixture.tries = 10**6
    ledger, worker = bench.runtime.ledger, bench.runtime.worker_id
    job, _ = ledger.submit(pack([Sample([1], [2])]), {})

    def wish_it() -> None:
        if wish == "stop":
            bench.runtime.stopping = lambda: True  # type: ignore[method-assign]
        else:
            ledger.request(job, wish)

    if when == "between two steps":
        lease = ledger.claim(job, worker, weights_version=2)
        assert lease is not None
        wish_it()
        with pytest.raises((JobCancelled, control.JobParked, control.WorkerStopping)):
            control.JobControl(bench.runtime, bench.live, None, lease, n_steps=1).before_step(0)
        return
    # Given a trainer that would make text of the mixture
    trained: list[int] = []
    plan = SimpleNamespace(n_steps=1, pack_tokens=8, account=dict)
    bench.trainer.plan = lambda *_, **__: plan  # type: ignore[attr-defined]
    bench.trainer.run = lambda *_, **__: trained.append(1)  # type: ignore[attr-defined]
    bench.live.governor.begin_work = lambda: trained.append(1)  # type: ignore[method-assign]
    monkeypatch.setattr(runtime, "send_progress", lambda *_, **__: wish_it())
    bench.runtime.train(None, job)
    seen = ledger.get(job)
    assert not trained
    assert (seen.state, seen.paused) == ("cancelled" if wish == "cancel" else "queued", wish == "pause")


def test_marks_of_steps_that_went_with_a_mixture_go_too(bench: Bench, mixture: SimpleNamespace) -> None:
    bench.runtime.dirty.mark_dirty(6, 4)
    mixture.tries = 0
    bench.runtime.tick()
    assert not bench.weights.restoring
    assert not bench.runtime.dirty.state().dirty


def test_the_mark_of_a_step_that_comes_after_a_mixture_was_finished_stays(
    bench: Bench, mixture: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixture.tries = 0
    settle = bench.runtime.dirty._settle
    monkeypatch.setattr(bench.runtime.dirty, "_settle", lambda **args: (time.sleep(0.3), settle(**args))[1])
    bench.runtime.between_steps()
    bench.step()
    wait_until(lambda: not bench.saver.busy)
    time.sleep(0.5)
    assert bench.runtime.dirty.state().steps == 1


# --- versions of weights that are the last generation ----------------------------------------------------------------


def verified(bench: Bench) -> dict[str, Any]:
    operation = bench.runtime.operations.submit("verify")
    bench.runtime.run_operation(operation)
    result = bench.runtime.operations.get(operation).result
    assert result is not None
    return {name: result[name] for name in ("ok", "unsaved", "live")}


def check_saved(bench: Bench, version: int) -> None:
    """Disk, live weights and Redis agree that all is saved, and damage is seen as that."""
    assert bench.weights.version == version
    assert verified(bench) == {"ok": True, "unsaved": False, "live": {}}
    bench.views["w"][3] += 1
    assert verified(bench) == {"ok": False, "unsaved": False, "live": {"w": 1}}
    bench.runtime.tick()
    bench.saver.settle(bench.attachment)  # as on attaching
    assert bench.runtime.dirty.state().steps == 0
    # ... and the next vLLM goes on from there
    bench.attachment.weights = WeightState.create(bench.settings.data_dir / "next.state", "1" * 32)
    bench.attachment.manifest.model_path = str(bench.saver.store.directory)
    bench.saver.bring_together(bench.attachment)
    assert bench.attachment.weights.version == version


def test_a_rollback_to_the_last_generation_takes_part_of_a_step_out_and_counts_none(bench: Bench) -> None:
    bench.step()
    bench.runtime.tick()
    whole = bench.views["w"].clone()
    bench.weights.begin()
    bench.views["w"][0] += 5
    bench.weights.set_version(bench.weights.version)
    assert verified(bench) == {"ok": False, "unsaved": False, "live": {"w": 1}}
    # When what verify advises is done
    operation = bench.runtime.operations.submit("rollback", generation=1)
    bench.runtime.run_operation(operation)
    result = bench.runtime.operations.get(operation).result
    assert result is not None
    assert (result["generation"], result["weight_version"], result["live_blocks_changed"]) == (1, 1, 1)
    assert torch.equal(bench.views["w"], whole)
    check_saved(bench, 1)


def test_steps_that_changed_nothing_are_saved_with_the_generation_before_them(bench: Bench) -> None:
    bench.step()
    bench.runtime.tick()
    bench.step(0.0)
    bench.runtime.tick()
    assert (bench.saver.store.head.generation, bench.weights.version) == (1, 2)
    bench.runtime.run_operation(bench.runtime.operations.submit("rollback", generation=1))
    check_saved(bench, 2)  # versions that somebody saw don't come again


def test_a_rollback_to_the_last_generation_that_fails_half_way_is_finished(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.step()
    bench.runtime.tick()
    whole = bench.views["w"].clone()
    bench.views["w"][0] += 5
    with monkeypatch.context() as patched:
        patched.setattr(views, "write_blocks", failing(OSError(errno.EIO, os.strerror(errno.EIO))))
        bench.runtime.run_operation(bench.runtime.operations.submit("rollback", generation=1))
    assert bench.weights.restoring
    bench.runtime.between_steps()
    assert torch.equal(bench.views["w"], whole)
    check_saved(bench, 1)


def step_without_its_mark(bench: Bench) -> None:
    """As when Redis goes away between the step and its mark."""
    bench.weights.begin()
    bench.views["w"] += 1.0
    bench.weights.applied()


def test_a_step_whose_mark_was_lost_is_saved_by_the_next_tick(bench: Bench) -> None:
    step_without_its_mark(bench)
    bench.runtime.tick()
    assert bench.saver.store.head.weight_version == 1
    assert not bench.runtime.dirty.state().dirty


def test_a_step_whose_mark_was_lost_counts_as_unsaved_when_a_job_begins(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.step()
    since = bench.runtime.dirty.state().oldest_at
    step_without_its_mark(bench)
    seen = []
    monkeypatch.setattr(bench.runtime, "_run_lease", lambda *_: seen.append(bench.runtime.dirty.state()))
    job, _ = bench.runtime.ledger.submit(pack([Sample([1], [2])]), {})
    bench.runtime.train(None, job)
    [state] = seen
    assert (state.steps, state.weight_version, state.oldest_at) == (2, 2, since)


def test_a_worker_that_was_told_to_stop_claims_no_job(bench: Bench) -> None:
    job, _ = bench.runtime.ledger.submit(pack([Sample([1], [2])]), {})
    bench.runtime.stopping = lambda: True  # type: ignore[method-assign]
    assert bench.runtime.train(None, job)["state"] == "queued"
    assert (bench.runtime.ledger.get(job).state, bench.runtime.ledger.get(job).attempts) == ("queued", 0)


def test_a_step_of_which_redis_alone_knows_is_not_counted_as_applied_after_a_rollback(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.runtime, "_rolled_back", lambda: True)
    worker, ledger = bench.runtime, bench.runtime.ledger
    bench.step()
    job, _ = ledger.submit(pack([Sample([1], [2])]), {})
    # Given a step that Redis began, and stayed away with its reply: nothing was written
    ledger.begin_step(ledger.claim(job, worker.worker_id, weights_version=1), 0, weight_version=1)
    # When the same process moves the version before it goes on with the job
    worker.run_operation(worker.operations.submit("rollback", generation=0))
    assert bench.weights.version > 1
    assert ledger.claim(job, worker.worker_id, weights_version=bench.weights.version).first_step == 1
    assert (ledger.get(job).steps_applied, ledger.get(job).steps_interrupted) == (0, 1)


# --- the last chance --------------------------------------------------------------------------------------------------


@pytest.fixture
def reader(bench: Bench) -> Iterator[FileLock]:
    """Somebody who reads the files, and does not end."""
    bench.saver.store._readers._patience = 0.1
    lock = FileLock(bench.saver.store.directory / ".hogwild" / "readers.lock")
    assert lock.acquire(shared=True)
    yield lock
    lock.release()


def lose(bench: Bench) -> None:
    """vLLM is gone, as the lifecycle sees it."""
    bench.attachment.alive = lambda: False
    bench.runtime._poll()


@pytest.mark.parametrize("end", ["vLLM is gone", "shutdown"])
def test_a_reader_that_ends_in_time_costs_no_step_of_the_last_sync(bench: Bench, reader: FileLock, end: str) -> None:
    # Given a generation that is durable and waits for a reader of the files, and steps since then
    bench.step()
    bench.runtime.tick()
    assert bench.saver.store.head.weight_version == 1
    bench.step()
    threading.Timer(1.0, reader.release).start()
    # When there is no later
    if end == "shutdown":
        bench.runtime.shutdown()
    else:
        lose(bench)
    # Then the weights were held on to until the reader had gone
    assert bench.saver.store.head.weight_version == 2
    assert bench.attachment.closed


def test_a_commit_that_ends_after_its_weights_were_let_go_of_has_not_failed(bench: Bench, reader: FileLock) -> None:
    bench.saver.store._readers._patience = 1.0
    bench.attachment.close = bench.weights.close
    bench.step()
    lose(bench)  # durable, and let go of: the reader keeps the commit from its end
    assert bench.saver.store.head.weight_version == 1
    assert bench.saver.busy
    wait_until(lambda: not bench.saver.busy)
    assert bench.saver.error is None
    assert not bench.runtime.dirty.state().dirty
    assert bench.saver.last is not None
    assert bench.saver.last["applied"] is False


@pytest.mark.parametrize("end", ["vLLM is gone", "shutdown"])
def test_a_disk_that_is_full_for_a_moment_costs_no_step_of_the_last_sync(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    bench.step()
    write, tries = bench.saver.store._write, []

    def full_at_first(*args: Any) -> Any:
        tries.append(1)
        if len(tries) < 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*args)

    monkeypatch.setattr(bench.saver.store, "_write", full_at_first)
    bench.runtime.shutdown() if end == "shutdown" else lose(bench)
    assert (len(tries), bench.saver.store.head.weight_version) == (3, 1)
    assert [path.name for _, path in bench.saver.optimizer_states.files()] == ["tiny@1.safetensors"]


@pytest.mark.parametrize("end", ["vLLM is gone", "shutdown"])
def test_a_last_sync_that_does_not_end_is_given_up_at_its_bound(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, end: str
) -> None:
    monkeypatch.setattr(runtime, "ENDING_S", 0.5)
    bench.runtime.settings = bench.settings.model_copy(update={"last_sync_s": 1.0})
    bench.step()
    bench.runtime.tick()
    bench.step()
    stuck = threading.Event()
    write = bench.saver.store._write
    monkeypatch.setattr(bench.saver.store, "_write", lambda *args: (stuck.wait(), write(*args))[1])
    began = time.monotonic()
    try:
        bench.runtime.shutdown() if end == "shutdown" else lose(bench)
        assert 1.0 <= time.monotonic() - began < 5.0
        assert "generation 1 holds weight version 1, the live weights are version 2" in caplog.text
        assert bench.attachment.closed
    finally:
        stuck.set()


def test_an_optimizer_state_that_there_is_no_time_for_is_left_out_and_the_weights_are_not(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.trainer.optimizer.allocated_bytes = lambda: 10**12
    bench.step()
    bench.runtime.shutdown()
    assert bench.saver.store.head.weight_version == 1
    assert not bench.saver.optimizer_states.files()
    assert "no time is left for the optimizer's state" in caplog.text


def test_the_last_sync_gets_longer_with_the_model_and_up_waits_for_it(settings: Settings, tmp_path: Path) -> None:
    def worker(chosen: Settings) -> Any:
        return next(s for s in services.build(chosen, vllm=False) if s.name == "worker")

    assert worker(settings).stop_wait_s == 90 + 60
    directory = settings.model_checkpoint_dir
    directory.mkdir(parents=True)
    with (directory / "model.safetensors").open("wb") as file:
        file.truncate(65 * 10**9)  # a hole
    assert worker(settings).stop_wait_s == 90 + 650 + 60
    assert worker(settings).env["HOGWILD_LAST_SYNC_S"] == "740.0"
    chosen = settings.model_copy(update={"last_sync_s": 2000.0})
    assert worker(chosen).stop_wait_s == 2060
    assert worker(chosen).env["HOGWILD_LAST_SYNC_S"] == "2000.0"


# --- Redis is away ----------------------------------------------------------------------------------------------------


@pytest.fixture
def server(own_redis: Any) -> Any:
    """A Redis that a test may kill or stall."""
    return own_redis()


@pytest.fixture
def lonely(settings: Settings, server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """The worker of that Redis; a call that hangs times out after 3 s."""
    monkeypatch.setattr(connections, "WORKER_TIMEOUT_S", 3.0)
    made = Bench(settings.model_copy(update={"redis_url": server.url, "sync_quiet_s": 0.0}), tmp_path)
    yield made
    made.runtime._ending.set()  # what still waits for Redis
    made.saver.close()
    made.runtime.client.close()


def in_time(call: Callable[[], Any], seconds: float) -> Any:
    """What a call returns that must not take longer."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(call()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert results, f"not done after {seconds} s"
    return results[0]


@pytest.mark.parametrize("away", [signal.SIGKILL, signal.SIGSTOP], ids=["gone", "hanging"])
@pytest.mark.parametrize("where", ["in a call", "between two steps"])
def test_a_worker_that_is_stopped_while_redis_is_away_saves(
    lonely: Bench, server: Any, monkeypatch: pytest.MonkeyPatch, away: signal.Signals, where: str
) -> None:
    worker = lonely.runtime
    job, _ = worker.ledger.submit(pack([Sample([1], [2])]), {})
    gone = threading.Event()

    def run(_: Any, lease: Any) -> None:
        lonely.step()
        server.signal(away)
        gone.set()
        if where == "in a call":
            worker.ledger.begin_step(lease, 0, weight_version=1)
        wait_until(lambda: worker.asked_to_stop)
        raise WorkerStopping

    monkeypatch.setattr(worker, "_run_lease", run)
    task = threading.Thread(target=worker.train, args=(None, job), daemon=True)
    task.start()
    gone.wait(30)
    time.sleep(0.5)
    worker.asked_to_stop = True
    task.join(5.0)  # once a call's time-out, and not once more for each that follows
    assert not task.is_alive()
    in_time(lambda: (worker.shutdown(), True), 20.0)
    assert lonely.saver.store.head.weight_version == 1


def last_chance(bench: Bench, seconds: float) -> bool:
    saver, until = bench.saver, time.monotonic() + seconds
    return bool(
        in_time(
            lambda: saver.last_chance(
                bench.attachment, bench.trainer, "vLLM is gone", until=until, failed=lambda: None
            ),
            seconds + 5.0,
        )
    )


def test_a_last_sync_that_fails_at_first_is_tried_again_while_redis_is_away(
    lonely: Bench, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lonely.step()
    begin, full = lonely.saver.store.begin_sync, [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))]

    def full_at_first(*args: Any, **options: Any) -> Any:
        if full:
            raise full.pop()
        return begin(*args, **options)

    monkeypatch.setattr(lonely.saver.store, "begin_sync", full_at_first)
    server.kill()
    assert last_chance(lonely, 10.0)
    assert lonely.saver.store.head.weight_version == 1


@pytest.mark.parametrize("kind", ["sync", "verify"])
def test_what_redis_is_yet_to_hear_of_holds_up_no_last_sync_and_is_told_when_it_is_back(
    lonely: Bench, server: Any, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    # Given an operation beside a job that is done, and a Redis that is gone by then
    worker, saver = lonely.runtime, lonely.saver
    lonely.step()
    operation = worker.operations.submit(kind)
    work = (saver.store, "verify") if kind == "verify" else (saver.store, "_write")
    do, gone = getattr(*work), threading.Event()

    def do_and_lose_redis(*args: Any) -> Any:
        done = do(*args)
        server.kill()
        gone.set()
        return done

    with monkeypatch.context() as patched:
        patched.setattr(*work, do_and_lose_redis)
        worker.run_operation(operation, in_job=True)
        assert gone.wait(30)
    # When vLLM is lost after another step
    step_without_its_mark(lonely)
    assert last_chance(lonely, 10.0)
    assert saver.store.head.weight_version == 2
    # Then the operation has its end as soon as there is a Redis
    server.start()
    wait_until(lambda: worker.operations.get(operation).final)
    assert worker.operations.get(operation).state == "succeeded"
    wait_until(lambda: worker.dirty.state().synced_version == 2)


# --- vLLM's prefix cache ----------------------------------------------------------------------------------------------


class BusyVllm:
    """Its front end, while requests hold prefixes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.busy, self.asked = True, []
        monkeypatch.setattr(prefix_cache.Frontend, "load", lambda *_: self)
        monkeypatch.setattr(runtime, "PREFIX_CACHE_S", 0.2)
        monkeypatch.setattr(prefix_cache, "RETRY_S", 0.0)

    def reset_prefix_cache(self, timeout: float, *, running: bool) -> bool:
        self.asked.append(running)
        return not self.busy


def test_a_reset_that_requests_prevent_is_owed_until_it_is_done(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    vllm = BusyVllm(monkeypatch)
    bench.step()
    bench.runtime.tick()
    operation = bench.runtime.operations.submit("rollback", generation=0)
    bench.runtime.run_operation(operation)
    done = bench.runtime.operations.get(operation)
    assert (done.state, done.result["prefix_cache"]) == ("succeeded", "owed")
    assert all(vllm.asked), "what was undone is asked for even where requests run"
    owed = bench.status()["prefix_cache"]
    assert owed["reset_owed"] and "hold prefixes" in owed["reason"]
    # When the worker watches, then it asks again, and no more once it was heard
    bench.runtime.registry.register_worker(bench.runtime.worker_id, "h")
    bench.runtime._watcher.start()
    asked = len(vllm.asked)
    wait_until(lambda: len(vllm.asked) > asked + 1)
    vllm.busy = False
    wait_until(lambda: not bench.status()["prefix_cache"]["reset_owed"])
    asked = len(vllm.asked)
    time.sleep(2 * runtime.WATCH_S)
    assert len(vllm.asked) == asked
    bench.runtime._ending.set()
    bench.runtime._watcher.join()


def test_a_rollback_whose_reset_is_heard_says_so(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    BusyVllm(monkeypatch).busy = False
    bench.step()
    bench.runtime.tick()
    operation = bench.runtime.operations.submit("rollback", generation=0)
    bench.runtime.run_operation(operation)
    assert bench.runtime.operations.get(operation).result["prefix_cache"] == "reset"
    assert not bench.status()["prefix_cache"]["reset_owed"]


def test_what_was_owed_to_a_dead_vllm_is_not_asked_of_the_next(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    vllm = BusyVllm(monkeypatch)
    assert not bench.runtime.prefix_cache.reset(patience_s=0)
    lose(bench)
    asked = len(vllm.asked)
    bench.runtime.prefix_cache.retry()
    assert len(vllm.asked) == asked


def test_weights_that_change_during_a_reset_are_owed_another(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    vllm = BusyVllm(monkeypatch)
    vllm.busy = False
    cache = bench.runtime.prefix_cache
    ask = vllm.reset_prefix_cache

    def change_meanwhile(timeout: float, *, running: bool) -> bool:
        cache.owe()
        return ask(timeout, running=running)

    with monkeypatch.context() as patched:
        patched.setattr(vllm, "reset_prefix_cache", change_meanwhile)
        cache.reset(patience_s=0)
    assert cache.status()["reset_owed"]
    cache.retry()
    assert not cache.status()["reset_owed"]


def test_running_requests_are_not_begun_anew_over_and_over_in_a_vllm_that_fails_at_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm = BusyVllm(monkeypatch)
    cache = bench.runtime.prefix_cache
    with monkeypatch.context() as patched:
        patched.setattr(vllm, "reset_prefix_cache", failing(ServiceUnavailable("500")))
        assert not cache.reset(patience_s=0, running=True)
    cache.retry()
    assert vllm.asked == [False] and cache.status()["reset_owed"]


def test_a_rollback_that_a_later_sync_finishes_resets_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    vllm = BusyVllm(monkeypatch)
    vllm.busy = False
    bench.saver.restored = bench.runtime._rolled_back  # as on attaching
    bench.step()
    bench.runtime.tick()
    with monkeypatch.context() as patched:
        patched.setattr(views, "write_blocks", failing(OSError(errno.EIO, os.strerror(errno.EIO))))
        bench.runtime.run_operation(bench.runtime.operations.submit("rollback", generation=0))
    asked = len(vllm.asked)
    bench.runtime.tick()
    assert not bench.weights.restoring
    assert len(vllm.asked) == asked + 1
