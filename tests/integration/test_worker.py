"""The real worker (Celery, prefork, spawn) on a tiny model whose weights another process exports."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import redis
import torch
from short_of_memory_worker import NO_MEMORY_SEED
from worker_site import Site, make_tiny_model, same, until

from hogwild.api.schemas import PlanOut
from hogwild.checkpoint.store import CheckpointStore
from hogwild.config import Settings
from hogwild.errors import Conflict
from hogwild.gpu_worker.lifecycle import State
from hogwild.stack.services import settings_env
from hogwild.tasks import runtime
from hogwild.tasks.ledger import Ledger
from hogwild.tasks.metrics import counters
from hogwild.tasks.payloads import Sample, pack
from hogwild.weight_state import FILE_NAME, WeightState

HERE = Path(__file__).parent
SLOW = {"steps": 400, "optimizer": "sgd", "learning_rate": 1e-5}  # still running when something is done to it
ENDLESS = {**SLOW, "steps": 100_000}  # for what never runs to its end, however late it is cancelled
pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="module")
def site(redis_server: str, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A worker attached to the exported weights; each test finds what the one before left."""
    folder = tmp_path_factory.mktemp("site")
    url = redis_server.removesuffix("/0") + "/5"  # a database of its own: other tests empty theirs
    settings = Settings(
        redis_url=url, served_model_name="tiny", runtime_dir=folder / "run", data_dir=folder / "data", sync_quiet_s=3600
    )
    settings.data_dir.mkdir()
    with redis.Redis.from_url(url) as client:
        made = Site(settings, client, tiny_model)
        made.start_exporter()
        made.start_worker()
        try:
            until(made.attached, 400, "attaching")
            yield made
        finally:
            made.stop()
            print(made.log.read_text(errors="replace")[-20000:])


