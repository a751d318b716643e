"""What a part of the multiprocessors costs and buys: training on it beside something that decodes, under MPS.

    python bench/partition.py --parts 1.0,0.75,0.5,0.25 --mps-percent 50,25

No vLLM: one process replays a CUDA graph of a decoder's matrix products at 1, 16 and 64 rows, which is what decoding
does to a card, and another trains with Hogwild's engine, on green contexts (hogwild.gpu_worker.partition) or, started
anew, with MPS's own limit. Takes a minute or two; bench/coserve.py measures the real thing. Result:
bench/results/partition-cuda.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from train import SHAPES, build_model, rows

ROOT = Path(__file__).parents[1]


def decode(args: argparse.Namespace) -> None:
    """Answers `STREAMS SECONDS` lines with the times of decoding steps."""
    shape = SHAPES[args.shape]
    width, inner, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    heads, kv, dim = shape["num_attention_heads"], shape["num_key_value_heads"], shape["head_dim"]
    functional = torch.nn.functional
    torch.manual_seed(0)
    options = {"device": "cuda", "dtype": torch.bfloat16}
    weights = [
        [torch.randn(n, m, **options) * 0.02
         for n, m in (((heads + 2 * kv) * dim, width), (width, heads * dim), (2 * inner, width), (width, inner))]
        for _ in range(layers)
    ]  # fmt: skip
    head = torch.randn(shape["vocab_size"], width, **options) * 0.02
    norm = torch.ones(width, **options)
    graphs = {}
    for batch in (1, 16, 64):
        x0 = torch.randn(batch, width, **options)
        keys = torch.randn(batch, kv, 512, dim, **options)

        def step(x0: torch.Tensor = x0, keys: torch.Tensor = keys, batch: int = batch) -> torch.Tensor:
            x = x0
            for qkv, out, up, down in weights:
                q = functional.linear(functional.rms_norm(x, (width,), norm), qkv)[:, : heads * dim]
                attended = functional.scaled_dot_product_attention(
                    q.reshape(batch, heads, 1, dim), keys, keys, enable_gqa=True)  # fmt: skip
                x = x + functional.linear(attended.reshape(batch, heads * dim), out)
                gate, value = functional.linear(functional.rms_norm(x, (width,), norm), up).chunk(2, -1)
                x = x + functional.linear(functional.silu(gate) * value, down)
            return functional.linear(x, head).argmax(-1)

        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            step()
            step()
        torch.cuda.synchronize()
        graphs[batch] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[batch]):
            step()
    print("ready", flush=True)
    for line in sys.stdin:
        batch, seconds = line.split()
        times, end = [], time.perf_counter() + float(seconds)
        last = time.perf_counter()
        while last < end:
            graphs[int(batch)].replay()
            torch.cuda.synchronize()
            now = time.perf_counter()
            times.append(now - last)
            last = now
        times.sort()
        print(json.dumps({"steps_per_s": len(times) / sum(times), "p50_ms": times[len(times) // 2] * 1e3,
                          "p99_ms": times[len(times) * 99 // 100] * 1e3}), flush=True)


def train(args: argparse.Namespace) -> None:
    """Trains for ever on the share of the card that the file says; a line for each step."""
    from hogwild.gpu_worker.batch import Sample
    from hogwild.gpu_worker.config import TrainConfig
    from hogwild.gpu_worker.engine import Trainer, Unattended
    from hogwild.gpu_worker.partition import Placement

    settings = SimpleNamespace(device="cuda", model=None, shape=args.shape, tokens=args.tokens, samples=1)
    placement = Placement.on(torch.device("cuda"))
    trainer = Trainer(build_model(settings), compile_layers=True, placed=placement.entered)
    quarter = 3 * args.tokens // 4
    samples = [Sample(ids[:quarter], ids[quarter:]) for row in rows(settings, 1000, 4) for ids in row]
    config = TrainConfig(optimizer="apollo-mini", learning_rate=1e-7, steps=10_000, shuffle=False,
                         max_tokens_per_step=args.tokens)  # fmt: skip

    class Placed(Unattended):
        def before_step(self, step: int) -> None:
            share = float(Path(args.control).read_text())
            if share != placement.share:
                placement.move(share)

        def after_step(self, report: Any) -> None:
            torch.cuda.synchronize()
            print(json.dumps({"at": time.time(), "seconds": report.seconds, "tokens": report.tokens,
                              "share": placement.share}), flush=True)  # fmt: skip

    trainer.run(trainer.plan(samples, config), Placed())


class Child:
    """A part of this script in a process of its own."""

    def __init__(self, role: str, args: argparse.Namespace, env: dict[str, str]) -> None:
        argv = [sys.executable, __file__, "--role", role, "--shape", args.shape, "--tokens", str(args.tokens),
                "--control", args.control]  # fmt: skip
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True)
        self.out = self.process.stdout

    def line(self) -> str:
        text = self.out.readline()
        if not text:
            raise SystemExit(f"a process ended with status {self.process.wait()}")
        return text

    def ask(self, streams: int, seconds: float) -> dict[str, float]:
        self.process.stdin.write(f"{streams} {seconds}\n")
        self.process.stdin.flush()
        return dict(json.loads(self.line()))

    def step(self) -> dict[str, Any]:
        return dict(json.loads(self.line()))


def steps_during(trainer: Child, server: Child, streams: int, seconds: float) -> tuple[dict[str, float], float]:
    """(decoding, training tok/s) side by side."""
    server.process.stdin.write(f"{streams} {seconds}\n")
    server.process.stdin.flush()
    start = time.time()
    done = []
    while time.time() < start + seconds:
        done.append(trainer.step())
    inside = [s for s in done if s["at"] - s["seconds"] >= start and s["at"] <= start + seconds + 0.02] or done[-1:]
    return dict(json.loads(server.line())), sum(s["tokens"] for s in inside) / sum(s["seconds"] for s in inside)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-8b", choices=sorted(SHAPES))
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--parts", default="1.0,0.75,0.5,0.25", help="shares of the card, of those there are")
    parser.add_argument("--mps-percent", default="", help="of the multiprocessors, by MPS instead")
    parser.add_argument("--streams", default="1,16,64")
    parser.add_argument("--seconds", type=float, default=2.5)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "partition-cuda.json")
    parser.add_argument("--role", help=argparse.SUPPRESS)
    parser.add_argument("--control", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        {"decode": decode, "train": train}[args.role](args)
        return
    from hogwild.config import Settings
    from hogwild.mps import Mps

    streams = [int(n) for n in args.streams.split(",")]
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="hw") as folder:
        args.control = f"{folder}/control"
        mps = Mps.start(Settings(model="x", runtime_dir=Path(folder) / "run", mps="on"))
        children = [Child("decode", args, os.environ | mps.environment())]
        try:
            server = children[0]
            server.line()
            alone = {n: server.ask(n, args.seconds) for n in streams}
            base = None
            for percent in (None, *filter(None, args.mps_percent.split(","))):
                Path(args.control).write_text("1.0")
                limit = {"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": percent} if percent else {}
                trainer = Child("train", args, os.environ | mps.worker_environment() | limit)
                children.append(trainer)
                trainer.step()
                for share in [1.0] if percent else map(float, args.parts.split(",")):
                    Path(args.control).write_text(str(share))
                    while trainer.step()["share"] != share:
                        pass
                    quiet = [trainer.step() for _ in range(3)][1:]
                    rate = sum(s["tokens"] for s in quiet) / sum(s["seconds"] for s in quiet)
                    base = base or rate
                    for n in streams:
                        load, trained = steps_during(trainer, server, n, args.seconds)
                        found.append({
                            "how": f"MPS {percent} %" if percent else f"part {share}", "streams": n,
                            "training_without_traffic": round(rate / base, 3),
                            "serving": round(load["steps_per_s"] / alone[n]["steps_per_s"], 3),
                            "training": round(trained / base, 3),
                            "p50": round(load["p50_ms"] / alone[n]["p50_ms"], 2),
                            "p99": round(load["p99_ms"] / alone[n]["p99_ms"], 2)})  # fmt: skip
                        print(json.dumps(found[-1]), flush=True)
                    args.out.write_text(json.dumps({
                        "device": torch.cuda.get_device_name(), "shape": args.shape, "tokens_per_step": args.tokens,
                        "alone": alone, "training_tokens_per_s": base, "rows": found}, indent=1) + "\n")  # fmt: skip
                trainer.process.kill()
                trainer.process.wait()
        finally:
            for child in children:
                with suppress(ProcessLookupError):
                    child.process.kill()
                child.process.wait()
            mps.stop()


if __name__ == "__main__":
    main()
