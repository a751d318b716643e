"""The worker's syncs, rollbacks and attaching, on a real checkpoint and a real weight state."""

import copy
import errno
import os
import sys
import time
from dataclasses import fields
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hogwild.checkpoint import store as store_module
from hogwild.checkpoint import views
from hogwild.checkpoint.durable import FileLock
from hogwild.checkpoint.reports import VerifyReport
from hogwild.checkpoint.store import CheckpointStore
from hogwild.errors import CheckpointError
from hogwild.tasks.saving import Saver
from hogwild.weight_state import WeightState


class Nobody:
    """Redis' side of a saver, which these tests do not look at."""

    client = None

    def __getattr__(self, name):
        return lambda *_, **__: None


class Trainer:
    """An optimizer whose state may be impossible to save."""

    def __init__(self) -> None:
        self.optimizer = SimpleNamespace(allocated_bytes=lambda: 8)
        self.error: Exception | None = None
        self.resets = 0

    def save_optimizer(self, path):
        if self.error is not None:
            raise self.error
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"moments")

    def rolled_back(self):
        self.resets += 1


@pytest.fixture
def trainer():
    return Trainer()


@pytest.fixture
def attachment(model, tmp_path):
    weights = WeightState.create(tmp_path / "weights.state", "0" * 32)
    manifest = SimpleNamespace(model_path=str(tmp_path / "checkpoint"))
    return SimpleNamespace(views=model.views, weights=weights, manifest=manifest)


@pytest.fixture
def start_worker(tmp_path, monkeypatch):
    """Makes savers of a checkpoint: workers, one after the other."""
    monkeypatch.setattr("hogwild.tasks.saving.record_sync", lambda *_: None)
    monkeypatch.setattr("hogwild.tasks.saving.record_undo", lambda *_: None)
    monkeypatch.setattr("hogwild.tasks.saving.record_failed_sync", lambda *_: None)
    debounce = {"sync_quiet_s": 0, "sync_max_age_s": 0}
    settings = SimpleNamespace(data_dir=tmp_path / "data", model_name="m", model_slug="m", **debounce)
    started = []

    def start(store):
        started.append(Saver(settings, store=store, dirty=Nobody(), operations=Nobody(), registry=Nobody()))
        return started[-1]

    yield start
    for saver in started:
        saver.close()


@pytest.fixture
def saver(store, start_worker):
    return start_worker(store)


def step(attachment, amount=1):
    """A training step, as the worker does it."""
    attachment.weights.begin()
    attachment.views["embed.weight"] += amount
    attachment.views["head.weight"] += amount
    attachment.weights.applied()


def synced_and_forgotten(saver, attachment, trainer, model, tmp_path):
    """Two generations, and a vLLM that was started again and loaded the first of them."""
    old = model.copy()
    step(attachment)
    saver.sync(attachment, trainer, "due")
    learned = model.copy()
    for name, view in attachment.views.items():
        view.copy_(old[name])
    attachment.weights = WeightState.create(tmp_path / "again.state", "1" * 32)
    return learned


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), SafetensorError("IoError: no space left on device")]
)
def test_optimizer_state_that_can_not_be_saved_does_not_end_all_later_syncs(saver, attachment, trainer, error):
    step(attachment)
    trainer.error = error
    with pytest.raises((CheckpointError, OSError)):
        saver.sync(attachment, trainer, "due")
    assert saver.error["failures"] == 1
    # When there is space again
    trainer.error = None
    saver.sync(attachment, trainer, "due")
    assert saver.store.head.generation == 1 and saver.error is None
    assert saver.store.verify(attachment.views).ok


def test_fresh_weights_get_the_last_generation(saver, attachment, trainer, model, tmp_path, helpers):
    learned = synced_and_forgotten(saver, attachment, trainer, model, tmp_path)
    saver.bring_together(attachment)
    helpers.assert_equal(model.views, learned)
    weights = attachment.weights
    assert (weights.version, weights.untouched, weights.restoring) == (1, False, False)


def test_fresh_weights_that_are_the_last_generation_stay_untouched(saver, attachment, trainer):
    saver.bring_together(attachment)
    assert attachment.weights.untouched and not attachment.weights.restoring


