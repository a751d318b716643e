"""HOGWILD itself: does it matter to the training that vLLM is serving, and to the serving that weights move under it?

    python bench/learning_live.py --model .cache/models/SmolLM2-135M-Instruct --facts 1 --json out.json
    python bench/learning_live.py --runtime-dir RUNTIME_DIR/MODEL --url http://127.0.0.1:8000 --json out.json

The first starts the stack itself, without its worker; the second joins one (stop Hogwild's own worker: only one may
attach).

The facts job of `bench/learning.py` runs on the live weights of a running vLLM: twice while vLLM is idle (their
difference is the noise), then while `--streams` clients stream completions without pause. Compared are the loss curves,
and the text: the perplexity, under the final weights, of what was produced while they moved, of what is produced when
training has stopped, and of what the untouched model had produced. Garbage would stand out by orders of magnitude. The
weights are put back at the end.
"""

import argparse
import json
import math
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import torch
from learning_task import load_task, recall

from hogwild.config import Settings
from hogwild.demo import free_ports
from hogwild.frontend import Frontend
from hogwild.gpu_worker.attach import attach
from hogwild.gpu_worker.batch import Sample, collate
from hogwild.gpu_worker.config import TrainConfig
from hogwild.gpu_worker.engine import Trainer
from hogwild.gpu_worker.model import build_model
from hogwild.gpu_worker.replay import OPENINGS, OwnText
from hogwild.stack.up import Stack


