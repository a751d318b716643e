"""One load of the plugin's: the memory it touches, and what it leaves in the runtime directory."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from hogwild.preflight import Facts
from hogwild.vllm_plugin import hooks
from hogwild.vllm_plugin.hooks import Load
from hogwild.weight_state import WeightState


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    monkeypatch.setattr(hooks, "tensor_parallel", lambda: (0, 1))
    return Load(SimpleNamespace(model="/models/m", served_model_name=["m"]), tmp_path)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_only_a_model_that_is_served_on_the_cpu_moves_into_shared_memory(device: str, load: Load) -> None:
    """On a GPU a parameter in host memory may have been mapped there by its address when the model was built."""
    model = nn.Module()
    model.register_parameter("host", nn.Parameter(torch.ones(4, 4), requires_grad=False))
    address = model.host.data_ptr()
    load.facts = Facts(device=device)
    load.prepare(model)
    load.release()
    assert (model.host.data_ptr() == address) == (device == "cuda")
    assert model.host.eq(1).all()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_new_load_voids_the_weight_version_of_the_one_before(tmp_path: Path, rank: int) -> None:
    state, manifest = tmp_path / "weights.state", tmp_path / f"rank{rank}.json"
    WeightState.create(state, "0" * 32).close()
    manifest.touch()
    load: Any = SimpleNamespace(runtime_dir=tmp_path, rank=rank)
    Load.void(load)
    assert not manifest.exists()
    assert state.exists() == (rank != 0)  # the first rank writes it
