"""Parts of a real card: fewer multiprocessors are fewer, and a step whose products keep to them is the same step.

Under an MPS daemon of its own, in processes of their own: a process is a client from the time it first uses CUDA.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hogwild.config import Settings
from hogwild.mps import Mps, probe

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"), pytest.mark.timeout(300)]

HEAD = """
import itertools, json, sys, time, torch
from hogwild.gpu_worker.partition import Placement
card = torch.device("cuda", 0)
placement = Placement.on(card)
def at(share):
    assert share == 1.0 or share in placement.parts
    placement.move(share)
"""
RATES = """
x = torch.randn(4096, 4096, device=card, dtype=torch.bfloat16)
rates = {}
for share in (1.0, 0.25, 0.5, 0.75, 1.0):
    at(share)
    for _ in range(20):
        x @ x
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(100):
        x @ x
    torch.cuda.synchronize()
    rates[share] = 100 / (time.perf_counter() - start)
print(json.dumps({str(k): v for k, v in rates.items()}))
"""
TRAINING = """
from transformers import AutoModelForCausalLM, LlamaConfig
from hogwild.gpu_worker.batch import Sample
from hogwild.gpu_worker.config import TrainConfig
from hogwild.gpu_worker.engine import Trainer
from hogwild.gpu_worker.optim.base import Optimizer

moves = itertools.cycle((0.25, 0.75, 0.5, 1.0, 0.5))
step_param = Optimizer.step_param
def moving(self, name, p, grad):
    # from part to part in the middle of backward passes, or always on the whole card
    if sys.argv[1] == "moving":
        placement.move(next(moves))
    step_param(self, name, p, grad)
Optimizer.step_param = moving

losses = []
for compiled in (False, True):
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=2000, max_position_embeddings=256)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to(card)
    trainer = Trainer(model, compile_layers=compiled)
    samples = [Sample(list(range(i, i + 60)), list(range(70, 90))) for i in range(1, 9)]
    plan = trainer.plan(samples, TrainConfig(optimizer="apollo-mini", learning_rate=1e-3, steps=12))
    losses.append(trainer.run(plan).losses)
print(json.dumps(losses))
"""


@pytest.fixture(scope="module")
def mps() -> Iterator[Mps]:
    with tempfile.TemporaryDirectory(prefix="hw") as folder:  # short: sockets are made in it
        settings = Settings(served_model_name="m", runtime_dir=Path(folder), mps="on")
        if os.environ.get("CUDA_MPS_PIPE_DIRECTORY") or any(f.status == "problem" for f in probe(settings)):
            pytest.skip("no MPS of our own on this host: " + "; ".join(f.message for f in probe(settings)))
        mps = Mps.start(settings)
        assert mps is not None
        yield mps
        mps.stop()


def run(code: str, environment: dict[str, str], *arguments: str) -> Any:
    done = subprocess.run([sys.executable, "-c", HEAD + code, *arguments], env={**os.environ, **environment},
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_part_of_the_card_is_a_part_of_its_speed(mps: Mps) -> None:
    rates = run(RATES, mps.worker_environment())
    print(rates)

    for share in (0.25, 0.5, 0.75):
        assert 0.6 * share < rates[str(share)] / rates["1.0"] < 1.25 * share


def test_training_that_moves_between_parts_learns_the_same(mps: Mps) -> None:
    still, moving = (run(TRAINING, mps.worker_environment(), how) for how in ("still", "moving"))
    print(still, moving)

    for a, b in zip(still, moving, strict=True):
        assert a[-1] < 0.9 * a[0]
        assert b == pytest.approx(a, rel=0.02)


def test_without_mps_there_are_no_parts() -> None:
    assert run("print(json.dumps([placement.parts, placement.share]))", {}) == [[], 1.0]
