"""The worker's syncs, rollbacks and attaching, on a real checkpoint and a real weight state."""

import copy
import errno
import os
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError

from hogwild.checkpoint import views
from hogwild.checkpoint.durable import FileLock
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
def saver(store, tmp_path, monkeypatch):
    monkeypatch.setattr("hogwild.tasks.saving.record_sync", lambda *_: None)
    monkeypatch.setattr("hogwild.tasks.saving.record_undo", lambda *_: None)
    monkeypatch.setattr("hogwild.tasks.saving.record_failed_sync", lambda *_: None)
    settings = SimpleNamespace(data_dir=tmp_path / "data", model_name="m", model_slug="m")
    opened = Saver(settings, store=store, dirty=Nobody(), operations=Nobody(), registry=Nobody())
    yield opened
    opened.close()


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
