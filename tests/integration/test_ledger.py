"""The ledger's promises, on a real server: at most once per step, nothing accepted is lost, nothing repeated."""

import json
import math
import threading
import time

import pytest

from hogwild.errors import Conflict, IdempotencyConflict, NotFound, TooManyRequests
from hogwild.tasks.ledger import BARREN_ATTEMPTS, LIST_SCAN, Ledger
from hogwild.tasks.payloads import Sample, pack
from hogwild.tasks.registry import Registry

SAMPLES = [Sample([1, 2, 3], [4, 5]), Sample([], [6], [0.5])]


@pytest.fixture
def ledger(redis_client, settings):
    return Ledger(redis_client, settings)


@pytest.fixture
def submit(ledger):
    def _submit(samples=SAMPLES, config=None, **options):
        return ledger.submit(pack(samples), config or {"learning_rate": 0.1}, **options)[0]
    return _submit


def messages_of(client, ledger):
    """Ids of the jobs whose messages wait, most urgent first, oldest first."""
    found = []
    for key in ledger.messages.queue_keys():
        found += [json.loads(raw)["headers"]["id"].split(".")[0] for raw in reversed(client.lrange(key, 0, -1))]
    return found


def event_names(client, ledger, job_id):
    return [fields[b"event"].decode() for _, fields in client.xrange(ledger.keys("events", job_id))]


def run_steps(ledger, lease, first, count, version=0):
    for step in range(first, first + count):
        ledger.begin_step(lease, step, weight_version=version + step - first)
        ledger.applied(lease, step, version + step - first + 1, loss=1.0 / (step + 1), tokens=3, seconds=0.2)


# --- accepting ----------------------------------------------------------------------------------------------------


def test_submitted_job_has_row_samples_and_message(redis_client, ledger, submit):
    job_id = submit(metadata={"source": "test"})
    job = ledger.get(job_id)
    assert (job.state, job.samples, job.tokens, job.config) == ("queued", 2, 6, {"learning_rate": 0.1})
    assert job.metadata == {"source": "test"}
    assert messages_of(redis_client, ledger) == [job_id]
    raw = redis_client.lrange(ledger.messages.queue_keys()[4], 0, -1)[0]
    assert len(raw) < 1500 and b"context" not in raw


def test_a_waiting_and_a_finished_job_take_little_memory(redis_client, ledger, submit):
    before = redis_client.info("memory")["used_memory"]
    ids = [submit([Sample([n], [1, 2])]) for n in range(200)]
    waiting = (redis_client.info("memory")["used_memory"] - before) / len(ids)
    redis_client.delete(*ledger.messages.queue_keys())
    for job_id in ids:
        lease = ledger.claim(job_id, "w1")
        run_steps(ledger, lease, 0, 3)
        ledger.finish(lease, "succeeded")
    finished = (redis_client.info("memory")["used_memory"] - before) / len(ids)
    # Row, samples, events, indexes and (waiting) the message; a stream alone would start with more than 4 kB
    assert waiting < 4500 and finished < 4500


def test_same_key_and_body_is_the_same_job(redis_client, ledger, submit):
    first = submit(idempotency_key="default:k1")
    assert submit(idempotency_key="default:k1") == first
    assert messages_of(redis_client, ledger) == [first]
    assert ledger.counts()["queued"] == 1


def test_same_key_other_body_is_refused(ledger, submit):
    submit(idempotency_key="default:k1")
    with pytest.raises(IdempotencyConflict):
        submit(idempotency_key="default:k1", config={"learning_rate": 0.2})
    with pytest.raises(IdempotencyConflict):
        submit(idempotency_key="default:k1", samples=[Sample([1], [2])])


