"""What must not cost a torch import: the API, the client and the command line use these."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hogwild


@pytest.mark.parametrize(
    "module",
    ["hogwild.manifest", "hogwild.weight_state", "hogwild.frontend", "hogwild.preflight", "hogwild.strided",
     "hogwild.runtime_files", "hogwild.cli.doctor", "hogwild.cli.weights", "hogwild.vllm_plugin"],
)  # fmt: skip
def test_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit(any(n in sys.modules for n in ('torch', 'vllm', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("module", ["hogwild.gpu_worker.attach", "hogwild.gpu_worker.model"])
def test_the_worker_side_knows_nothing_of_the_service(module: str) -> None:
    code = f"import sys, {module}; sys.exit(any(n in sys.modules for n in ('celery', 'redis', 'fastapi', 'vllm')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_only_two_files_import_vllm() -> None:
    """And one of them replaces functions of vLLM: a new version of it is read for those (docs/sharing.md)."""
    found = set()
    folders = os.walk(Path(hogwild.__file__).parent, followlinks=True)  # some of the packages are links
    for path in (Path(folder, name) for folder, _, names in folders for name in names if name.endswith(".py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            if any(name.split(".")[0] == "vllm" for name in names):
                found.add(f"{path.parent.name}/{path.name}")
    assert found == {"vllm_plugin/hooks.py", "vllm_plugin/stats.py"}
