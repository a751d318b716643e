"""Every architecture of docs/architectures.md on a real card: shared, or refused, as that page says."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM"),
    pytest.mark.timeout(1810),
]
ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "acceptance" / "architectures.py"
PAGE = ROOT / "docs" / "architectures.md"

_spec = importlib.util.spec_from_file_location("architectures", SCRIPT)
assert _spec is not None and _spec.loader is not None
architectures = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(architectures)


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """One run over all models, in a process of its own: vLLM's groups are global."""
    out = tmp_path_factory.mktemp("architectures") / "results.json"
    done = subprocess.run([sys.executable, str(SCRIPT), "--device", "cuda", "--json", str(out)], env=dict(os.environ),
                          capture_output=True, text=True, check=False, timeout=1800)  # fmt: skip
    assert out.exists(), done.stderr[-3000:]
    loaded: dict[str, dict[str, Any]] = json.loads(out.read_text())
    return loaded


@pytest.mark.parametrize("name", architectures.MODELS)
def test_it_trains_or_is_refused_as_expected(name: str, results: dict[str, dict[str, Any]]) -> None:
    assert architectures.wrong("cuda", name, results[name]) == []


def test_the_page_says_what_the_run_found(results: dict[str, dict[str, Any]]) -> None:
    """But for the last column: another vLLM's messages may be worded in another way."""
    page = PAGE.read_text().partition("<!-- cuda begin -->\n")[2].partition("<!-- cuda end -->")[0]
    texts = (page, architectures.table(results))
    said, found = ([line.split(" | ")[:7] for line in text.splitlines()] for text in texts)
    assert said == found, "run tests/acceptance/architectures.py --device cuda --table docs/architectures.md"