def test_same_key_from_many_clients_at_once_makes_one_job(ledger, submit):
    ids = []
    threads = [threading.Thread(target=lambda: ids.append(submit(idempotency_key="k"))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(ids) == 16 and len(set(ids)) == 1
    assert ledger.counts()["queued"] == 1


def test_full_queue_refuses_and_says_when_to_return(redis_client, settings, submit):
    small = Ledger(redis_client, settings.model_copy(update={"queue_limit": 2}))
    for _ in range(2):
        small.submit(pack(SAMPLES), {})
    with pytest.raises(TooManyRequests) as caught:
        small.submit(pack(SAMPLES), {})
    assert caught.value.details["retry_after"] > 0
    assert small.counts()["queued"] == 2


def test_samples_that_wait_are_limited_in_bytes(redis_client, settings):
    payload, other = pack(SAMPLES), pack([*SAMPLES, *SAMPLES])
    small = Ledger(redis_client, settings.model_copy(update={"queue_bytes": len(other.data)}))
    first = small.submit(payload, {})[0]
    small.submit(payload, {})  # the same samples are there already
    with pytest.raises(TooManyRequests, match="HOGWILD_QUEUE_BYTES") as caught:
        small.submit(other, {})
    assert caught.value.details["retry_after"] > 0
    small.request(first, "cancel")
    with pytest.raises(TooManyRequests):
        small.submit(other, {})  # the second job still needs them
    [second] = small.list(state="queued").jobs
    small.request(second.id, "cancel")
    small.submit(other, {})
    assert int(redis_client.get(small.keys("payload-bytes"))) == len(other.data)


def test_samples_of_a_job_that_has_ended_are_gone(redis_client, ledger, submit):
    job_id = submit()
    lease = ledger.claim(job_id, "w")
    assert list(redis_client.scan_iter(f"{ledger.keys('payload', '*')}"))
    run_steps(ledger, lease, 0, 1)
    ledger.finish(lease, "succeeded")
    ledger.finish(lease, "succeeded")  # the answer to the first was lost
    assert not list(redis_client.scan_iter(f"{ledger.keys('payload', '*')}"))
    assert redis_client.get(ledger.keys("payload-bytes")) == b"0"
    assert submit() != job_id and len(list(redis_client.scan_iter(f"{ledger.keys('payload', '*')}"))) == 1


def test_jobs_of_a_kind_are_found_behind_many_others(ledger, submit):
    wanted = submit(kind="fine_tuning")
    for _ in range(LIST_SCAN + 1):
        submit()
    page = ledger.list(kind="fine_tuning")
    assert ([job.id for job in page.jobs], page.next_cursor) == ([wanted], None)


def test_urgent_jobs_go_first_and_equals_in_order(redis_client, ledger, submit):
    normal_1, low, urgent, normal_2 = submit(), submit(priority=0), submit(priority=9), submit()
    assert messages_of(redis_client, ledger) == [urgent, normal_1, normal_2, low]


# --- running ------------------------------------------------------------------------------------------------------


def test_a_job_runs_from_claim_to_success(ledger, submit):
    job_id = submit()
    lease = ledger.claim(job_id, "w1")
    assert lease.first_step == 0 and lease.attempts == 1
    assert [list(s.continuation_ids) for s in ledger.samples(lease)] == [[4, 5], [6]]
    ledger.planned(lease, 3)
    run_steps(ledger, lease, 0, 3, version=7)
    ledger.finish(lease, "succeeded")
    job = ledger.get(job_id)
    assert (job.state, job.steps, job.steps_applied) == ("succeeded", 3, 3)
    assert (job.steps_begun, job.steps_interrupted) == (3, 0)
    assert (job.weight_version_first, job.weight_version_last) == (8, 10)
    assert job.tokens_trained == 9 and job.seconds == pytest.approx(0.6)
    assert ledger.losses(job_id) == pytest.approx([1.0, 0.5, 1 / 3], rel=1e-5)
    assert ledger.claim(job_id, "w1") is None


def test_a_step_cannot_begin_twice(ledger, submit):
    lease = ledger.claim(submit(), "w1")
    ledger.begin_step(lease, 0)
    with pytest.raises(Conflict, match="begun"):
        ledger.begin_step(lease, 0)
    with pytest.raises(Conflict):
        ledger.begin_step(lease, 1)
    ledger.applied(lease, 0, 1)
    with pytest.raises(Conflict):
        ledger.begin_step(lease, 0)
    with pytest.raises(Conflict):
        ledger.begin_step(lease, 2)


def test_step_that_was_not_begun_cannot_be_applied(ledger, submit):
    lease = ledger.claim(submit(), "w1")
    with pytest.raises(Conflict):
        ledger.applied(lease, 0, 1)


def test_repeated_report_of_a_step_counts_once(ledger, submit):
    job_id = submit()
    lease = ledger.claim(job_id, "w1")
    ledger.begin_step(lease, 0)
    ledger.applied(lease, 0, 1, tokens=5)
    ledger.applied(lease, 0, 1, tokens=5)  # the reply to the first was lost
    job = ledger.get(job_id)
    assert (job.steps_applied, job.tokens_trained) == (1, 5)


def test_worker_dies_in_a_step_and_the_next_goes_on_after_it(ledger, submit):
    job_id = submit()
    run_steps(ledger, first := ledger.claim(job_id, "w1"), 0, 2)
    ledger.begin_step(first, 2, weight_version=2)
    # When its worker is gone and another claims
    second = ledger.claim(job_id, "w2", weights_version=2)
    # Then step 2 is not repeated but counted as interrupted
    assert second.first_step == 3 and second.fence > first.fence
    assert ledger.get(job_id).steps_interrupted == 1
    # And the first worker, should it still live, can't write any more
    for call in (lambda: ledger.applied(first, 2, 3), lambda: ledger.begin_step(first, 3),
                 lambda: ledger.finish(first, "succeeded"), lambda: ledger.release(first)):
        with pytest.raises(Conflict, match="lease"):
            call()


def test_an_open_step_is_judged_when_a_worker_attaches_before_a_rollback_moves_the_version(ledger, submit):
    job_id = submit()
    lease = ledger.claim(job_id, "w1")
    ledger.begin_step(lease, 0, weight_version=41)
    # Given a worker that died in the step, and one that rolls back (version 42) before it claims a job
    ledger.settle("w2", 41)
    second = ledger.claim(job_id, "w2", weights_version=42)
    job = ledger.get(job_id)
    assert (second.first_step, job.steps_applied, job.steps_interrupted) == (1, 0, 1)


def test_a_living_workers_open_step_is_not_judged_by_another(ledger, submit):
    job_id = submit()
    ledger.client.set(ledger.keys("alive", "w1"), "1")
    lease = ledger.claim(job_id, "w1")
    ledger.begin_step(lease, 0, weight_version=41)
    ledger.settle("w2", 42)
    ledger.applied(lease, 0, 42)
    assert ledger.get(job_id).steps_applied == 1


def test_job_of_a_worker_that_stopped_waits_and_is_published_by_the_next_ones_start(ledger, submit):
    job_id = submit()
    run_steps(ledger, lease := ledger.claim(job_id, "w1"), 0, 2)
    ledger.planned(lease, 7, 512)
    ledger.release(lease)
    ledger.release(lease)  # the reply to the first was lost
    assert ledger.get(job_id).state == "queued"
    ledger.client.delete(*ledger.messages.queue_keys())  # the stopped worker had the message
    assert ledger.reconcile("w2", grace_s=0).republished == (job_id,)
    # Then it goes on, in packs of the same size
    second = ledger.claim(job_id, "w2")
    assert (second.first_step, second.steps, second.pack_tokens) == (2, 7, 512)


def test_step_that_reached_the_weights_is_counted_as_applied(ledger, submit):
    job_id = submit()
    lease = ledger.claim(job_id, "w1")
    ledger.begin_step(lease, 0, weight_version=41)
    # Given a worker that died between writing the weights (now 42) and saying so
    second = ledger.claim(job_id, "w2", weights_version=42)
    job = ledger.get(job_id)
    assert (second.first_step, job.steps_applied, job.steps_interrupted) == (1, 1, 0)
    assert job.weight_version_last == 42


def test_orphaned_step_is_settled_before_another_job_moves_the_version(ledger, submit):
    orphan, other = submit(), submit()
    lease = ledger.claim(orphan, "w1")
    # Given a worker that died after the ledger knew of the step and before a weight was written (version still 41)
    ledger.begin_step(lease, 0, weight_version=41)
    # When the next worker first runs another job, which makes version 42
    second = ledger.claim(other, "w2", weights_version=41)
    ledger.begin_step(second, 0, weight_version=41)
    ledger.applied(second, 0, 42)
    ledger.finish(second, "succeeded")
    # Then version 42 is not taken for the orphan's step
    assert ledger.claim(orphan, "w2", weights_version=42).first_step == 1
    job = ledger.get(orphan)
    assert (job.steps_applied, job.steps_interrupted) == (0, 1)


def test_living_worker_is_not_robbed(redis_client, ledger, submit):
    job_id = submit()
    Registry(redis_client, "tiny").register_worker("w1", "host-a")
    assert ledger.claim(job_id, "w1") is not None
    assert ledger.claim(job_id, "w2") is None
    # When it falls silent
    Registry(redis_client, "tiny").unregister_worker("w1")
    assert ledger.claim(job_id, "w2") is not None


def test_job_that_kills_every_worker_fails(ledger, submit):
    job_id = submit()
    for attempt in range(BARREN_ATTEMPTS):
        lease = ledger.claim(job_id, f"w{attempt}")
        assert lease is not None
        ledger.begin_step(lease, lease.first_step)
    assert ledger.claim(job_id, "w-last") is None
    job = ledger.get(job_id)
    assert job.state == "failed" and "died" in job.error["message"]


@pytest.mark.parametrize("end", ["release", "park"])
def test_attempts_that_end_in_order_before_a_step_are_no_deaths(ledger, submit, end):
    job_id = submit()

    def given_back(worker):
        lease = ledger.claim(job_id, worker)
        assert lease is not None
        if end == "park":
            ledger.request(job_id, "pause")
        for _ in range(2):  # the reply to the first was lost
            getattr(ledger, end)(lease)
        if end == "park":
            ledger.request(job_id, "run")

    for attempt in range(2 * BARREN_ATTEMPTS):
        given_back(f"w{attempt}")
    # And the deaths among them count as before
    for attempt in range(BARREN_ATTEMPTS):
        assert ledger.claim(job_id, f"dies{attempt}") is not None
        if attempt < BARREN_ATTEMPTS - 1:
            given_back(f"stops{attempt}")
    assert ledger.claim(job_id, "w-last") is None
    job = ledger.get(job_id)
    assert job.state == "failed" and "died 5 times" in job.error["message"]


def test_job_that_makes_progress_between_deaths_goes_on(ledger, submit):
    job_id = submit()
    for attempt in range(3 * BARREN_ATTEMPTS):
        lease = ledger.claim(job_id, f"w{attempt}")
        assert lease is not None
        run_steps(ledger, lease, lease.first_step, 1)
        ledger.begin_step(lease, lease.first_step + 1)
    assert ledger.get(job_id).steps_applied == 3 * BARREN_ATTEMPTS


def test_a_dropped_step_has_ended_and_is_not_in_the_weights(redis_client, ledger, submit):
    job_id = submit()
    lease = ledger.claim(job_id, "w")
    ledger.begin_step(lease, 0, weight_version=7)
    ledger.applied(lease, 0, 7, loss=math.inf, tokens=0, seconds=0.2, dropped=True)
    job = ledger.get(job_id)
    assert (job.steps_applied, job.weight_version_first, job.weight_version_last) == (1, None, None)
    ledger.begin_step(lease, 1, weight_version=7)
    ledger.applied(lease, 1, 8, loss=2.0, tokens=5, seconds=0.2)
    job = ledger.get(job_id)
    assert (job.steps_applied, job.weight_version_first, job.weight_version_last) == (2, 8, 8)
    counted = {k.decode(): v for k, v in redis_client.hgetall(ledger.keys("counters")).items()}
    assert (counted["steps_applied"], counted["steps_dropped"], counted["tokens_trained"]) == (b"1", b"1", b"5")
    assert counted["step_seconds_le_0.25"] == b"1"  # of steps in the weights, as their number


def test_nan_loss_is_kept_as_unknown(ledger, submit):
    job_id = submit()
    lease = ledger.claim(job_id, "w1")
    ledger.begin_step(lease, 0)
    ledger.applied(lease, 0, 1, loss=math.nan, grad_norm=math.inf)
    assert ledger.losses(job_id) == [None]


# --- cancel, pause, resume ------------------------------------------------------------------------------------------


def test_cancel_of_a_queued_job_ends_it_at_once(ledger, submit):
    job_id = submit()
    assert ledger.request(job_id, "cancel").state == "cancelled"
    assert ledger.claim(job_id, "w1") is None
    assert ledger.request(job_id, "cancel").state == "cancelled"  # again: the same answer


def test_cancel_of_a_running_job_is_a_flag(ledger, submit):
    job_id = submit()
    lease = ledger.claim(job_id, "w1")
    assert ledger.request(job_id, "cancel").state == "running"
    assert ledger.requested(job_id) == "cancel"
    ledger.finish(lease, "cancelled")
    assert ledger.get(job_id).state == "cancelled"


def test_cancel_reaches_a_job_whose_worker_died(ledger, submit):
    job_id = submit()
    ledger.claim(job_id, "w1")
    ledger.request(job_id, "cancel")
    assert ledger.claim(job_id, "w2") is None
    assert ledger.get(job_id).state == "cancelled"


def test_paused_queued_job_waits_for_resume(redis_client, ledger, submit):
    job_id = submit()
    assert ledger.request(job_id, "pause").paused
    assert ledger.claim(job_id, "w1") is None
    redis_client.delete(*ledger.messages.queue_keys())  # its message was delivered and refused
    ledger.request(job_id, "run")
    assert messages_of(redis_client, ledger) == [job_id]
    assert ledger.claim(job_id, "w1") is not None


def test_parked_job_goes_on_where_it_stopped(redis_client, ledger, submit):
    job_id = submit()
    lease = ledger.claim(job_id, "w1")
    run_steps(ledger, lease, 0, 2)
    assert ledger.park(lease) is False  # nobody asked for a pause
    ledger.request(job_id, "pause")
    assert ledger.park(lease) is True
    job = ledger.get(job_id)
    assert (job.state, job.paused) == ("queued", True)
    assert ledger.reconcile("w1", grace_s=0).republished == ()
    ledger.request(job_id, "run")
    assert ledger.claim(job_id, "w1").first_step == 2


def test_job_that_is_to_pause_is_paused_when_its_worker_stops(redis_client, ledger, submit):
    job_id = submit()
    run_steps(ledger, lease := ledger.claim(job_id, "w1"), 0, 2)
    # Given a pause that came after the job's last look
    ledger.request(job_id, "pause")
    ledger.release(lease)
    ledger.release(lease)  # the reply to the first was lost
    job = ledger.get(job_id)
    assert (job.state, job.paused, job.requested) == ("queued", True, "pause")
    assert event_names(redis_client, ledger, job_id)[-1] == "paused"
    redis_client.delete(*ledger.messages.queue_keys())
    assert ledger.reconcile("w2", grace_s=0).republished == ()
    ledger.request(job_id, "run")
    assert messages_of(redis_client, ledger) == [job_id]
    assert ledger.claim(job_id, "w2").first_step == 2


def test_job_that_is_to_be_cancelled_ends_when_its_worker_stops(redis_client, ledger, submit):
    job_id = submit()
    lease = ledger.claim(job_id, "w1")
    ledger.request(job_id, "cancel")
    ledger.release(lease)
    ledger.release(lease)  # the reply to the first was lost
    assert ledger.get(job_id).state == "cancelled"
    assert event_names(redis_client, ledger, job_id)[-1] == "cancelled"
    assert ledger.counts() == {"queued": 0, "running": 0, "succeeded": 0, "failed": 0, "cancelled": 1}
    with pytest.raises(Conflict):
        ledger.request(job_id, "run")


def test_finished_job_cannot_be_paused(ledger, submit):
    job_id = submit()
    ledger.finish(ledger.claim(job_id, "w1"), "succeeded")
    for want in ("cancel", "pause", "run"):
        with pytest.raises(Conflict, match="succeeded"):
            ledger.request(job_id, want)


# --- reconciler -----------------------------------------------------------------------------------------------------


def test_lost_message_is_published_again(redis_client, ledger, submit):
    lost, kept = submit(), submit()
    redis_client.rpop(ledger.messages.queue_keys()[4])
    assert messages_of(redis_client, ledger) == [kept]
    assert ledger.reconcile(grace_s=60).republished == ()  # it may be on its way to the worker
    assert ledger.reconcile(grace_s=0).republished == (lost,)
    assert sorted(messages_of(redis_client, ledger)) == sorted([lost, kept])
    assert ledger.reconcile(grace_s=0).republished == ()


def test_job_of_a_dead_worker_is_published_again(redis_client, ledger, submit):
    registry = Registry(redis_client, "tiny")
    registry.register_worker("w1", "host-a")
    job_id = submit()
    ledger.claim(job_id, "w1")
    redis_client.delete(*ledger.messages.queue_keys())
    assert ledger.reconcile(grace_s=0).republished == ()  # w1 lives and runs it
    registry.register_worker("w2", "host-a")  # the same host: w1 is dead
    assert ledger.reconcile("w2", grace_s=0).republished == (job_id,)


def test_forgotten_jobs_take_their_samples_with_them(redis_client, settings, ledger):
    brief = Ledger(redis_client, settings.model_copy(update={"job_retention_s": 0.001}))
    ids = [brief.submit(pack(SAMPLES), {})[0] for _ in range(2)]
    brief.finish(brief.claim(ids[0], "w1"), "succeeded")
    time.sleep(0.02)
    assert brief.purge() == 1
    with pytest.raises(NotFound):
        brief.get(ids[0])
    assert brief.samples(brief.claim(ids[1], "w1"))  # the other job still has the same samples
    brief.request(ids[1], "cancel")
    brief.claim(ids[1], "w2")
    time.sleep(0.02)
    assert brief.purge() == 1
    left = {key.decode() for key in redis_client.keys("hogwild:*")}
    assert left <= {brief.keys("seq"), brief.keys("counters"), brief.keys("payload-bytes")}


# --- reading --------------------------------------------------------------------------------------------------------


def test_pages_hold_every_job_once_newest_first(ledger, submit):
    ids = [submit(metadata={"n": str(i % 2)}) for i in range(25)]
    for job_id in ids[:5]:
        ledger.request(job_id, "cancel")
    seen, cursor = [], None
    while True:
        page = ledger.list(limit=10, cursor=cursor)
        seen += [job.id for job in page.jobs]
        if (cursor := page.next_cursor) is None:
            break
    assert seen == ids[::-1]
    assert {job.id for job in ledger.list(state="cancelled").jobs} == set(ids[:5])
    page = ledger.list(limit=6, metadata={"n": "1"})
    assert [job.id for job in page.jobs] == [i for i in ids[::-1] if ids.index(i) % 2][:6]
    assert page.next_cursor is not None
