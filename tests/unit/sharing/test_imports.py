"""What must not cost a torch import: the API, the client and the command line use these."""

import subprocess
import sys

import pytest


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