def test_an_export_keeps_the_last_generation_out_of_the_files(saver, attachment, trainer, model, tmp_path, helpers):
    """Given a reader beside a sync, and a vLLM that loads what the files hold then: the generation before."""
    saver.store._readers._patience = 0.1
    reader = FileLock(saver.store.directory / ".hogwild/readers.lock")
    assert reader.acquire(shared=True)
    learned = synced_and_forgotten(saver, attachment, trainer, model, tmp_path)
    # When the worker attaches while the reader reads on, then nothing is taken for newer than it is
    for _ in range(2):
        with pytest.raises(CheckpointError, match="is being read"):
            saver.bring_together(attachment)
    # ... and when it is done, what was learned is put back
    reader.release()
    saver.bring_together(attachment)
    helpers.assert_equal(model.views, learned)
    assert attachment.weights.version == 1
    assert saver.store.verify(attachment.views).ok


@pytest.mark.parametrize("served", ["the checkpoint", "its origin"])
def test_a_restore_that_was_cut_short_is_done_again(
    saver, attachment, trainer, model, tmp_path, helpers, monkeypatch, served
):
    learned = synced_and_forgotten(saver, attachment, trainer, model, tmp_path)
    if served == "its origin":
        attachment.manifest.model_path = str(model.directory)
    # Given a worker that is killed when one tensor of two is in the live weights
    write, written = views.write_blocks, []

    def killed(*args):
        if written:
            raise KeyboardInterrupt
        write(*args)
        written.append(args[0].name)

    with monkeypatch.context() as patched:
        patched.setattr(views, "write_blocks", killed)
        with pytest.raises(KeyboardInterrupt):
            saver.bring_together(attachment)
    assert written
    # When the next one attaches, then nobody takes the mixture for training
    saver.bring_together(attachment)
    helpers.assert_equal(model.views, learned)
    assert (attachment.weights.version, attachment.weights.restoring) == (1, False)


@pytest.mark.parametrize("by", ["a tick", "a running job", "a sync with nothing new"])
@pytest.mark.parametrize("dense", [False, True])
def test_a_generation_gets_into_the_files_when_the_reader_is_done(saver, attachment, trainer, io, by, dense):
    """Given an export beside the last sync, and no training after it."""
    step(attachment)
    if dense:
        for view in attachment.views.values():
            view.add_(1)
    saver.store._readers._patience = 0
    directory = saver.store.directory
    reader = CheckpointStore.open(directory, read_only=True, io=io, reader_patience=0)

    def look():
        if by == "a sync with nothing new":
            saver.sync(attachment, trainer, "due")
        else:
            saver.sync_if_due(attachment, trainer, wait=by == "a tick")
            saver._join()

    with reader.reading():
        saver.sync(attachment, trainer, "due")
        look()
        assert saver.store.unfinished and saver.error is None
    with pytest.raises(CheckpointError, match="not completely in its files"):
        reader.verify()
    # When the worker looks again, then others can read the generation
    look()
    assert reader.verify().ok and reader.head.generation == 1
    assert saver.store.verify(attachment.views).ok
    assert saver.last["applied"]


def test_a_generation_that_did_not_get_into_the_files_for_an_error_gets_there(
    saver, attachment, trainer, monkeypatch
):
    step(attachment)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(store_module, "apply", full)
        patched.setattr(store_module, "apply_again", full)
        with pytest.raises(CheckpointError, match="disk is full"):
            saver.sync(attachment, trainer, "due")
        saver.sync(attachment, trainer, "due")
        assert (saver.error["failures"], saver.store.unfinished) == (2, True)
    saver.sync(attachment, trainer, "due")
    assert saver.error is None
    assert saver.store.verify(attachment.views).ok


def test_a_rollback_beside_a_reader_changes_nothing(saver, attachment, trainer, model, helpers):
    step(attachment)
    saver.sync(attachment, trainer, "due")
    learned = model.copy()
    saver.store._readers._patience = 0.1
    with CheckpointStore.open(saver.store.directory, read_only=True).reading():
        with pytest.raises(CheckpointError, match=r"is being read.*nothing was changed"):
            saver.rollback(attachment, trainer, 0, after=lambda: None)
        assert saver.store.head.generation == 1
        helpers.assert_equal(model.views, learned)
        assert (attachment.weights.version, attachment.weights.restoring, trainer.resets) == (1, False, 0)
    saver.rollback(attachment, trainer, 0, after=lambda: None)
    assert saver.store.head.generation == 2
    assert saver.store.verify(attachment.views).ok
    assert (attachment.weights.version, attachment.weights.restoring, trainer.resets) == (2, False, 1)


