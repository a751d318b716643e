"""The weight state as several processes see it."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hogwild.errors import ManifestError
from hogwild.weight_state import SIZE, WeightState

ID = "0123456789abcdef" * 2


def test_a_fresh_state(tmp_path: Path) -> None:
    state = WeightState.create(tmp_path / "weights.state", ID)
    assert (state.version, state.begun, state.torn, state.untouched, state.export_id) == (0, 0, False, True, ID)
    assert (tmp_path / "weights.state").stat().st_mode & 0o777 == 0o600


def test_a_step_from_begin_to_applied_as_another_mapping_sees_it(tmp_path: Path) -> None:
    writer = WeightState.create(tmp_path / "weights.state", ID)
    reader = WeightState.open(tmp_path / "weights.state")

    assert writer.begin() == 1
    assert (reader.version, reader.begun, reader.torn, reader.untouched) == (0, 1, True, False)
    assert writer.applied() == 1
    assert (reader.version, reader.begun, reader.torn) == (1, 1, False)
    writer.set_version(7)
    assert (reader.version, reader.begun) == (7, 7)


def test_counting_on_from_a_checkpoint_is_no_write(tmp_path: Path) -> None:
    state = WeightState.create(tmp_path / "weights.state", ID)
    state.set_version(40)
    assert state.untouched
    state.touch()
    assert not state.untouched


def test_worker_killed_within_a_step_leaves_it_torn(tmp_path: Path) -> None:
    path = tmp_path / "weights.state"
    state = WeightState.create(path, ID)
    code = f"""
import os
from pathlib import Path
from hogwild.weight_state import WeightState
s = WeightState.open(Path({str(path)!r})); s.begin(); s.applied(); s.begin(); os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    assert (state.version, state.begun, state.torn) == (1, 2, True)


def test_a_new_export_leaves_the_old_mapping_alone(tmp_path: Path) -> None:
    old = WeightState.create(tmp_path / "weights.state", ID)
    new = WeightState.create(tmp_path / "weights.state", "f" * 32)
    new.begin()
    assert old.untouched
    assert old.export_id == ID
    assert old.inode != new.inode


def test_what_is_not_a_weight_state(tmp_path: Path) -> None:
    path = tmp_path / "weights.state"
    with pytest.raises(ManifestError, match="can't open"):
        WeightState.open(path)
    path.write_bytes(b"short")
    with pytest.raises(ManifestError, match="is 5 bytes"):
        WeightState.open(path)
    path.write_bytes(bytes(SIZE))
    with pytest.raises(ManifestError, match="not a weight state"):
        WeightState.open(path)


def test_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    WeightState.create(tmp_path / "weights.state", ID)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(ManifestError, match="belongs to user"):
        WeightState.open(tmp_path / "weights.state")


def test_close_can_be_followed_by_a_new_open(tmp_path: Path) -> None:
    WeightState.create(tmp_path / "weights.state", ID).close()
    assert WeightState.open(tmp_path / "weights.state").version == 0


def test_which_generation_the_weights_come_from(tmp_path: Path) -> None:
    state = WeightState.create(tmp_path / "weights.state", ID)
    assert state.generation_in(tmp_path) is None
    for generation in (0, 99_999_999):
        state.note_generation(tmp_path, generation)
        with contextlib.closing(WeightState.open(tmp_path / "weights.state")) as other:
            assert other.generation_in(tmp_path / ".") == generation
            assert other.generation_in(tmp_path / "another") is None
    assert (state.version, state.untouched, state.restoring) == (0, True, False)
    state.close()
