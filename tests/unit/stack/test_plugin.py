"""What the plugin leaves in the runtime directory."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hogwild.vllm_plugin.hooks import Load
from hogwild.weight_state import WeightState


@pytest.mark.parametrize("rank", [0, 1])
def test_a_new_load_voids_the_weight_version_of_the_one_before(tmp_path: Path, rank: int) -> None:
    state, manifest = tmp_path / "weights.state", tmp_path / f"rank{rank}.json"
    WeightState.create(state, "0" * 32).close()
    manifest.touch()
    load: Any = SimpleNamespace(runtime_dir=tmp_path, rank=rank)
    Load.void(load)
    assert not manifest.exists()
    assert state.exists() == (rank != 0)  # the first rank writes it
