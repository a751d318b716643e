"""What make's targets leave alone."""

import subprocess
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parents[3] / "Makefile"


@pytest.mark.parametrize("target", ["clean", "distclean"])
def test_no_checkpoint_is_cleaned_away(target: str, tmp_path: Path) -> None:
    kept = tmp_path / ".hogwild" / "checkpoints" / "m" / "model.safetensors"
    for file in (kept, tmp_path / ".hogwild" / "demo" / "file", tmp_path / "build" / "file"):
        file.parent.mkdir(parents=True)
        file.touch()
    subprocess.run(["make", "-f", MAKEFILE, "-C", tmp_path, target], check=True, capture_output=True)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [kept]
