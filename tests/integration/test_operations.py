"""Syncs and rollbacks on request: exactly one executor, whatever dies."""

import threading

import pytest

from hogwild.errors import Conflict, NotFound
from hogwild.tasks.app import make_app
from hogwild.tasks.messages import Messages
from hogwild.tasks.operations import ATTEMPTS, Operations
from hogwild.tasks.registry import Registry


@pytest.fixture
def operations(redis_client, settings):
    return Operations(redis_client, Messages(make_app(settings), settings.queue), settings.model_name)


def test_message_and_poll_execute_it_once(operations):
    op_id = operations.submit("rollback", generation=3)
    [op] = operations.pending()
    won = []
    threads = [threading.Thread(target=lambda: won.append(operations.start(op_id, "w"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [mine] = [op for op in won if op is not None]
    assert mine.params == {"generation": 3} and op.id == op_id
    assert operations.pending() == []
    operations.finish(mine, {"generation": 3})
    assert operations.get(op_id).state == "succeeded" and operations.get(op_id).result == {"generation": 3}
    assert operations.start(op_id) is None


def test_failure_keeps_its_reason(operations):
    op_id = operations.submit("sync")
    operations.finish(operations.start(op_id), error=NotFound("no such generation"))
    op = operations.get(op_id)
    assert op.state == "failed" and op.error == {"type": "not-found", "message": "no such generation"}


def test_operation_of_a_dead_worker_is_done_again_but_not_for_ever(redis_client, operations):
    registry = Registry(redis_client, "tiny")
    registry.register_worker("w1", "host")
    op_id = operations.submit("sync")
    operations.start(op_id, "w1")
    assert operations.reconcile() == 0 and operations.pending() == []  # w1 lives
    for attempt in range(2, ATTEMPTS + 1):
        registry.register_worker(f"w{attempt}", "host")
        assert operations.reconcile(f"w{attempt}") == 1
        assert operations.start(op_id, f"w{attempt}").attempts == attempt
    registry.register_worker("w-last", "host")
    operations.reconcile("w-last")
    assert operations.get(op_id).state == "failed"


def test_only_what_nobody_has_started_can_be_cancelled(operations):
    waiting, running = operations.submit("rollback", generation=3), operations.submit("sync")
    operations.start(running, "w")
    for _ in range(2):
        assert operations.cancel(waiting).error["type"] == "cancelled"
    assert operations.start(waiting) is None and operations.pending() == []
    with pytest.raises(Conflict, match="it runs"):
        operations.cancel(running)
    operations.finish(running, {})
    with pytest.raises(Conflict, match="has succeeded"):
        operations.cancel(running)
    with pytest.raises(NotFound):
        operations.cancel("op-x")


def test_lost_message_of_an_operation_is_published_again(redis_client, operations):
    op_id = operations.submit("sync")
    redis_client.delete(*operations.messages.queue_keys())
    assert operations.reconcile() == 1
    assert redis_client.llen(operations.messages.queue_keys()[0]) == 1  # before all jobs
    assert operations.start(op_id) is not None


def test_unknown_operation_is_not_found(operations):
    with pytest.raises(NotFound):
        operations.get("op-x")
