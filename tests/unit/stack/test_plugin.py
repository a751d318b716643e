"""One load of the plugin's: the memory it touches, and what it leaves in the runtime directory."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from hogwild.frontend import Frontend
from hogwild.manifest import Manifest, Refusal, manifest_path, refusal_path
from hogwild.preflight import Facts, Problem
from hogwild.runtime_files import boot_id, of_this_program, process_start_time
from hogwild.vllm_plugin import hooks
from hogwild.vllm_plugin.hooks import Load
from hogwild.weight_state import FILE_NAME, WeightState


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    monkeypatch.setattr(hooks, "tensor_parallel", lambda: (0, 1))
    return Load(SimpleNamespace(model="/models/m", served_model_name=["m"]), tmp_path)


def test_weights_are_found_where_vllm_downloaded_them(
    tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hooks, "vllm_version", lambda: "0.32.0")
    snapshot = tmp_path / "models--me--m" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").touch()
    (tmp_path / "models--me--m" / "refs").mkdir()
    (tmp_path / "models--me--m" / "refs" / "main").write_text("0" * 40)
    load.model_config = SimpleNamespace(model="me/m", served_model_name=["m"], revision=None)
    load.download_dir = str(tmp_path)
    assert hooks.checkpoint_path(load.model_config, load.download_dir) == str(snapshot)

    # vLLM downloads the weights there and nothing else.
    load.prepare(nn.Module())
    load.release()
    load.finish(nn.Module())
    refusal = Refusal.load(refusal_path(tmp_path))
    assert refusal is not None
    assert "--local-dir" in refusal.reasons[0][1]


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_only_a_model_that_is_served_on_the_cpu_moves_into_shared_memory(device: str, load: Load) -> None:
    """On a GPU a parameter in host memory may have been mapped there by its address when the model was built."""
    model = nn.Module()
    model.register_parameter("host", nn.Parameter(torch.ones(4, 4), requires_grad=False))
    address = model.host.data_ptr()
    load.facts = Facts(device=device)
    load.prepare(model)
    load.release()
    assert (model.host.data_ptr() == address) == (device == "cuda")
    assert model.host.eq(1).all()


# --- a name that another vLLM has ------------------------------------------------------------------------------------


def manifest_of(pid: int, directory: Path, rank: int = 0) -> Path:
    """What a vLLM with this process shares, with its weight version."""
    path = manifest_path(directory, rank)
    Manifest(
        export_id="ab" * 16, model_path="/models/m", served_model_name="m", vllm_version="", pid=pid, boot_id=boot_id(),
        process_start_time=process_start_time(pid), device="cpu", max_model_len=128, vocab_size=250, dtype="float32",
    ).write(path)  # fmt: skip
    WeightState.create(directory / FILE_NAME, "ab" * 16).close()
    return path


@contextmanager
def process() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        yield child
        child.kill()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_new_load_voids_the_weight_version_of_the_one_before(tmp_path: Path, rank: int, load: Load) -> None:
    with process() as gone:
        manifest = manifest_of(gone.pid, tmp_path, rank)
    load.rank = rank
    assert load.void() is None
    assert not manifest.exists()
    assert (tmp_path / FILE_NAME).exists() == (rank != 0)  # the first rank writes it


def test_a_refused_load_takes_nothing_from_a_vllm_that_shares_its_weights(
    tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hooks, "TAKEOVER_S", 0.2)
    manifest = manifest_of(os.getppid(), tmp_path)
    before = manifest.read_bytes()
    assert load.void() == os.getppid()
    load.refuse([Problem(check="quantised", message="the weights are quantised")])
    assert manifest.read_bytes() == before
    assert (tmp_path / FILE_NAME).exists()
    assert not refusal_path(tmp_path).exists()  # it would say of the other that it shares nothing
    assert "the weights are quantised" in caplog.text


def test_the_other_vllm_is_named_with_what_to_do() -> None:
    assert "another vLLM (pid 17)" in hooks.same_name(17).message
    assert "--served-model-name" in hooks.same_name(17).message


def test_one_that_is_just_ending_is_waited_for(tmp_path: Path, load: Load) -> None:
    with process() as ending:
        manifest = manifest_of(ending.pid, tmp_path)
        assert load.void() == ending.pid
        threading.Timer(0.3, ending.kill).start()
        assert load.void(30.0) is None
    assert not manifest.exists()


def test_an_engine_whose_front_end_was_killed_has_lost_the_name(tmp_path: Path, load: Load) -> None:
    manifest = manifest_of(os.getppid(), tmp_path)
    with process() as front:
        Frontend(
            url="", pid=front.pid, process_start_time=process_start_time(front.pid), token=""
        ).write(tmp_path)  # fmt: skip
        assert load.void() == os.getppid()
    assert load.void() is None
    assert not manifest.exists()


def test_a_front_end_that_was_killed_before_says_nothing_of_a_later_vllm(tmp_path: Path, load: Load) -> None:
    with process() as front:
        Frontend(
            url="", pid=front.pid, process_start_time=process_start_time(front.pid), token=""
        ).write(tmp_path)  # fmt: skip
    manifest_of(os.getppid(), tmp_path)
    assert load.void() == os.getppid()


def test_other_ranks_of_the_same_vllm_are_no_others(tmp_path: Path, load: Load) -> None:
    path = manifest_of(os.getppid(), tmp_path, rank=1)
    load.export_id = Manifest.load(path).export_id
    assert load.void() is None


def config(executor: str, **parallel: int) -> SimpleNamespace:
    """As much of vLLM's as is read."""
    return SimpleNamespace(
        model_config=SimpleNamespace(model="/models/m", served_model_name=["m"]),
        parallel_config=SimpleNamespace(distributed_executor_backend=executor, **parallel),
    )


