"""When a sync is due, and what a sync leaves unsaved."""

import pytest

from hogwild.tasks.dirty import Dirty


@pytest.fixture
def dirty(redis_client):
    return Dirty(redis_client, "tiny")


def test_nothing_unsaved_nothing_due(dirty):
    assert not dirty.due(0, 0)
    assert not dirty.state().dirty


def test_due_when_quiet_or_too_old(dirty):
    dirty.mark_dirty(1)
    dirty.mark_dirty(3, 2)
    state = dirty.state()
    assert (state.steps, state.weight_version) == (3, 3)
    at = state.last_at
    assert not dirty.due(600, 3600, now=at + 599)
    assert dirty.due(600, 3600, now=at + 600)
    assert not dirty.due(1e9, 3600, now=state.oldest_at + 3599)
    assert dirty.due(1e9, 3600, now=state.oldest_at + 3600)


def test_many_jobs_make_one_sync(dirty):
    for version in range(1, 50):
        dirty.mark_dirty(version)
        assert not dirty.due(600, 3600)
    dirty.clear(1, 49)
    assert not dirty.due(0, 0)
    assert dirty.state().generation == 1


def test_steps_after_the_snapshot_stay_unsaved(dirty):
    dirty.mark_dirty(10, 10)
    dirty.mark_dirty(12, 2)  # while the sync of version 10 was being written
    dirty.clear(1, 10)
    state = dirty.state()
    assert state.dirty and state.steps == 2 and state.weight_version == 12


def test_sync_on_demand_is_due_at_once(dirty):
    dirty.request_sync()
    assert dirty.due(600, 3600)
    dirty.clear(1, 0)
    assert not dirty.due(600, 3600)


def test_clock_that_jumped_back_does_not_stop_syncs(dirty):
    dirty.mark_dirty(1)
    assert dirty.due(600, 3600, now=dirty.state().last_at - 86_400)


# --- a worker that attaches -------------------------------------------------------------------------------------------


def test_unsaved_steps_are_known_again_when_redis_lost_them(dirty):
    dirty.settle(7, 2, 4)
    state = dirty.state()
    assert (state.dirty, state.steps, state.weight_version) == (True, 3, 7)
    assert (state.generation, state.synced_version) == (2, 4)
    assert dirty.due(600, 3600, now=state.last_at + 600)


def test_a_step_whose_worker_died_before_its_mark_counts(dirty):
    dirty.clear(1, 4)
    dirty.settle(5, 1, 4)
    assert dirty.state().steps == 1
    dirty.mark_dirty(6)
    assert dirty.state().steps == 2


def test_waiting_times_go_on_over_a_restart_of_the_worker(dirty):
    dirty.clear(1, 4)
    dirty.mark_dirty(5)
    dirty.mark_dirty(6)
    before = dirty.state()
    Dirty(dirty.client, "tiny").settle(6, 1, 4)
    after = Dirty(dirty.client, "tiny").state()
    assert (after.oldest_at, after.last_at, after.steps) == (before.oldest_at, before.last_at, 2)
    assert after.synced_at == before.synced_at


def test_steps_that_are_gone_with_their_weights_are_not_unsaved(dirty):
    dirty.mark_dirty(9, 9)
    dirty.settle(4, 1, 4)  # vLLM came back with the last generation
    assert not dirty.state().dirty
    assert not dirty.due(0, 0)
