"""`hogwild up --no-vllm`, as a user runs it, beside weights that another process exports."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from hogwild.demo import free_ports

HERE = Path(__file__).parent
pytestmark = pytest.mark.timeout(900)


def until(done: Callable[[], Any], timeout: float, what: str) -> Any:
    deadline = time.monotonic() + timeout
    while not (value := done()):
        assert time.monotonic() < deadline, f"{what} did not happen within {timeout} s"
        time.sleep(0.2)
    return value


def lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Up:
    """One `hogwild up` and what it printed."""

    def __init__(self, folder: Path, model_dir: Path) -> None:
        self.runtime, self.out, self.temporary = folder / "run", folder / "out", folder / "tmp"
        self.temporary.mkdir()
        self.api_port, flower_port, redis_port = free_ports(3)
        env = {k: v for k, v in os.environ.items() if not k.startswith("HOGWILD_")}
        env.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", HOGWILD_API_KEY="sesame", COLUMNS="200",
                   TMPDIR=str(self.temporary))  # fmt: skip
        self.exporter = subprocess.Popen(
            [sys.executable, HERE / "tiny_exporter.py", str(model_dir), str(self.runtime / "tiny")],
            env=env, stdout=subprocess.PIPE, text=True)  # fmt: skip
        assert self.exporter.stdout.readline().strip() == "exported"
        # No model is named: there is one export in the runtime directory, and that one is joined.
        self.process = subprocess.Popen(
            [Path(sys.executable).with_name("hogwild"), "up", "--no-vllm", "--data-dir", folder / "data",
             "--runtime-dir", self.runtime, "--api-port", str(self.api_port), "--flower-port", str(flower_port),
             "--redis-port", str(redis_port)],
            env=env, stdout=self.out.open("wb"), stderr=subprocess.STDOUT)  # fmt: skip
        self.flower = f"http://127.0.0.1:{flower_port}"
        self.api = httpx.Client(base_url=f"http://127.0.0.1:{self.api_port}", timeout=30)
        self.api.headers["Authorization"] = "Bearer sesame"

    def said(self) -> str:
        return self.out.read_text(errors="replace")

    def service(self, pattern: str) -> psutil.Process | None:
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.Error):  # it has just ended
                if re.search(pattern, " ".join(process.cmdline())):
                    return process
        return None

    def attached(self) -> bool:
        try:
            worker = self.api.get("/train/status").json()["worker"]
        except httpx.TransportError:
            return False
        return bool(worker and worker["alive"] and worker.get("attached") and psutil.pid_exists(worker["pid"]))


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("up")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64)).save_pretrained(folder / "model")  # fmt: skip
    made = Up(folder, folder / "model")
    try:
        yield made
    finally:
        made.process.terminate()
        made.process.wait(250)
        made.exporter.kill()
        made.exporter.wait()
        made.exporter.stdout.close()
        made.api.close()
        print(made.said()[-8000:])


def test_everything_comes_up_and_a_ready_line_names_the_urls(up: Up) -> None:
    until(lambda: "logs  " in up.said(), 400, "the ready line")
    assert f"http://127.0.0.1:{up.api_port}" in up.said()
    assert up.attached()
    assert (up.runtime / "tiny" / "deployment.json").stat().st_mode & 0o777 == 0o600  # for vLLM's port
    assert (up.out.parent / "data" / "logs" / "worker.log").exists()
    assert re.search(r"^worker \| ", up.said(), re.MULTILINE)


def test_without_the_key_only_livez_answers(up: Up) -> None:
    base = str(up.api.base_url)
    assert httpx.get(f"{base}/livez", timeout=60).status_code == 200
    assert httpx.get(f"{base}/train", timeout=60).status_code == 401
    assert httpx.get(f"{up.flower}/api/workers", timeout=60).status_code == 401
    assert httpx.get(f"{up.flower}/api/workers", auth=("hogwild", "sesame"), timeout=60).status_code == 200


def test_a_job_is_trained(up: Up) -> None:
    body = {"context_ids": [1, 2, 3], "continuation_ids": [4, 5], "steps": 2, "optimizer": "sgd", "learning_rate": 0.1}
    job = up.api.post("/train", json=body).json()
    until(lambda: up.api.get(f"/train/{job['id']}").json()["state"] == "succeeded", 180, "the job")


def test_a_service_that_dies_is_reported_with_its_last_words_and_restarted(up: Up) -> None:
    api = until(lambda: up.service("uvicorn"), 180, "the API")
    api.send_signal(signal.SIGKILL)
    until(lambda: "api ended" in up.said(), 180, "the report")
    assert "The end of its log" in up.said()
    until(lambda: (new := up.service("uvicorn")) and new.pid != api.pid and up.attached(), 180, "a new API")


def test_sigterm_twice_still_stops_in_order_and_leaves_nothing(up: Up) -> None:
    family = psutil.Process(up.process.pid).children(recursive=True)
    assert len(family) >= 6
    version = up.api.get("/train/status").json()["weight_version"]
    up.process.terminate()
    time.sleep(0.3)
    up.process.terminate()
    assert up.process.wait(250) == 0
    assert "nothing of it is running" in up.said()
    until(lambda: not any(lives(p) for p in family), 60, "the end of all processes")
    # the exporter is not ours: its manifest stays, and what was trained was saved before the end
    assert (up.runtime / "tiny" / "rank0.json").exists()
    assert not (up.runtime / "tiny" / "deployment.json").exists()
    assert not list(up.temporary.glob("hogwild-*"))  # Supervisor's socket was there
    assert version == 2
    assert "generation 1 (shutdown)" in up.said()