def test_a_rollback_that_fails_in_the_live_weights_is_finished_by_the_next_sync(
    saver, attachment, trainer, model, helpers, monkeypatch
):
    before = model.copy()
    step(attachment)
    saver.sync(attachment, trainer, "due")

    def unreadable(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(views, "write_blocks", unreadable)
        with pytest.raises(OSError, match="Input/output"):
            saver.rollback(attachment, trainer, 0, after=lambda: None)
        with pytest.raises(OSError, match="Input/output"):
            saver.sync(attachment, trainer, "due")
    assert (attachment.weights.version, trainer.resets) == (2, 1)
    saver.sync(attachment, trainer, "due")
    helpers.assert_equal(model.views, before)
    assert (saver.store.head.generation, attachment.weights.version, attachment.weights.restoring) == (2, 2, False)


def test_a_worker_killed_in_a_rollback_leaves_it_to_the_next(saver, attachment, trainer, model, helpers, monkeypatch):
    before = model.copy()
    step(attachment)
    saver.sync(attachment, trainer, "due")
    rollback = saver.store.rollback
    killed = copy.copy(attachment.weights)
    for name in ("set_version", "restored"):
        monkeypatch.setattr(attachment.weights, name, lambda *_: None)  # a killed worker does no more

    def on_disk_only(generation, views, **options):
        rollback(generation, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(saver.store, "rollback", on_disk_only)
    with pytest.raises(KeyboardInterrupt):
        saver.rollback(attachment, trainer, 0, after=lambda: None)
    attachment.weights = killed
    assert (killed.version, saver.store.head.weight_version) == (1, 2)
    saver.bring_together(attachment)
    helpers.assert_equal(model.views, before)
    assert killed.version == 2


# --- verifying --------------------------------------------------------------------------------------------------------


class Finished:
    """An operation's end."""

    def __init__(self, saver) -> None:
        self.result = self.error = None
        saver._operations = self

    def finish(self, operation, result=None, error=None):
        self.result, self.error = result, error


@pytest.mark.parametrize("wait", [True, False])
def test_verify_compares_files_and_live_weights(saver, attachment, trainer, wait):
    end = Finished(saver)

    def verify():
        saver.verify(attachment, "op", wait=wait)
        while saver.busy:  # reading, or reporting it
            time.sleep(0.01)
        return end.result

    step(attachment)
    saver.sync(attachment, trainer, "due")
    result = verify()
    assert (result["ok"], result["unsaved"], result["generation"]) == (True, False, 1)
    assert result["blocks_checked"] > result["live_blocks_checked"] > 10  # a tensor is not live
    # Steps that are not saved are said, and are no damage
    step(attachment)
    result = verify()
    assert (result["ok"], result["unsaved"]) == (True, True)
    assert (result["weight_version"], result["live_version"]) == (1, 2)
    assert result["live"].keys() == {"embed.weight", "head.weight"}
    # ... while a byte on the disk is
    path = saver.store.directory / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    assert not verify()["ok"] and sum(end.result["disk"].values()) == 1


def test_verify_finds_live_weights_that_changed_without_a_step(saver, attachment, trainer, model):
    end = Finished(saver)
    step(attachment)
    saver.sync(attachment, trainer, "due")
    attachment.views["embed.weight"][0] += 1
    saver.verify(attachment, "op")
    assert (end.result["ok"], end.result["unsaved"], end.result["live"]) == (False, False, {"embed.weight": 1})
    report = VerifyReport(**{field.name: end.result[field.name] for field in fields(VerifyReport)})
    with pytest.raises(CheckpointError, match=r"1 blocks in the live weights.*No step was counted"):
        report.raise_for_mismatch()
    # Both ways out that the message names lead to weights that are the last generation
    saver.rollback(attachment, trainer, 1, after=lambda: None)
    saver.verify(attachment, "op")
    assert not end.result["live"]
    attachment.views["embed.weight"][0] += 1
    saver.sync(attachment, trainer, "asked for", operation="op")
    saver.verify(attachment, "op")
    assert end.result["ok"] and end.result["generation"] == 2


def test_verify_says_why_it_can_not(saver, attachment, trainer):
    end = Finished(saver)
    attachment.weights.begin_restore()
    with pytest.raises(CheckpointError, match="only partly in the live weights"):
        saver.verify(attachment, "op")
    assert "only partly" in end.error.message


# --- generations that were made while no worker ran -------------------------------------------------------------------


def edit_files(directory):
    """Something else changes a weight file."""
    path = directory / "model-00001-of-00002.safetensors"
    tensors = load_file(path)
    tensors["embed.weight"] += 3
    save_file(tensors, path, metadata={"format": "pt"})


def offline(directory, io, doing):
    with CheckpointStore.open(directory, keep_last=sys.maxsize, io=io) as store:
        if doing == "adopt":
            edit_files(directory)
            store.adopt()
        else:
            store.rollback(1)
        return store.head


@pytest.fixture
def trained(saver, attachment, trainer):
    """Two generations of training in a vLLM that lives on, whose worker is gone."""
    saver.bring_together(attachment)
    for _ in range(2):
        step(attachment)
        saver.sync(attachment, trainer, "due")
    assert attachment.weights.generation_in(saver.store.directory) == 2
    saver.close()
    return saver.store.directory


@pytest.mark.parametrize("unsaved", [False, True])
@pytest.mark.parametrize("doing", ["adopt", "rollback"])
def test_live_weights_follow_what_was_adopted_or_rolled_back_while_no_worker_ran(
    trained, start_worker, attachment, trainer, model, io, helpers, doing, unsaved
):
    if unsaved:
        step(attachment)  # of a worker that was killed before its last sync
    live, version = model.copy(), attachment.weights.version
    made = offline(trained, io, doing)
    assert (made.generation, made.weight_version) == (3, 3)  # other weights than version 2
    wanted = helpers.weights_on_disk(trained)
    # When a worker attaches
    again = start_worker(CheckpointStore.open(trained, io=io))
    assert again.bring_together(attachment) == version
    # Then the live weights are what was adopted or rolled back to, and so are the files after the next sync
    del wanted["rotary.inv_freq"]
    helpers.assert_equal(model.views, wanted)
    assert attachment.weights.version > version
    assert attachment.weights.version == again.store.head.weight_version
    again.sync(attachment, trainer, "due")
    assert again.store.verify(attachment.views).ok
    # ... and what only the live weights held is a generation
    kept = {g.generation: g for g in again.store.generations()}
    if doing == "rollback" and not unsaved:
        assert again.store.head.generation == 3
        return
    assert (kept[4].kind, kept[4].weight_version, again.store.head.restores) == ("sync", version, 3)
    again.rollback(attachment, trainer, 4, after=lambda: None)
    helpers.assert_equal(model.views, live)
    # ... which no later worker takes back
    again.close()
    last = start_worker(CheckpointStore.open(trained, io=io))
    last.bring_together(attachment)
    helpers.assert_equal(model.views, live)


@pytest.mark.parametrize("place", ["rollback", "restore"])
def test_following_what_was_made_offline_is_done_again_when_it_is_cut_short(
    trained, start_worker, attachment, trainer, model, io, helpers, monkeypatch, place
):
    step(attachment)
    offline(trained, io, "adopt")
    wanted = helpers.weights_on_disk(trained)
    del wanted["rotary.inv_freq"]
    store = CheckpointStore.open(trained, io=io)

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(store, place, killed)
        with pytest.raises(KeyboardInterrupt):
            start_worker(store).bring_together(attachment)
    store.close()
    again = start_worker(CheckpointStore.open(trained, io=io))
    again.bring_together(attachment)
    helpers.assert_equal(model.views, wanted)
    assert [(g.generation, g.kind) for g in again.store.generations()] == [(3, "adopt"), (4, "sync"), (5, "rollback")]


def test_weights_that_were_trained_beside_another_checkpoint_are_not_taken_back(
    trained, start_worker, attachment, model, tmp_path, io, helpers
):
    """Given another checkpoint directory for the same live weights, with a rollback in its history."""
    with CheckpointStore.open(tmp_path / "other", source=model.directory, io=io) as other:
        other.sync(model.views, weight_version=1)
        other.rollback(0)
    live = model.copy()
    again = start_worker(CheckpointStore.open(tmp_path / "other", io=io))
    again.bring_together(attachment)
    helpers.assert_equal(model.views, live)


def test_moments_from_before_a_rollback_are_not_loaded(trained, start_worker, attachment, io):
    offline(trained, io, "rollback")
    again = start_worker(CheckpointStore.open(trained, io=io))
    again.bring_together(attachment)
    (trained.parent / "data/optimizer/m@2.safetensors").stat()
    loaded = []
    loader = SimpleNamespace(load_optimizer=lambda path, config: loaded.append(path.name))
    again.load_optimizer(loader, None, attachment.weights.version)
    assert not loaded
    (trained.parent / "data/optimizer/m@3.safetensors").write_bytes(b"moments")
    again.load_optimizer(loader, None, attachment.weights.version)
    assert loaded == ["m@3.safetensors"]