@pytest.fixture
def named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The runtime directory of the model of that configuration."""
    monkeypatch.setenv("HOGWILD_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(hooks, "vllm_version", lambda: "0.32.0")
    (tmp_path / "m").mkdir(mode=0o700)
    return tmp_path / "m"


def test_a_front_end_is_that_of_the_engines_that_it_started(named: Path) -> None:
    with process() as engine:
        manifest_of(engine.pid, named)
        assert of_this_program(engine.pid)
        assert hooks.withheld(config("uni")) is None
    assert not of_this_program(engine.pid)  # it has ended
    manifest_of(os.getppid(), named)
    assert hooks.withheld(config("uni")) == hooks.same_name(os.getppid())
    assert hooks.withheld(config("ray")) is None


# --- several engines -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parallel", "number"),
    [
        ({}, 1),  # an older vLLM
        ({"data_parallel_size": 1, "elastic_ep_max_dp_size": 1, "data_parallel_index": 0}, 1),
        ({"data_parallel_size": 4, "elastic_ep_max_dp_size": None, "data_parallel_index": 0}, 4),
        # within the engines of a dense model
        ({"data_parallel_size": 1, "elastic_ep_max_dp_size": 4, "data_parallel_index": 0}, 4),
        ({"data_parallel_size": 1, "data_parallel_index": 3}, 4),
    ],
)
def test_an_engine_knows_of_the_others_whatever_number_vllm_leaves_it(parallel: dict[str, Any], number: int) -> None:
    assert hooks.engines(SimpleNamespace(**parallel)) == number


def test_what_one_of_several_engines_shared_is_taken_back(named: Path) -> None:
    with process() as engine:
        manifest = manifest_of(engine.pid, named)
        problem = hooks.withdraw(config("uni", data_parallel_size=2))
        assert problem is not None
        assert "--data-parallel-size 1" in problem.message
        assert not manifest.exists()
        assert not (named / FILE_NAME).exists()
        refusal = Refusal.load(refusal_path(named))
        assert refusal is not None
        assert refusal.reasons == (("parallel", problem.message),)


def test_several_engines_beside_another_vllm_take_nothing_from_it(named: Path) -> None:
    manifest = manifest_of(os.getppid(), named)
    assert hooks.withdraw(config("uni", data_parallel_size=2)) is not None
    assert hooks.withdraw(config("uni")) == hooks.same_name(os.getppid())
    assert manifest.exists()
    assert (named / FILE_NAME).exists()
    assert not refusal_path(named).exists()
