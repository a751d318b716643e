"""The worker's syncs, rollbacks and attaching, on a real checkpoint and a real weight state."""

import errno
import os
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError

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

    def reset_optimizer(self):
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
