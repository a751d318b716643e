"""A real worker (Celery, prefork, spawn) on a tiny model whose weights another process exports."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import redis
import torch
from safetensors.torch import load_file

from hogwild.config import Settings
from hogwild.stack.services import settings_env
from hogwild.tasks.dirty import Dirty
from hogwild.tasks.ledger import Ledger
from hogwild.tasks.operations import Operations
from hogwild.tasks.payloads import Sample, pack
from hogwild.tasks.registry import Registry

EXPORTER = Path(__file__).parents[1] / "tiny_exporter.py"


def until(done: Callable[[], Any], timeout: float = 300, what: str = "it") -> Any:
    deadline = time.monotonic() + timeout
    while not (value := done()):
        assert time.monotonic() < deadline, f"{what} did not happen within {timeout} s"
        time.sleep(0.05)
    return value


class Site:
    """One exporter and one worker, and what their users see."""

    def __init__(self, settings: Settings, client: redis.Redis, model_dir: Path) -> None:
        self.settings = settings
        self.model_dir = model_dir
        self.ledger = Ledger(client, settings)
        self.operations = Operations(client, self.ledger.messages, settings.model_name)
        self.registry = Registry(client, settings.model_name)
        self.dirty = Dirty(client, settings.model_name)
        self.env = {**os.environ, **settings_env(settings), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.exporter: subprocess.Popen[str] | None = None
        self.worker: subprocess.Popen[bytes] | None = None
        self.log = settings.data_dir / "worker.log"

    def start_exporter(self, model_dir: Path | None = None) -> None:
        self.exporter = subprocess.Popen(
            [sys.executable, EXPORTER, str(model_dir or self.model_dir),
             str(self.settings.model_runtime_dir)], env=self.env, stdout=subprocess.PIPE, text=True)  # fmt: skip
        assert self.exporter.stdout.readline().strip() == "exported"

    def start_worker(self, app: str = "hogwild.tasks.worker:app") -> None:
        with self.log.open("ab") as log:
            self.worker = subprocess.Popen(
                [sys.executable, "-m", "celery", "-A", app, "worker", "-Q", self.settings.queue,
                 "-c", "1", "--pool", "prefork", "-E", "--loglevel", "INFO", "-n", "tiny@%h"],
                env=self.env, stdout=log, stderr=log, start_new_session=True)  # fmt: skip

    def child(self) -> psutil.Process:
        """The pool's process: it says its pid in its status."""
        return psutil.Process(until(lambda: (self.registry.worker() or {}).get("pid"), what="a heartbeat"))

    def attached(self) -> bool:
        worker = self.registry.worker()
        return bool(worker and worker["alive"] and worker.get("attached") and psutil.pid_exists(worker["pid"]))

    def submit(self, **config: Any) -> str:
        sample = Sample([1, 2, 3, 4], [5, 6, 7])
        return self.ledger.submit(pack([sample]), config or {"steps": 3, "optimizer": "sgd", "learning_rate": 0.1})[0]

    def finished(self, job_id: str, timeout: float = 300) -> Any:
        until(lambda: self.ledger.get(job_id).final, timeout, f"the end of {job_id}")
        return self.ledger.get(job_id)

    def stepping(self, job_id: str, step: int = 3) -> Any:
        return until(lambda: self.ledger.get(job_id).steps_applied >= step, what=f"step {step}")

    def operate(self, kind: Any, **params: Any) -> Any:
        op_id = self.operations.submit(kind, **params)
        until(lambda: self.operations.get(op_id).final, what=kind)
        return self.operations.get(op_id)

    def disk(self) -> dict[str, torch.Tensor]:
        return {k: v.clone() for k, v in load_file(self.settings.model_checkpoint_dir / "model.safetensors").items()}

    def stop(self) -> None:
        if self.worker is not None and self.worker.poll() is None:
            self.worker.terminate()
            try:
                self.worker.wait(120)
            except subprocess.TimeoutExpired:
                self.worker.kill()
                self.worker.wait()
        if self.exporter is not None:
            self.exporter.kill()
            self.exporter.wait()
            self.exporter.stdout.close()


def make_tiny_model(path: Path) -> Path:
    """A Llama of two layers, the same each time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True)).save_pretrained(path)  # fmt: skip
    return path


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)
