"""The compose file: what can be told without running it."""

import os
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

from hogwild.checkpoint.store import CheckpointStore

COMPOSE = Path(__file__).parents[3] / "docker" / "compose.yaml"


def test_worker_and_vllm_outlive_each_other_in_namespaces_of_neither() -> None:
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    for kind in ("pid", "ipc"):
        assert services["vllm"][kind] == services["worker"][kind] == "service:namespaces"
    owner = services["namespaces"]
    assert "pid" not in owner
    assert owner["ipc"] == "shareable"
    assert owner["image"] == services["redis"]["image"]  # none more to download


def test_prepare_runs_again_beside_the_worker_and_forgets_nothing(tmp_path: Path) -> None:
    model, directory, other = tmp_path / "m", tmp_path / "checkpoint", tmp_path / "other"
    for folder in (model, other):
        folder.mkdir()
        save_file({"w": torch.randn(8, 8)}, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")

    def prepare(source: Path) -> subprocess.CompletedProcess[str]:
        env = os.environ | {"HOGWILD_CHECKPOINT_DIR": str(directory), "HOGWILD_SERVED_MODEL_NAME": "m"}
        argv = [sys.executable, str(COMPOSE.with_name("prepare.py")), str(source)]
        return subprocess.run(argv, env=env, capture_output=True, text=True, check=False)

    assert prepare(model).returncode == 0
    with CheckpointStore.open(directory, keep_last=99) as store:
        for version in range(1, 13):
            store.sync({"w": torch.full((8, 8), float(version))}, weight_version=version)
        assert prepare(model).returncode == 0
        refused = prepare(other)
        assert refused.returncode == 1
        assert "another model" in refused.stderr
    assert prepare(model).returncode == 0
    with CheckpointStore.open(directory, read_only=True) as store:
        assert len(store.generations()) == 13
