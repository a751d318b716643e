"""One real stack for the whole session: vLLM, embedded Redis, Celery worker, beat, API, Flower."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from hogwild.client import Client
from hogwild.config import Settings
from hogwild.demo import free_ports
from hogwild.demo_model import MODEL_NAME, make_demo_model
from hogwild.stack.up import Stack

REPOSITORY = Path(__file__).parents[2]
API_KEY, VLLM_KEY = "acceptance-key", "vllm-key"


class Live:
    """The running stack and clients for it."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.vllm = httpx.Client(base_url=stack.vllm_url, timeout=300, headers={"Authorization": f"Bearer {VLLM_KEY}"})
        self.api = httpx.Client(base_url=stack.api_url, timeout=60, headers={"Authorization": f"Bearer {API_KEY}"})
        self.client = Client(stack.api_url, api_key=API_KEY)

    def complete(self, prompt: str | list[int], max_tokens: int = 12) -> str:
        response = self.vllm.post("/v1/completions", json={
            "model": MODEL_NAME, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0})  # fmt: skip
        response.raise_for_status()
        return str(response.json()["choices"][0]["text"])

    def tokens(self, text: str) -> list[int]:
        response = self.vllm.post("/tokenize", json={"model": MODEL_NAME, "prompt": text, "add_special_tokens": False})
        response.raise_for_status()
        return list(response.json()["tokens"])

    def train(self, context: str, continuation: str, **options: Any) -> Any:
        job = self.client.train(context_ids=self.tokens(context), continuation_ids=self.tokens(continuation), **options)
        return self.client.wait(job.id, timeout=600)

    def status(self) -> dict[str, Any]:
        response = self.api.get("/train/status")
        response.raise_for_status()
        return dict(response.json())

    def wait_version(self, version: int, timeout: float = 60) -> None:
        """Wait until the status shows these weights: a job has ended a moment before the worker says how it is."""
        deadline = time.monotonic() + timeout
        while (shown := self.status()["weight_version"]) != version:
            assert time.monotonic() < deadline, f"the status shows version {shown}, not {version}, after {timeout} s"
            time.sleep(0.2)

    def pid(self, service: str) -> int:
        return next(s.pid for s in self.stack.supervisor.states() if s.name == service)


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    model = make_demo_model(REPOSITORY / ".cache" / "models" / MODEL_NAME)
    data = tmp_path_factory.mktemp("stack")
    vllm_port, api_port, flower_port, redis_port = free_ports(4)
    settings = Settings(
        model=str(model), served_model_name=MODEL_NAME, data_dir=data, runtime_dir=data / "run", redis_url=None,
        vllm_port=vllm_port, api_port=api_port, flower_port=flower_port, redis_port=redis_port, api_key=API_KEY,
        vllm_api_key=VLLM_KEY, sync_tick_s=2, vllm_args="--max-model-len 1024", keep_last=4)  # fmt: skip
    stack = Stack(settings)
    with stack:
        try:
            stack.wait_ready(900)
            running = Live(stack)
            yield running
            for client in (running.vllm, running.api, running.client):
                client.close()
        finally:
            for log in sorted(stack.supervisor.logs.glob("*.log")):  # shown by pytest when a test failed
                print(f"--- {log.name}", *log.read_text(errors="replace").splitlines()[-40:], sep="\n")
