"""The spine, measured: what the service adds to training, and what a sync costs against saving the whole model.

Starts the whole stack with SmolLM2-135M, then in the same run, one after the other on the same cores:

  train      seconds a step in the worker, attached to vLLM's weights, against plain transformers on its own copy
             (same samples, same optimizer, no replay, forward + backward + in-place update; goal ≤ 1.1)
  dispatch   POST /train → first step begun, with an idle worker
  attach     manifest → verified views → model, from the worker's log of itself
  sync       POST /checkpoint after training, against safetensors' save_file of the whole model to the same disk

Run: make bench, or python bench/skeleton.py [--steps 6] [--repeats 3]   (about 4 minutes on 2 cores)
Writes bench/results/skeleton.json.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hogwild.client import Client
from hogwild.config import Settings
from hogwild.demo import LESSONS, free_ports, tokenize_lesson
from hogwild.demo_model import MODEL_NAME, make_demo_model
from hogwild.stack.services import environment
from hogwild.stack.up import Stack

ROOT = Path(__file__).parents[1]
LEARNING_RATE = 1e-6  # the weights hardly move: every repeat times the same work


def plain_transformers(model_dir: Path, samples: list[dict[str, list[int]]], steps: int) -> list[float]:
    """Seconds of each step of a plain loop over the same samples, one forward and backward for each sample."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    rows = [torch.tensor([s["context_ids"] + s["continuation_ids"]]) for s in samples]
    labels = [row.clone() for row in rows]
    for sample, label in zip(samples, labels, strict=True):
        label[:, : len(sample["context_ids"])] = -100
    seconds = []
    for _ in range(steps):
        started = time.perf_counter()
        for row, label in zip(rows, labels, strict=True):
            (model(row, labels=label).loss / len(rows)).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    return seconds


def in_worker(client: Client, samples: list[dict[str, list[int]]], steps: int) -> tuple[list[float], float]:
    """Seconds of each step as the worker measured them, and seconds from submit to the first step begun."""
    submitted = time.time()
    job = client.train(samples=samples, steps=steps, optimizer="sgd", learning_rate=LEARNING_RATE, shuffle=False,
                       replay=0.0)  # fmt: skip
    done = client.wait(job.id, timeout=600)
    if done.state != "succeeded":
        raise SystemExit(f"the job ended as {done.state}: {done.error}")
    seconds, first = [], None
    for event in client.events(job.id):
        if event.type == "begun" and first is None:
            first = event.time - submitted
        if event.type == "step":
            seconds.append(float(event.data["seconds"]))
    return seconds, first if first is not None else float("nan")


def save_whole(model_dir: Path) -> tuple[float, int]:
    """Seconds and bytes of `save_file` + fsync of the whole model, tensors already in memory."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(model_dir / "model.safetensors")
    with tempfile.TemporaryDirectory(dir=ROOT / ".hogwild") as folder:
        path = Path(folder) / "model.safetensors"
        started = time.perf_counter()
        save_file(tensors, path)
        with path.open("rb") as file:
            os.fsync(file.fileno())
        return time.perf_counter() - started, path.stat().st_size


def measure(steps: int, repeats: int) -> dict[str, Any]:
    """Everything, on one stack."""
    model = make_demo_model(ROOT / ".cache" / "models" / MODEL_NAME)
    data = ROOT / ".hogwild" / "bench"
    subprocess.run(["rm", "-rf", str(data)], check=True)
    vllm_port, api_port, flower_port, redis_port = free_ports(4)
    settings = Settings(
        model=str(model), served_model_name=MODEL_NAME, data_dir=data, runtime_dir=data / "run", redis_url=None,
        vllm_port=vllm_port, api_port=api_port, flower_port=flower_port, redis_port=redis_port, threads=None,
        vllm_args="--max-model-len 1024")  # fmt: skip
    import httpx

    with Stack(settings) as stack, Client(stack.api_url) as client:
        stack.wait_ready()
        vllm = httpx.Client(base_url=stack.vllm_url, timeout=60)
        samples = [tokenize_lesson(vllm, question, answer) for question, answer in LESSONS]
        in_worker(client, samples, 1)  # first job: the engine measures itself
        worker, plain, dispatch = [], [], []
        for _ in range(repeats):  # turn and turn about, so that both see the same machine
            seconds, first = in_worker(client, samples, steps)
            worker += seconds
            dispatch.append(first)
            plain += json.loads(subprocess.run(
                [sys.executable, __file__, "--plain", str(model), "--steps", str(steps)], check=True, text=True,
                capture_output=True, input=json.dumps(samples), env=environment(settings)).stdout)  # fmt: skip
        sync = client.checkpoint(wait=True)
        attach = client.status()["worker"]["lifecycle"]
        save_seconds, save_bytes = save_whole(model)
    step_worker, step_plain = statistics.median(worker), statistics.median(plain)
    return {
        "machine": f"{os.cpu_count()}-core {platform.machine()}, no GPU",
        "model": MODEL_NAME, "dtype": "float32", "samples": len(samples), "steps": steps, "repeats": repeats,
        "step_seconds": {"worker": step_worker, "plain_transformers": step_plain, "ratio": step_worker / step_plain},
        "submit_to_first_step_seconds": statistics.median(dispatch),
        "attach": attach,
        "sync": {"seconds": sync["seconds"], "pause_seconds": sync["pause_seconds"], "bytes": sync["bytes_written"],
                 "blocks_changed": sync["blocks_changed"], "blocks_total": sync["blocks_total"]},
        "save_file": {"seconds": save_seconds, "bytes": save_bytes},
        "sync_to_save_file_seconds": sync["seconds"] / save_seconds,
    }  # fmt: skip


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "skeleton.json")
    parser.add_argument("--plain", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plain:
        print(json.dumps(plain_transformers(options.plain, json.load(sys.stdin), options.steps)))
        return
    result = measure(options.steps, options.repeats)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    table = Table("", "Hogwild", "reference", "ratio", title="bench/skeleton.py")
    step = result["step_seconds"]
    table.add_row("seconds a step", f"{step['worker']:.2f}", f"{step['plain_transformers']:.2f} (plain transformers)",
                  f"{step['ratio']:.2f}")  # fmt: skip
    table.add_row("submit → first step", f"{result['submit_to_first_step_seconds'] * 1e3:.0f} ms", "", "")
    sync, save = result["sync"], result["save_file"]
    table.add_row("checkpoint", f"{sync['seconds']:.2f} s, {sync['bytes'] / 1e6:.0f} MB",
                  f"{save['seconds']:.2f} s, {save['bytes'] / 1e6:.0f} MB (save_file)",
                  f"{result['sync_to_save_file_seconds']:.2f}")  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
