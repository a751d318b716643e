"""What the run over all architectures calls wrong: each way in which a model can miss what is expected of it."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
_spec = importlib.util.spec_from_file_location("architectures", ROOT / "tests" / "acceptance" / "architectures.py")
assert _spec is not None and _spec.loader is not None
architectures = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(architectures)

GOOD: dict[str, Any] = {
    "result": "trains", "why": "", "difference": 0.0, "not_served": [], "forgotten": [], "verified": 21, "shared": 21,
}  # fmt: skip


def test_a_model_that_trains_as_expected() -> None:
    assert architectures.wrong("cpu", "llama", GOOD) == architectures.wrong("cuda", "llama", GOOD) == []


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"difference": 1e-7}, "logits differ"),
        ({"difference": float("nan")}, "logits differ"),
        ({"forgotten": ["model.norm.weight"]}, "in no parameter"),
        ({"not_served": ["lm_head.weight"]}, "not what the vLLM module reads"),
        ({"verified": 20}, "20 of 21"),
        ({"verified": 3, "shared": 3}, "3 of 3"),
        ({"result": "vLLM can't load it", "why": "RuntimeError: x"}, "instead of trains"),
        ({"result": "refused by the plugin", "why": "quantised"}, "instead of trains"),
        ({"result": "refused by the worker", "why": "lm_head.weight: derived"}, "instead of trains"),
        ({"result": "failed", "why": "KeyError: x"}, "instead of trains"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], says: str, device: str) -> None:
    (problem,) = architectures.wrong(device, "llama", {**GOOD, **changes})
    assert says in problem


def test_a_refusal_for_another_reason_and_none_at_all_are_wrong() -> None:
    refused = {"result": "refused by the plugin", "why": "the model has experts, and so on"}
    assert architectures.wrong("cpu", "mixtral", refused) == []
    assert architectures.wrong("cpu", "mixtral", {**refused, "why": "quantised"})
    assert architectures.wrong("cpu", "mixtral", GOOD)
    assert architectures.wrong("cuda", "mixtral", refused)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_page_has_what_is_expected(device: str) -> None:
    """Of every model, in this order."""
    page = (ROOT / "docs" / "architectures.md").read_text()
    lines = page.partition(f"<!-- {device} begin -->\n")[2].partition("<!-- ")[0].splitlines()[2:]
    rows = [line.strip("| ").split(" | ") for line in lines]
    exceptions = architectures.EXPECTED[device]
    assert [row[:2] for row in rows] == [[n, exceptions.get(n, architectures.TRAINS)[0]] for n in architectures.MODELS]
    assert {row[6] for row in rows if row[1] == "trains"} == {"equal"}
