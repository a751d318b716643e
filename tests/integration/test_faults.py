"""Whatever is killed, no accepted job is lost and no step happens twice.

Real processes: Valkey with its append-only file, Celery worker (parent and child), beat, two API servers. A supervisor
restarts what dies, as `hogwild up` does. After each fault: every accepted job has ended, no step began twice, and the
weights are bit for bit what a replay of exactly the applied steps makes. More seeds: HOGWILD_FAULT_SEEDS="1 2 3 …".
"""

import os
import random
import signal
import threading
import time

import httpx
import psutil
import pytest
from process_stack import ready

SEEDS = [int(seed) for seed in os.environ.get("HOGWILD_FAULT_SEEDS", "1 2").split()]
pytestmark = pytest.mark.timeout(900)


@pytest.mark.parametrize("seed", SEEDS)
def test_everything_killed_at_random_while_30_jobs_are_in_flight(stack, seed):
    rng = random.Random(seed)
    running = ready(stack(apis=2), "worker", "beat", "api0", "api1")
    victims = ["child", "worker", "redis", "api0", "beat", "child", "redis", "child"]
    rng.shuffle(victims)
    # Given jobs that are still being submitted while the first ones run
    jobs: list[str] = []
    submitter = threading.Thread(target=lambda: jobs.extend(running.submit(30, steps=4, clients=3, seed=seed)))
    submitter.start()
    # When one process after another is killed
    for victim in victims:
        time.sleep(rng.uniform(0.1, 1.5))
        running.kill(victim)
    submitter.join()
    assert len(jobs) == 30
    # Then all of them end
    running.wait_ended(jobs)
    running.check(jobs, steps=4)


def test_worker_child_killed_in_each_phase_of_a_step(stack):
    running = ready(stack(step_s=0.4), "worker", "api0")
    [job_id] = jobs = running.submit(1, steps=30)
    for n, delay in enumerate((0.02, 0.15, 0.3)):  # after begin, around the write, before applied
        running.wait_until(lambda attempt=n + 1: running.ledger.get(job_id).attempts == attempt)
        running.wait_steps(running.ledger.get(job_id).steps_applied + 1)
        time.sleep(delay)
        running.kill("child")
    running.wait_ended(jobs)
    assert running.ledger.get(job_id).attempts == 4
    running.check(jobs, steps=30)


def test_redis_stalled_for_20_s_while_steps_are_running(stack):
    running = ready(stack(), "worker", "api0")
    jobs = running.submit(3, steps=20)
    running.wait_steps(5)
    running.server.signal(signal.SIGSTOP)
    answer = httpx.post(f"http://127.0.0.1:{running.ports[0]}/train", timeout=60,
                        json={"context_ids": [1], "continuation_ids": [2], "steps": 2})
    assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0
    time.sleep(max(0.0, 20 - answer.elapsed.total_seconds()))
    running.server.signal(signal.SIGCONT)
    running.wait_ended(jobs)
    # The submit that was answered 503 reached the server's socket: it may have been accepted, once.
    everything = [job.id for job in running.ledger.list(limit=100).jobs]
    assert len(everything) in (3, 4)
    running.client.delete(*running.client.keys(f"{running.ledger.keys.prefix}idem:*"))
    extra = [job_id for job_id in everything if job_id not in jobs]
    running.sent.update({key: [2] for key in extra})
    running.wait_ended(extra)
    running.check(everything, steps=0, ended="")


def test_disk_full_under_redis_and_room_made_again(stack):
    running = ready(stack(redis_options={"ignore_file_size_signal": True}), "worker", "api0")
    jobs = running.submit(6, steps=10)
    running.wait_steps(8)
    # When the append-only file can't grow (the server's limit of file sizes stands in for a full disk)
    aof = max(running.server.directory.glob("appendonlydir/*.incr.aof"), key=lambda path: path.stat().st_mtime)
    pid = running.server.process.pid
    psutil.Process(pid).rlimit(psutil.RLIMIT_FSIZE, (aof.stat().st_size + 2000, aof.stat().st_size + 2000))
    deadline = time.monotonic() + 120
    while running.server.process.pid == pid:  # it ends itself rather than answer what is not on disk
        assert time.monotonic() < deadline
        time.sleep(0.05)
    # Then, with room again after its restart, everything goes on
    running.wait_ended(jobs)
    running.check(jobs, steps=10)


def test_every_message_delivered_three_times_and_every_lease_forgotten(stack):
    """Duplicate delivery, and a clock that jumps forward: every key with a time to live is gone at once."""
    running = ready(stack(), "worker", "api0")
    jobs = running.submit(8, steps=6)
    keys = running.ledger.messages.queue_keys()
    for n in range(10):
        time.sleep(0.1)
        for key in keys:
            for raw in set(running.client.lrange(key, 0, -1)):
                running.client.lpush(key, raw)
                running.client.rpush(key, raw)
            running.client.ltrim(key, 0, 60)
        running.client.delete(*(running.client.keys(running.ledger.keys("alive", "*")) or ["-"]))
        if n % 3 == 0:
            running.ledger.reconcile(grace_s=0)
    running.wait_ended(jobs)
    assert all(running.ledger.get(job_id).steps_applied == 6 for job_id in jobs)
    running.check(jobs, steps=6)


def test_messages_lost_and_beat_brings_them_back(stack):
    running = ready(stack(), "api0", "worker", "beat")
    running.kill("worker")
    jobs = running.submit(5, steps=3)
    for key in running.ledger.messages.queue_keys():
        running.client.delete(key)
    running.wait_ended(jobs)
    running.check(jobs, steps=3)


def test_a_thousand_jobs_queued_at_once_through_two_servers(stack):
    running = ready(stack(apis=2, step_s=0.0), "worker", "api0", "api1")
    jobs = running.submit(1000, steps=1, clients=8)
    running.wait_ended(jobs[-5:])
    running.wait_ended(jobs)
    running.check(jobs, steps=1)


def test_cancel_pause_and_resume_reach_a_running_job(stack):
    running = ready(stack(step_s=0.05), "worker", "api0")
    paused, cancelled = running.submit(2, steps=200, clients=1)  # in this order
    [last] = running.submit(1, steps=20, seed=1)

    def ask(job_id, what):
        assert httpx.post(f"http://127.0.0.1:{running.ports[0]}/train/{job_id}/{what}", timeout=60).status_code == 200

    running.wait_until(lambda: running.ledger.get(paused).steps_applied >= 2)
    ask(paused, "pause")
    running.wait_until(lambda: running.ledger.get(cancelled).steps_applied >= 2)
    at = running.ledger.get(paused)
    assert at.paused and at.state == "queued" and 2 <= at.steps_applied < 200
    ask(cancelled, "cancel")
    running.wait_ended([cancelled, last])
    at = running.ledger.get(cancelled)
    assert at.state == "cancelled" and 2 <= at.steps_applied < 200
    ask(paused, "resume")
    running.wait_ended([paused])
    assert running.ledger.get(paused).steps_applied == 200
    assert running.ledger.get(last).steps_applied == 20
    running.check([paused, cancelled, last], steps=0, ended="")
