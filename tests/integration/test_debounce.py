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
