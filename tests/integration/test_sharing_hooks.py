"""The plugin inside vLLM: whatever goes wrong with us, vLLM serves; what can't be shared is refused by name.

One process loads tiny models through vLLM's own loader, each time with another fault (support/vllm_faults.py).
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")
SCRIPT = Path(__file__).parent / "support" / "vllm_faults.py"
Rows = dict[str, dict[str, Any]]
pytestmark = pytest.mark.timeout(610)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    base = tmp_path_factory.mktemp("faults")
    done = subprocess.run([sys.executable, str(SCRIPT), str(base)], capture_output=True, text=True, check=False,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=600)  # fmt: skip
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0, done.stderr[-3000:]
    return {row["case"]: row for row in found}


def log(row: dict[str, Any]) -> str:
    return "\n".join(row["log"])


def test_without_a_fault_everything_is_shared(rows: Rows) -> None:
    row = rows["fine"]
    assert row["served"]
    assert row["manifest"]
    assert row["shared"] == 21
    assert row["refused"] is None
    assert "can be trained while it is served: 21 shared" in log(row)


def test_registering_starts_no_thread(rows: Rows) -> None:
    assert rows["registered"]["threads"] == []


def test_nothing_of_the_trace_is_left_after_the_load(rows: Rows) -> None:
    assert rows["fine"]["traces"] == 0
    assert rows["fine"]["threads"] == []


INJECTED = [
    "load_model before", "load_weights rehome", "get_all_weights seen", "trace copy", "trace other", "hash", "cpu gemm",
    "load_model after", "manifest write", "refusal write too", "runtime directory", "settings",
]  # fmt: skip


@pytest.mark.parametrize("case", INJECTED)
def test_our_error_at_a_hook_leaves_vllm_serving(case: str, rows: Rows) -> None:
    row = rows[case]
    assert row.get("error") is None
    assert row["served"]
    assert not row["manifest"]  # half a map is no map
    assert row["threads"] == []
    assert row["traces"] == 0
    assert "training is off" in log(row)


@pytest.mark.parametrize("case", INJECTED[:9])
def test_our_error_is_reported_where_the_worker_looks(case: str, rows: Rows) -> None:
    assert rows[case]["refused"] == ["internal"]


def test_our_error_in_the_api_server_leaves_it_serving(rows: Rows) -> None:
    assert rows["load_endpoint_plugins"]["served"]
    assert "no routes on vLLM's port" in log(rows["load_endpoint_plugins"])
    assert rows["routes"]["served"]
    assert "vLLM serves without" in log(rows["routes"])
    assert "was not published" in log(rows["routes"])


def test_installing_twice_wraps_once(rows: Rows) -> None:
    assert rows["installed twice"]["depth"] == 1
    assert rows["installed twice"]["shared"] == 21


def test_a_missing_hook_turns_training_off_and_says_which_vllm_is_supported(rows: Rows) -> None:
    row = rows["hook missing"]
    assert row["installed"] is False
    assert "get_all_weights is missing" in log(row)
    assert "supports vLLM 0.26 to 0.33" in log(row)


def test_a_changed_signature_turns_training_off(rows: Rows) -> None:
    row = rows["hook changed"]
    assert row["installed"] is False
    assert row["served"]
    assert not row["manifest"]
    assert "load_weights(self, m, c) should begin with (self, model, model_config)" in log(row)


def test_switched_off(rows: Rows) -> None:
    assert rows["disabled"]["installed"] is False
    assert rows["disabled"]["served"]
    assert not rows["disabled"]["manifest"]


@pytest.mark.parametrize("case", ["weights reloaded by vLLM's loader", "weights reloaded in place"])
def test_weights_that_vllm_reloads_end_the_export_and_are_served(case: str, rows: Rows) -> None:
    row = rows[case]
    assert row.get("error") is None
    assert row["served"]
    assert not row["manifest"]
    assert "sharing ends until vLLM is restarted" in log(row)


def test_a_reload_leaves_the_manifest_of_another_export(rows: Rows) -> None:
    row = rows["weights reloaded after another export"]
    assert row.get("error") is None
    assert row["manifest"]


def test_what_post_processing_computes_from_a_weight_makes_that_derived(rows: Rows) -> None:
    row = rows["computed in post-processing"]
    assert row["norm"] == ["derived", "vLLM serves it through model.norm.A, computed by exp"]
    assert row["shared"] == 20
    assert row["traces"] == 0


def test_a_draft_model_beside_is_left_alone(rows: Rows) -> None:
    row = rows["draft model beside"]
    assert row.get("error") is None
    assert row["manifest"]


def test_a_draft_model_under_a_configuration_of_its_own_is_left_alone(rows: Rows) -> None:
    row = rows["draft model under a configuration of its own"]
    assert row.get("error") is None
    assert row["manifest"]
    assert not row["written"]


def test_a_target_that_is_called_its_own_draft_is_shared(rows: Rows) -> None:
    row = rows["n-grams instead of a draft model"]
    assert row.get("error") is None
    assert row["written"]


def test_a_checkpoint_of_another_dtype_is_refused(rows: Rows) -> None:
    row = rows["checkpoint of another dtype"]
    assert row["refused"] == ["dtype"]
    assert not row["manifest"]
    assert "start vLLM with --dtype bfloat16" in log(row)


@pytest.mark.parametrize("case", ["beside another vLLM", "refused beside another vLLM"])
def test_a_second_vllm_takes_nothing_from_the_first(case: str, rows: Rows) -> None:
    row = rows[case]
    assert row.get("error") is None
    assert row["kept"]
    assert not row["reported"]
    assert (f"another vLLM (pid {row['pid']}) shares its weights" in log(row)) != case.startswith("refused")


def test_a_checkpoint_without_safetensors_is_refused(rows: Rows) -> None:
    row = rows["only .bin files"]
    assert row["served"]
    assert row["refused"] == ["no-safetensors"]
    assert "save_pretrained" in log(row)


@pytest.mark.parametrize(
    ("case", "check"),
    [("only .bin files, from the hub", "no-safetensors"), ("another dtype, from the hub", "dtype")],
)
def test_a_checkpoint_that_vllm_downloads_is_looked_at_after_that(case: str, check: str, rows: Rows) -> None:
    assert rows[case]["served"]
    assert rows[case]["refused"] == [check]
    assert not rows[case]["manifest"]
    assert rows["from the hub"]["shared"] == 21


def test_a_directory_without_a_readable_config_is_refused_at_once(rows: Rows) -> None:
    row = rows["no readable config.json"]
    assert row["served"]
    assert row["refused"] == ["config"]
    assert "m is not a readable checkpoint" in log(row)


@pytest.mark.parametrize("case", ["another epsilon", "changed by a function", "another config.json"])
def test_a_model_that_is_not_that_of_its_config_json_is_refused(case: str, rows: Rows) -> None:
    assert rows[case].get("error") is None
    assert rows[case]["refused"] == ["overrides"]
    assert rows["its own config.json"]["shared"] == 21


def test_an_engine_of_several_is_known_although_vllm_says_it_is_the_only_one(rows: Rows) -> None:
    row = rows["one of two data-parallel engines"]
    assert row.get("error") is None
    assert (row["left"], row["engines"]) == (1, 2)


def test_freezing_by_vllms_own_configuration_is_refused(rows: Rows) -> None:
    assert rows["max_autotune on a CPU"]["served"]
    assert rows["max_autotune on a CPU"]["refused"] == ["freezing"]
