"""The whole stack on one NVIDIA GPU: vLLM with torch.compile and CUDA graphs, weights shared by CUDA IPC.

    python -m pytest tests/gpu                      # HOGWILD_GPU_SHAPE=qwen3-8b for the large shape (random weights)

The tests run in this order on one stack; each finds what the one before left.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

from hogwild.config import Settings  # noqa: E402 - after the skip
from hogwild.manifest import manifest_path  # noqa: E402
from hogwild.stack.up import Stack  # noqa: E402

ROOT = Path(__file__).parents[2]
SHAPE = os.environ.get("HOGWILD_GPU_SHAPE", "qwen3-0.6b")
RESTARTS = int(os.environ.get("HOGWILD_GPU_RESTARTS", "3"))
PROMPT = [11, 523, 8012, 377, 4401, 95, 1003, 64] * 8
LESSON = [17, 40077, 5, 31234, 902, 8888, 123, 4567]
pytestmark = pytest.mark.timeout(1500)


def until(done: Callable[[], Any], timeout: float, what: str) -> Any:
    deadline = time.monotonic() + timeout
    while not (value := done()):
        assert time.monotonic() < deadline, f"{what} did not happen within {timeout} s"
        time.sleep(0.3)
    return value


class Live:
    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.vllm = httpx.Client(base_url=stack.vllm_url, timeout=300)
        self.api = httpx.Client(base_url=stack.api_url, timeout=120)

    def complete(self, n: int = 8) -> list[int]:
        response = self.vllm.post("/v1/completions", json={
            "model": "m", "prompt": PROMPT, "max_tokens": n, "temperature": 0, "ignore_eos": True, "logprobs": 0,
            "return_tokens_as_token_ids": True})  # fmt: skip
        response.raise_for_status()
        return [int(t.split(":")[1]) for t in response.json()["choices"][0]["logprobs"]["tokens"]]

    def train(self, **config: Any) -> dict[str, Any]:
        body = {"context_ids": PROMPT, "continuation_ids": LESSON, "optimizer": "sgd", **config}
        response = self.api.post("/train", json=body)
        assert response.status_code == 202, response.text
        return self.finished(response.json()["id"])

    def finished(self, job_id: str) -> dict[str, Any]:
        def done() -> Any:
            job = self.api.get(f"/train/{job_id}").json()
            return job if job["state"] in ("succeeded", "failed", "cancelled") else None

        return until(done, 300, "the end of the job")

    def status(self) -> dict[str, Any]:
        return self.api.get("/train/status").json()

    def operate(self, path: str, body: Any = None) -> dict[str, Any]:
        response = self.api.post(f"{path}?wait=60", **({"json": body} if body else {}))
        assert response.status_code == 202, response.text
        return response.json()

    def pid(self, service: str) -> int:
        return next(s.pid for s in self.stack.supervisor.states() if s.name == service)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    data = tmp_path_factory.mktemp("gpu")
    tokenizer = Path(os.environ.get("HOGWILD_TOKENIZER", ROOT / ".cache/models/SmolLM2-135M-Instruct"))
    subprocess.run([sys.executable, ROOT / "bench/random_model.py", SHAPE, data / "m", "--tokenizer", tokenizer,
                    "--device", "cuda"], check=True)  # fmt: skip
    settings = Settings(
        model=str(data / "m"), served_model_name="m", data_dir=data / "d", runtime_dir=data / "r", redis_url=None,
        # A fixed cache: vLLM then doesn't mind that other tests take and give memory while it measures.
        vllm_args="--max-model-len 4096 --gpu-memory-utilization 0.5 --kv-cache-memory-bytes 8000000000",
        sync_tick_s=5)  # fmt: skip
    stack = Stack(settings)
    started = time.monotonic()
    with stack:
        try:
            stack.wait_ready(600)
            print(f"ready after {time.monotonic() - started:.0f} s")
            yield Live(stack)
        finally:
            for log in sorted(stack.supervisor.logs.glob("*.log")):
                print(f"--- {log.name}", *log.read_text(errors="replace").splitlines()[-60:], sep="\n")


def test_steps_are_seen_by_cuda_graphs_at_once(live: Live) -> None:
    before = live.complete()
    assert before != LESSON
    job = live.train(steps=30, learning_rate=0.015, schedule="linear", replay=0.0)
    print("losses", job["losses"])
    assert job["state"] == "succeeded", job["error"]
    assert live.complete() == LESSON
    print("status", json.dumps(live.status()["worker"]))


def test_every_optimizer_runs_on_bf16(live: Live) -> None:
    for optimizer in ("apollo-mini", "apollo"):
        job = live.train(steps=3, optimizer=optimizer, learning_rate=1e-5)
        assert job["state"] == "succeeded", job["error"]
        print(optimizer, job["losses"], job["seconds"])


def test_a_sync_writes_what_changed_and_a_rollback_brings_the_answer_back(live: Live) -> None:
    learned = live.complete()
    saved = live.operate("/checkpoint")
    print("sync", json.dumps(saved["result"]))
    assert saved["state"] == "succeeded", saved["error"]
    undone = live.operate("/checkpoint/rollback", {"generation": 0})
    print("rollback", json.dumps(undone["result"]))
    assert undone["state"] == "succeeded", undone["error"]
    assert live.complete() != learned
    again = live.operate("/checkpoint/rollback", {"generation": saved["result"]["generation"]})
    assert again["state"] == "succeeded", again["error"]
    assert live.complete() == learned


def test_killed_workers_cost_vllm_no_memory(live: Live, memory_of: Callable[[int], int]) -> None:
    version, answer = live.status()["weight_version"], live.complete()
    used = []
    for n in range(RESTARTS):
        start = time.monotonic()
        parent = psutil.Process(live.pid("worker"))
        family = [parent, *parent.children(recursive=True)]
        for process in family:
            process.send_signal(signal.SIGKILL)
        psutil.wait_procs(family, timeout=20)
        time.sleep(1.0)  # the driver takes back what the dead worker had; the next one is still importing
        used.append(memory_of(live.pid("vllm")))
        until(lambda old=parent.pid: live.pid("worker") not in (0, old) and live.stack.ready(), 120, "a new worker")
        took = time.monotonic() - start
        print(f"kill {n + 1}: vLLM holds {used[-1]} MiB; a new worker after {took:.0f} s", flush=True)
    assert min(used) == max(used) > 0
    assert live.status()["weight_version"] == version
    assert live.complete() == answer
    assert live.train(steps=1, learning_rate=1e-6)["state"] == "succeeded"


def test_twenty_consumers_killed_one_after_the_other_cost_vllm_no_memory(
    live: Live, memory_of: Callable[[int], int]
) -> None:
    """What of a worker touches vLLM's memory, without the minute that a whole worker takes to start."""
    manifest = manifest_path(live.stack.settings.model_runtime_dir)
    # Forked before CUDA is touched: many processes, one import of torch.
    code = f"""
import os
from pathlib import Path
import torch
from hogwild.gpu_worker.attach import open_views
from hogwild.manifest import Manifest
for n in range(21):
    child = os.fork()
    if child == 0:
        with open_views(Manifest.load(Path({str(manifest)!r}))) as views:
            sum(float(view.float().sum()) for view in views.values())
            os.kill(os.getpid(), 9)
    print(os.waitpid(child, 0)[1], flush=True)
    input()
"""
    answer, used = live.complete(), []
    # As the worker itself: under the stack's MPS daemon, where there is one.
    consumers = subprocess.Popen([sys.executable, "-c", code], env=psutil.Process(live.pid("worker")).environ(),
                                 stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert consumers.stdin is not None and consumers.stdout is not None
    for _ in range(21):
        assert consumers.stdout.readline() == "9\n"
        used.append(memory_of(live.pid("vllm")))
        consumers.stdin.write("\n")
        consumers.stdin.flush()
    consumers.communicate()
    print("MiB that vLLM holds after each", used)
    assert min(used) == max(used) > 0
    assert live.complete() == answer


def test_vllm_killed_while_attached_loses_nothing(live: Live) -> None:
    live.train(steps=1, learning_rate=1e-6)
    version, answer = live.status()["weight_version"], live.complete()
    parent = psutil.Process(live.pid("vllm"))
    family = [parent, *parent.children(recursive=True)]
    for process in family:
        process.send_signal(signal.SIGKILL)
    psutil.wait_procs(family, timeout=20)
    until(lambda: live.pid("vllm") not in (0, parent.pid), 60, "a restart by supervisor")
    until(live.stack.ready, 500, "the stack being ready again")
    assert live.status()["weight_version"] == version
    assert live.complete() == answer