class Streams:
    """Clients that each ask for one completion after the other; keeps the texts and the moments of their tokens."""

    def __init__(self, url: str, model: str, count: int, tokens: int) -> None:
        self.url, self.model, self.count, self.tokens = url, model, count, tokens
        self.prompts = OPENINGS
        self.texts: list[tuple[str, str]] = []
        self.gaps: list[float] = []
        self.errors: list[str] = []
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        self._stop.clear()
        self._threads = [threading.Thread(target=self._run, args=(i,), daemon=True) for i in range(self.count)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def produce(self, each: int) -> None:
        """`each` completions for every client, then stop."""
        threads = [threading.Thread(target=self._run, args=(i, each), daemon=True) for i in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _run(self, client: int, rounds: int | None = None) -> None:
        n = 0
        with httpx.Client(timeout=300.0) as http:
            while not self._stop.is_set() and (rounds is None or n < rounds):
                prompt = self.prompts[(client + n * self.count) % len(self.prompts)]
                try:
                    self.texts.append((prompt, self._complete(http, prompt, client * 1000 + n)))
                except httpx.HTTPError as e:
                    self.errors.append(f"{type(e).__name__}: {e}")
                    return
                n += 1

    def _complete(self, http: httpx.Client, prompt: str, seed: int) -> str:
        body = {
            "model": self.model, "prompt": prompt, "max_tokens": self.tokens, "temperature": 0.8, "seed": seed,
            "ignore_eos": True, "stream": True,
        }  # fmt: skip
        parts, last = [], None
        with http.stream("POST", f"{self.url}/v1/completions", json=body) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                now = time.perf_counter()
                if last is not None:
                    self.gaps.append(now - last)
                last = now
                parts.append(json.loads(line[6:])["choices"][0]["text"])
        return "".join(parts)


@torch.no_grad()
def perplexities(trainer: Trainer, tokenizer: Any, texts: list[tuple[str, str]]) -> list[float]:
    """Perplexity of each text after its prompt, under the weights of now."""
    out = []
    for prompt, text in texts:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        if len(ids) < 2:
            continue
        sample = Sample(tokenizer(prompt).input_ids, ids)
        loss = trainer.forward.loss(collate([sample], trainer.device), sample.total_weight)
        out.append(math.exp(float(loss)))
    return out


def summary(values: list[float]) -> dict[str, float]:
    values = sorted(values)
    return {
        "texts": len(values), "median": statistics.median(values), "mean": statistics.fmean(values),
        "worst": values[-1],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--model", type=Path, help="start the stack with this model directory")
    where.add_argument("--runtime-dir", type=Path, help="of a running one: the model's folder in the runtime directory")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="tokens of one completion")
    parser.add_argument("--facts", type=int, help="facts of each relation")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--optimizer", default="apollo")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.model is None:
        measure(args, args.runtime_dir, args.url)
        return
    with tempfile.TemporaryDirectory(prefix="hw") as folder:  # short: sockets are made below it
        ports = free_ports(4)
        settings = Settings(
            model=str(args.model), served_model_name="live", data_dir=Path(folder) / "d",
            runtime_dir=Path(folder) / "r", vllm_port=ports[0], api_port=ports[1], flower_port=ports[2],
            redis_port=ports[3], redis_url=None,
            vllm_args="--max-model-len 1024")  # fmt: skip
        with Stack(settings) as stack:
            stack.wait_ready(900)
            stack.supervisor.call("stopProcess", "worker", True)
            measure(args, settings.model_runtime_dir, stack.vllm_url)


def measure(args: argparse.Namespace, runtime_dir: Path, url: str) -> None:
    """Everything, on a running vLLM that nobody trains."""
    from transformers import AutoTokenizer

    attachment = attach(runtime_dir)
    tokenizer = AutoTokenizer.from_pretrained(attachment.manifest.model_path)
    model = build_model(attachment)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer = Trainer(model, own_text=OwnText.for_model(Path(attachment.manifest.model_path)))
    task = load_task(tokenizer, args.facts)
    config = TrainConfig(optimizer=args.optimizer, epochs=args.epochs)
    plan = trainer.plan(task.facts, config)
    frontend = Frontend.load(runtime_dir)

    def restore() -> None:
        for n, p in model.named_parameters():
            p.data.copy_(before[n])
        trainer.rolled_back()
        if frontend is not None:
            frontend.reset_prefix_cache()

    def train() -> list[float]:
        return trainer.run(plan).losses

    served = attachment.manifest.served_model_name
    record: dict[str, Any] = {
        "model": Path(attachment.manifest.model_path).name, "device": attachment.device.type, "streams": args.streams,
        "optimizer": args.optimizer, "facts": task.n_facts, "steps": plan.n_steps,
    }  # fmt: skip
    try:
        untouched = Streams(url, served, args.streams, args.tokens)
        untouched.produce(2)
        record["perplexity of the untouched model's text, under itself"] = summary(
            perplexities(trainer, tokenizer, untouched.texts)
        )
        idle = []
        for _ in range(2):
            restore()
            idle.append(train())
        restore()
        streams = Streams(url, served, args.streams, args.tokens)
        streams.start()
        serving = train()
        streams.stop()
        if frontend is not None:
            frontend.reset_prefix_cache()
        paused = Streams(url, served, args.streams, args.tokens)
        paused.produce(2)
        record |= {
            "losses_idle": idle[0],
            "losses_serving": serving,
            "largest_difference_idle_idle": max(abs(a - b) for a, b in zip(*idle, strict=True)),
            "largest_difference_idle_serving": max(abs(a - b) for a, b in zip(idle[0], serving, strict=True)),
            "perplexity of text produced while training": summary(perplexities(trainer, tokenizer, streams.texts)),
            "perplexity of text produced after it": summary(perplexities(trainer, tokenizer, paused.texts)),
            "inter_token_ms_while_training": 1e3 * statistics.median(streams.gaps),
            "inter_token_ms_after_it": 1e3 * statistics.median(paused.gaps),
            "stream_errors": untouched.errors + streams.errors + paused.errors,
            "recall": recall(model, tokenizer, task),
        }
    finally:
        restore()
        trainer.close()
        attachment.close()
    print(json.dumps({k: v for k, v in record.items() if not k.startswith("losses")}, indent=1))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
