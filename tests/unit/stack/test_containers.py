"""The compose file: what can be told without running it."""

from pathlib import Path

import yaml

COMPOSE = Path(__file__).parents[3] / "docker" / "compose.yaml"


def test_worker_and_vllm_outlive_each_other_in_namespaces_of_neither() -> None:
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    for kind in ("pid", "ipc"):
        assert services["vllm"][kind] == services["worker"][kind] == "service:namespaces"
    owner = services["namespaces"]
    assert "pid" not in owner
    assert owner["ipc"] == "shareable"
    assert owner["image"] == services["redis"]["image"]  # none more to download