@pytest.fixture(autouse=True)
def shown_on_failure(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that failed shows what the worker said last, and whether the exporter lived."""
    yield
    if "site" in request.fixturenames:
        site: Site = request.getfixturevalue("site")
        assert site.exporter is not None
        print("exporter:", "runs" if site.exporter.poll() is None else f"ended with {site.exporter.returncode}")
        print("worker's status:", site.registry.worker())
        print("".join(site.log.read_text(errors="replace").splitlines(keepends=True)[-30:]))


def test_a_job_trains_is_saved_is_rolled_back_and_rolled_forward_again(site: Site, tiny_model: Path) -> None:
    before = site.disk()
    job = site.finished(site.submit())
    assert (job.state, job.steps_applied, job.weight_version_last) == ("succeeded", 3, 3)
    assert job.loss_last < job.loss_first
    # The plan is stored as the API shows it, and in the log
    assert PlanOut.model_validate(job.plan).model_dump() == job.plan
    assert job.plan["memory"]["free"] > job.plan["memory"]["total"] > 0 == job.plan["optimizer_state"]
    assert f"{job.id}: 3 steps in packs of up to 4096 tokens, 2 of 2 layers" in site.log.read_text()
    assert int((site.settings.model_runtime_dir / "resets").read_text()) == 1  # before the job was reported as done
    assert same(site.disk(), before)  # nothing was saved yet
    assert site.dirty.state().steps == 3

    found = site.operate("verify")
    assert found.state == "succeeded", found.error
    assert found.result["ok"] and found.result["unsaved"] and found.result["live"]

    saved = site.operate("sync")
    trained = site.disk()
    assert saved.state == "succeeded"
    assert saved.result["generation"] == 1
    assert saved.result["jobs"] == [job.id]
    assert not same(trained, before)
    assert not site.dirty.state().dirty
    found = site.operate("verify").result
    assert found["ok"] and not found["unsaved"] and not found["live"]
    assert found["live_blocks_checked"] > 0

    assert counters(site.dirty.client, "tiny")["sync_bytes"] == saved.result["bytes_written"] > 0

    undone = site.operate("rollback", generation=0)
    assert undone.state == "succeeded", undone.error
    assert undone.result["weight_version"] == 4
    assert undone.result["live_blocks_changed"] > 0
    assert same(site.disk(), before)
    assert site.operate("rollback", generation=1).state == "succeeded"
    assert same(site.disk(), trained)
    assert int((site.settings.model_runtime_dir / "resets").read_text()) == 3
    until(lambda: site.registry.worker()["weight_version"] == 5, what="the status")


def test_a_running_job_can_be_cancelled_paused_and_resumed(site: Site) -> None:
    first = site.submit(**ENDLESS)
    site.stepping(first)
    site.ledger.request(first, "pause")
    until(lambda: site.ledger.get(first).paused, what="the pause")
    paused_at = site.ledger.get(first).steps_applied

    # Given: the worker is free for others while the job is paused
    assert site.finished(site.submit()).state == "succeeded"
    assert site.ledger.get(first).steps_applied == paused_at

    site.ledger.request(first, "run")
    site.stepping(first, paused_at + 2)
    site.ledger.request(first, "cancel")
    done = site.finished(first)
    assert done.state == "cancelled"
    assert paused_at < done.steps_applied < ENDLESS["steps"]
    with pytest.raises(Conflict):
        site.ledger.request(first, "run")


def test_a_sync_asked_for_while_a_job_runs_does_not_wait_for_its_end(site: Site) -> None:
    job = site.submit(**ENDLESS)
    site.stepping(job)
    saved = site.operate("sync")
    assert saved.state == "succeeded"
    assert saved.result["weight_version"] >= site.ledger.get(job).weight_version_first
    found = site.operate("verify")
    assert found.state == "succeeded", found.error
    assert found.result["ok"] and found.result["blocks_checked"] > 0
    assert saved.result["jobs"][-1] == job
    assert not site.ledger.get(job).final
    site.ledger.request(job, "cancel")
    site.finished(job)


def test_cancelling_between_the_packs_of_a_step_writes_nothing_of_it(site: Site) -> None:
    assert site.operate("sync").state == "succeeded"
    before = site.disk()
    samples = [Sample([1, 2, 3, 4], [5, 6, 7])] * 20_000  # many packs, and one step: the gradients of all are summed
    config = {"steps": 1, "gradient_accumulation": 20_000, "max_tokens_per_step": 20_000 * 6, "optimizer": "sgd"}
    job, _ = site.ledger.submit(pack(samples), {**config, "learning_rate": 0.1})
    until(lambda: site.ledger.get(job).steps_begun == 1, what="the step's beginning")
    site.ledger.request(job, "cancel")
    done = site.finished(job)
    assert (done.state, done.steps_applied, done.steps_interrupted) == ("cancelled", 0, 1)
    assert site.operate("sync").state == "succeeded"
    assert same(site.disk(), before)
    # and the gradients that were thrown away are not in the next job's step
    assert site.finished(site.submit()).state == "succeeded"


def test_out_of_memory_within_a_step_fails_the_job_and_the_same_worker_runs_the_next(site: Site) -> None:
    # Given a worker whose memory runs out in backward of a job's third step
    before_it = site.child()
    site.worker.terminate()
    site.worker.wait(120)
    site.env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(HERE / "support"), os.environ.get("PYTHONPATH"))))
    site.start_worker("short_of_memory_worker:app")
    until(lambda: site.attached() and site.child() != before_it, 100, "attaching")
    weights = WeightState.open(site.settings.model_runtime_dir / FILE_NAME)
    before, child = weights.version, site.child()
    job = site.finished(site.submit(**SLOW, seed=NO_MEMORY_SEED))
    # Then the job has failed for that reason, with the two steps before it, and the third may be partly in the weights
    assert (job.state, job.error["type"]) == ("failed", "does-not-fit")
    assert (job.error["step"], job.error["interrupted"]) == (2, True)
    assert "2.00 GiB" in job.error["message"]
    assert (job.steps_begun, job.steps_applied, job.steps_interrupted) == (3, 2, 1)
    assert (job.weight_version_first, job.weight_version_last) == (before + 1, before + 2)
    # and nothing else: the weights' own account is closed, vLLM runs, the same process trains the next job
    until(lambda: not weights.torn, 10, "the end of the torn step")
    assert (weights.version, weights.begun) == (before + 2, before + 2)
    assert site.exporter.poll() is None
    after = site.finished(site.submit())
    assert (after.state, after.steps_applied) == ("succeeded", 3)
    assert (after.weight_version_first, after.weight_version_last) == (before + 3, before + 5)
    assert weights.version == before + 5
    assert site.child() == child
    assert child.is_running()


@pytest.mark.parametrize("victim", ["child", "parent"])
def test_worker_killed_in_mid_job_goes_on_at_the_first_step_that_was_not_begun(site: Site, victim: str) -> None:
    job = site.submit(**SLOW)
    site.stepping(job, 5)
    child = site.child()
    (child if victim == "child" else site.worker).send_signal(signal.SIGKILL)
    if victim == "parent":
        site.worker.wait()
        site.start_worker()
    done = site.finished(job, 300)
    assert done.state == "succeeded"
    assert done.steps_begun == 400
    assert done.steps_applied + done.steps_interrupted == 400
    assert done.steps_interrupted <= 1
    assert done.attempts == 2
    assert done.weight_version_last - done.weight_version_first == done.steps_applied - 1
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_worker_stopped_in_mid_job_saves_and_the_next_one_goes_on(site: Site) -> None:
    before = site.disk()
    job = site.submit(**SLOW)
    site.stepping(job, 5)
    site.worker.terminate()
    site.worker.wait(120)
    stopped_at = site.ledger.get(job)
    assert stopped_at.state == "queued"
    assert stopped_at.steps_applied == stopped_at.steps_begun < 400
    assert not same(site.disk(), before)
    assert not site.dirty.state().dirty

    site.start_worker()
    done = site.finished(job, 300)
    assert (done.state, done.steps_applied, done.steps_interrupted) == ("succeeded", 400, 0)


def test_live_weights_follow_a_rollback_that_was_made_without_the_worker(site: Site) -> None:
    """Given a worker killed before it saved three steps, and weights that live on."""
    saved = site.operate("sync").result["generation"]
    before = site.disk()
    version = site.finished(site.submit()).weight_version_last
    child = site.child()
    site.worker.send_signal(signal.SIGSTOP)  # or it would start another child
    child.kill()
    site.worker.kill()
    site.worker.wait()
    child.wait(60)
    # When another generation is made the last one, and a worker comes back
    with CheckpointStore.open(site.settings.model_checkpoint_dir, keep_last=99) as store:
        store.rollback(store.generations()[-2].generation)
        made = store.head
    wanted = site.disk()
    assert made.generation == saved + 1
    assert not same(wanted, before)
    site.start_worker()
    found = site.operate("verify")
    # Then the live weights are what was rolled back to, and the three steps are a generation
    assert found.state == "succeeded", found.error
    assert (found.result["ok"], found.result["unsaved"], found.result["live"]) == (True, False, {})
    assert found.result["live_version"] > version
    assert same(site.disk(), wanted)
    generations = {g["generation"]: g for g in site.registry.checkpoint()["generations"]}
    assert (generations[saved + 2]["kind"], generations[saved + 2]["weight_version"]) == ("sync", version)
    assert generations[saved + 3]["restores"] == made.generation
    assert site.finished(site.submit()).weight_version_first == found.result["live_version"] + 1
def test_what_is_unsaved_is_known_again_after_redis_lost_it_and_the_worker_died(site: Site) -> None:
    assert site.operate("sync").state == "succeeded"
    assert site.finished(site.submit()).state == "succeeded"
    os.killpg(site.worker.pid, signal.SIGKILL)
    site.worker.wait()
    assert site.dirty.state().steps == 3
    site.dirty.client.delete(site.dirty.keys("dirty"), site.dirty.keys("last-sync"))
    site.start_worker()
    until(lambda: site.dirty.state().steps == 3, what="the mark of what is unsaved")
    assert site.operate("sync").state == "succeeded"
    assert not site.dirty.state().dirty


def test_sigterm_to_all_processes_of_the_worker_cuts_no_step_and_saves(site: Site) -> None:
    """As systemd and a machine that shuts down send it; twice, because some are impatient."""
    job = site.submit(**ENDLESS)
    site.stepping(job)
    before = site.disk()
    os.killpg(site.worker.pid, signal.SIGTERM)
    time.sleep(0.2)
    os.killpg(site.worker.pid, signal.SIGTERM)
    site.worker.wait(120)
    stopped = site.ledger.get(job)
    assert (stopped.state, stopped.steps_interrupted) == ("queued", 0)
    assert stopped.steps_applied == stopped.steps_begun
    assert not same(site.disk(), before)
    assert site.dirty.state().synced_version == stopped.weight_version_last
    site.ledger.request(job, "cancel")

    # and the same where no job runs
    site.start_worker()
    until(site.attached, what="attaching")
    done = site.finished(site.submit())
    os.killpg(site.worker.pid, signal.SIGTERM)
    site.worker.wait(120)
    assert site.dirty.state().synced_version == done.weight_version_last
    site.start_worker()


def test_a_cold_shutdown_saves_and_ends(site: Site) -> None:
    """SIGQUIT, or Ctrl-C twice: Celery then sends SIGTERM to its child alone."""
    until(site.attached, what="attaching")
    job = site.submit(**ENDLESS)
    site.stepping(job)
    site.worker.send_signal(signal.SIGQUIT)
    site.worker.wait(120)
    stopped = site.ledger.get(job)
    assert (stopped.steps_applied, stopped.steps_interrupted) == (stopped.steps_begun, 0)
    assert site.dirty.state().synced_version == stopped.weight_version_last
    site.ledger.request(job, "cancel")
    site.start_worker()
    until(lambda: site.ledger.get(job).final, what="the cancellation")


def test_sigterm_to_the_child_alone_cuts_no_step_and_another_child_goes_on(site: Site) -> None:
    until(site.attached, what="attaching")
    job = site.submit(**SLOW)
    site.stepping(job)
    child = site.child()
    child.terminate()
    done = site.finished(job)
    assert (done.state, done.steps_applied, done.steps_interrupted) == ("succeeded", 400, 0)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_exporter_killed_in_mid_job_loses_no_step(site: Site) -> None:
    job = site.submit(**SLOW)
    site.stepping(job, 5)
    site.exporter.kill()
    site.exporter.wait()
    until(lambda: not site.registry.worker()["attached"], what="detaching")
    at = site.ledger.get(job)
    assert at.state == "running"
    until(lambda: site.dirty.state().synced_version == at.weight_version_last, what="the sync of what it held")
    assert site.registry.checkpoint()["generations"][0]["jobs"][-1] == job

    site.start_exporter()  # on the original model: the worker brings it up to the last generation
    done = site.finished(job, 300)
    assert (done.state, done.steps_applied, done.attempts) == ("succeeded", 400, 1)
    assert done.weight_version_last - done.weight_version_first == 399
    # and nothing of the dead one's memory is held any more
    assert len({m.addr for m in site.child().memory_maps(grouped=False) if "memfd:hogwild" in m.path}) == 1


def test_quiet_training_is_saved_by_beat(site: Site) -> None:
    site.worker.terminate()
    site.worker.wait(120)
    settings = site.settings.model_copy(update={"sync_quiet_s": 1.0, "sync_tick_s": 0.5})
    site.env.update(settings_env(settings))
    site.start_worker()
    beat = subprocess.Popen(
        [sys.executable, "-m", "celery", "-A", "hogwild.tasks.schedule:app", "beat", "--schedule",
         str(site.settings.data_dir / "beat"), "--pidfile", ""],
        env=site.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        job = site.finished(site.submit())
        until(lambda: not site.dirty.state().dirty, 120, "a sync by beat")
        assert site.dirty.state().synced_version == job.weight_version_last
    finally:
        beat.terminate()
        beat.wait(60)


def test_weights_of_another_model_are_refused_and_not_overwritten(site: Site, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    assert site.finished(site.submit()).state == "succeeded"
    assert site.operate("sync").state == "succeeded"
    mine = site.disk()
    site.exporter.kill()
    site.exporter.wait()
    other = LlamaForCausalLM.from_pretrained(site.model_dir)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.add_(1.0)
    other.save_pretrained(tmp_path / "other")
    site.start_exporter(tmp_path / "other")
    refused = until(lambda: (w := site.registry.worker())["state"] == "refused" and w, what="the refusal")
    assert "HOGWILD_CHECKPOINT_DIR" in refused["lifecycle"]["reason"]
    assert same(site.disk(), mine)


def test_a_job_whose_vllm_is_gone_can_be_cancelled(site: Site) -> None:
    site.exporter.kill()  # of the test before
    site.exporter.wait()
    site.start_exporter()
    job = site.submit(**ENDLESS)
    site.stepping(job)
    site.exporter.kill()
    site.exporter.wait()
    until(lambda: not site.registry.worker()["attached"], what="detaching")
    site.ledger.request(job, "cancel")
    assert site.finished(job).state == "cancelled"
    site.start_exporter()
    until(site.attached, what="attaching")


def test_a_job_ends_when_it_has_trained_for_its_time_limit_and_waiting_for_vllm_does_not_count(site: Site) -> None:
    limit = 10.0
    site.worker.terminate()
    site.worker.wait(120)
    site.env["HOGWILD_JOB_TIME_LIMIT_S"] = str(limit)
    site.start_worker()
    job = site.submit(**ENDLESS)
    site.stepping(job)
    site.exporter.kill()
    site.exporter.wait()
    until(lambda: not site.registry.worker()["attached"], what="detaching")
    before = site.ledger.get(job)
    time.sleep(limit)  # as long as it may train
    site.start_exporter()
    done = site.finished(job)
    assert (done.state, done.attempts, done.steps_interrupted) == ("failed", 1, 0)
    assert "HOGWILD_JOB_TIME_LIMIT_S" in done.error["message"]
    assert done.steps_applied == done.steps_begun > before.steps_applied > 0
    assert limit <= done.seconds < 2 * limit


def test_a_task_that_waits_too_long_for_vllm_gives_its_job_back_before_celery_kills_the_worker(
    redis_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "HANGING_S", 1.0)
    url = redis_server.removesuffix("/0") + "/6"
    settings = Settings(redis_url=url, served_model_name="late", runtime_dir=tmp_path, job_time_limit_s=0.5)
    worker = runtime.Runtime(settings, stop_file=tmp_path / "stop")
    with worker.client as client:
        ledger = Ledger(client, settings)
        job, _ = ledger.submit(pack([Sample([1], [2])]), {"steps": 1})
        operation = worker.operations.submit("sync")
        assert worker.train(None, job)["state"] == "queued"
        assert (ledger.get(job).state, ledger.get(job).attempts) == ("queued", 0)
        began = time.monotonic()
        worker.run_operation(operation)
        assert worker.operations.get(operation).state == "pending"
        assert time.monotonic() - began > 0.9  # its own time, not what was left of the job's


@pytest.mark.parametrize(
    ("asked", "optimizer", "rate", "replay"),
    [
        ({}, "sgd", 0.123, 0.0),
        ({"optimizer": None, "learning_rate": None, "replay": None}, "sgd", 0.123, 0.0),
        ({"optimizer": None, "learning_rate": 0.5}, "sgd", 0.5, 0.0),
        ({"optimizer": "adamw", "replay": 2.0}, "adamw", None, 2.0),
    ],
)
def test_a_stored_null_is_the_deployments_default(
    asked: dict[str, object], optimizer: str, rate: float | None, replay: float, tmp_path: Path
) -> None:
    settings = Settings(
        redis_url="redis://127.0.0.1:1/0", served_model_name="own", runtime_dir=tmp_path,
        optimizer="sgd", learning_rate=0.123, replay=0.0,
    )  # fmt: skip
    worker = runtime.Runtime(settings, stop_file=tmp_path / "stop")
    config = worker.config_of({"steps": 1, **asked})
    assert (config.optimizer, config.learning_rate, config.replay) == (optimizer, rate, replay)


def test_a_long_attach_is_shown_and_the_worker_counts_as_alive_meanwhile(
    redis_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "HEARTBEAT_S", 0.1)
    url = redis_server.removesuffix("/0") + "/6"
    settings = Settings(redis_url=url, served_model_name="slow", runtime_dir=tmp_path)
    worker = runtime.Runtime(settings, stop_file=tmp_path / "stop")
    attached = threading.Event()

    def attach() -> None:
        worker.lifecycle._go(State.ATTACHING, "")
        attached.wait(60)

    monkeypatch.setattr(worker.lifecycle, "poll", attach)
    with worker.client as client:
        worker.start()
        try:
            until(lambda: worker.registry.worker().get("state") == "attaching", 10, "saying so")
            client.delete(worker.registry.keys("alive", worker.worker_id))  # as when it expires
            until(lambda: worker.registry.worker()["alive"], 10, "the next beat")
        finally:
            attached.set()
            worker.shutdown()
        assert not worker.registry.worker()["alive"]
