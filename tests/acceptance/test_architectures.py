"""Every architecture of docs/architectures.md is shared, or refused, as that page says."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("architectures.py")
PAGE = ROOT / "docs" / "architectures.md"

_spec = importlib.util.spec_from_file_location("architectures", SCRIPT)
assert _spec is not None and _spec.loader is not None
architectures = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(architectures)

pytestmark = pytest.mark.timeout(1210)


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """One run over all models, in a process of its own: vLLM's groups are global."""
    out = tmp_path_factory.mktemp("architectures") / "results.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(SCRIPT), "--json", str(out)], env=environment, capture_output=True,
                          text=True, check=False, timeout=1200)  # fmt: skip
    assert out.exists(), done.stderr[-3000:]
    loaded: dict[str, dict[str, Any]] = json.loads(out.read_text())
    return loaded


@pytest.mark.parametrize("name", architectures.MODELS)
def test_it_trains_or_is_refused_as_expected(name: str, results: dict[str, dict[str, Any]]) -> None:
    assert architectures.wrong("cpu", name, results[name]) == []


def test_the_page_says_what_the_run_found(results: dict[str, dict[str, Any]]) -> None:
    page = PAGE.read_text().partition("<!-- cpu begin -->\n")[2].partition("<!-- cpu end -->")[0]
    assert page == architectures.table(results), "run tests/acceptance/architectures.py --table docs/architectures.md"
