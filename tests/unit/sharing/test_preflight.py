"""Every refusal, provoked; and the set-ups that must not be refused."""

from typing import Any

import pytest

from hogwild.preflight import CHECKS, Facts, environment_facts, options_freeze, problems

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("platform", {"device": "rocm"}, "not on rocm"),
    ("quantised", {"quantization": "fp8"}, "quantised (fp8)"),
    ("sleep-mode", {"sleep_mode": True}, "--enable-sleep-mode"),
    ("sleep-mode", {"cumem_allocator": True}, "--enable-cumem-allocator"),
    ("expandable-segments", {"allocator_config": "backend:native, expandable_segments:True"}, "expandable_segments"),
    ("freezing", {"freezing": True}, "TORCHINDUCTOR_FREEZING"),
    ("moe-backend", {"moe": True, "moe_backend": "flashinfer_cutlass"}, "--moe-backend triton"),
    ("moe-on-cpu", {"moe": True, "device": "cpu"}, "serve it on a GPU"),
    ("loader", {"load_format": "dummy"}, "--load-format dummy"),
    ("loader", {"load_format": "runai_streamer", "default_loader": False}, "--load-format runai_streamer"),
    ("loader", {"remote_weights": "s3://bucket/model"}, "s3://bucket/model"),
    ("no-safetensors", {"checkpoint_files": ("config.json", "pytorch_model.bin")}, "pytorch_model.bin"),
    ("no-safetensors", {"checkpoint_files": ("config.json",)}, "no weight files"),
    ("dtype", {"checkpoint_dtype": "bfloat16", "serving_dtype": "float32"}, "--dtype bfloat16"),
    ("overrides", {"config_override": "--hf-overrides"}, "write the change into config.json"),
    ("offload", {"cpu_offload_gb": 4.0}, "--cpu-offload-gb"),
    ("parallel", {"pipeline_parallel_size": 2}, "--pipeline-parallel-size 1"),
    ("parallel", {"data_parallel_size": 2}, "--data-parallel-size 1"),
    ("parallel", {"prefill_context_parallel_size": 2}, "--prefill-context-parallel-size 1"),
    ("parallel", {"eplb": True}, "--enable-eplb"),
    ("parallel", {"expert_parallel": True}, "--enable-expert-parallel"),
]


@pytest.mark.parametrize(("check", "facts", "says"), REFUSED)
def test_refused_by_name_with_what_to_do(check: str, facts: dict[str, Any], says: str) -> None:
    found = problems(Facts(**facts))
    assert [problem.check for problem in found] == [check]
    assert says in found[0].message


def test_every_check_is_provoked_above() -> None:
    assert {check for check, _, _ in REFUSED} == set(CHECKS)


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"device": "cpu", "allocator_config": "expandable_segments:True"},
        {"quantization": "none"},
        {"moe": True, "moe_backend": "triton"},
        {"moe": True, "moe_backend": "auto"},
        {"allocator_config": "expandable_segments:False"},
        {"checkpoint_dtype": "bfloat16", "serving_dtype": "bfloat16"},
        {"checkpoint_files": ("config.json", "model-00001-of-00002.safetensors", "old.bin")},
    ],
)
def test_not_refused(facts: dict[str, Any]) -> None:
    assert problems(Facts(**facts)) == []


def test_everything_wrong_is_told_at_once() -> None:
    assert len(problems(Facts(quantization="awq", sleep_mode=True, pipeline_parallel_size=4))) == 3


def test_facts_of_the_environment() -> None:
    facts = environment_facts({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "TORCHINDUCTOR_FREEZING": "1"})
    assert {p.check for p in problems(Facts(**facts))} == {"expandable-segments", "freezing"}  # type: ignore[arg-type]
    assert problems(Facts(**environment_facts({"PYTORCH_ALLOC_CONF": "", "TORCHINDUCTOR_FREEZING": "0"}))) == []  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "device", "freezes"),
    [
        ({}, "cpu", False), ({"max_autotune": True}, "cpu", True), ({"max_autotune": False}, "cpu", False),
        ({"max_autotune": True}, "cuda", False), ({"freezing": True}, "cuda", True),
    ],
)  # fmt: skip
def test_freezing_by_vllms_own_configuration(options: dict[str, Any], device: str, freezes: bool) -> None:
    assert options_freeze(options, device) is freezes
