"""What training does to decoding under MPS, and which way of training does less of it: short pairs of the two.

    python bench/interference.py --variants hf,mini+keep+compile,mini+keep+compile:low
    python bench/interference.py --vllm DIRECTORY --variants hf,mini+keep+compile --json out.json

Decoding is a CUDA graph of one token for `--streams` sequences of the shape, replayed without end, or a real vLLM that
serves the model in a directory under a closed loop. Each variant trains in a process of its own, with weights of its
own (that they are shared changes nothing for the card): first alone, then beside decoding. Every number is a share of
the same thing alone in the same run.

Variants: `hf` (transformers, gradient checkpointing, plain SGD in backward) or one of bench/train.py's, with

    :low            below vLLM's priority (CUDA_MPS_CLIENT_PRIORITY)
    :part=0.5       its matrix products on this part of the multiprocessors (hogwild.gpu_worker.partition)
    :threads=50     at most so many percent of them (CUDA_MPS_ACTIVE_THREAD_PERCENTAGE)
    :env.NAME=VALUE in its environment
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import load

# --- processes on the card -----------------------------------------------------------------------------------------


def decode(args: argparse.Namespace) -> None:
    """Tokens without end; a line for each: when, and how long it took (s)."""
    import torch
    import torch.nn.functional as F
    from train import SHAPES

    s = SHAPES[args.shape]
    h, inter, n, heads, kv, d = (s[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers",
                                                "num_attention_heads", "num_key_value_heads", "head_dim"))  # fmt: skip

    def weights(*shape: int) -> Any:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * 0.02

    layers = [(weights((heads + 2 * kv) * d, h), weights(h, heads * d), weights(2 * inter, h), weights(h, inter))
              for _ in range(n)]  # fmt: skip
    caches = [weights(2, args.streams, kv, 320, d) for _ in range(n)]
    head = weights(s["vocab_size"], h)
    x = weights(args.streams, h) * 50

    def layer(x: Any, qkv_w: Any, o_w: Any, up_w: Any, down_w: Any, cache: Any) -> Any:
        y = F.rms_norm(x, (h,))
        qkv = F.linear(y, qkv_w)
        q, k, _ = qkv.split((heads * d, kv * d, kv * d), -1)
        q = F.rms_norm(q.view(-1, heads, 1, d), (d,))
        keys = cache[0] + F.rms_norm(k.view(-1, kv, 1, d), (d,)) * 0
        a = F.scaled_dot_product_attention(q, keys, cache[1], enable_gqa=True)
        x = x + F.linear(a.reshape(-1, heads * d), o_w)
        gate, up = F.linear(F.rms_norm(x, (h,)), up_w).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, down_w)

    fused = torch.compile(layer)

    def token() -> Any:
        y = x
        for w, cache in zip(layers, caches, strict=True):
            y = fused(y, *w, cache)
        return F.linear(F.rms_norm(y, (h,)), head).argmax(-1)

    with torch.no_grad():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                token()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            token()
    done = torch.cuda.Event()
    print("ready", flush=True)
    with open(args.times, "w", buffering=1) as out:
        while True:
            if Path(args.pause).exists():
                time.sleep(0.01)
                continue
            start = time.perf_counter()
            graph.replay()
            done.record()
            done.synchronize()
            out.write(f"{time.time()} {time.perf_counter() - start}\n")


def train(args: argparse.Namespace) -> None:
    """Steps without end; a line for each: when it was done."""
    import torch
    import train as bench

    kind, *options = args.train.split(":")
    chosen = dict(option.partition("=")[::2] for option in options)
    shape = argparse.Namespace(device="cuda", model=None, shape=args.shape, tokens=args.tokens, samples=1, steps=2000,
                               warmup=0, memory_limit_gb=4.0, kernels=0)  # fmt: skip
    model = bench.build_model(shape)

    class Clock(bench.Clock):
        def mark(self) -> None:
            torch.cuda.synchronize()
            print(f"step {time.time()}", flush=True)

    if "part" in chosen:
        from hogwild.gpu_worker.partition import Placement

        placement = Placement.on(torch.device("cuda", 0))
        if not placement.parts:
            raise SystemExit("this card can't be divided")
        placement.move(float(chosen["part"]))
    if kind != "hf":
        name, *how = kind.split("+")
        bench.run_ours(shape, model, name, set(how), Clock("cuda"))
        return

    def update(p: torch.Tensor) -> None:
        p.data.add_(p.grad, alpha=-1e-9)
        p.grad = None

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(update)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    quarter = args.tokens // 4
    while True:
        ids = torch.randint(1000, 100_000, (1, args.tokens), device="cuda")
        hidden = model.model(ids).last_hidden_state[:, -quarter:]
        logits = model.lm_head(hidden)[0, :-1].float()
        torch.nn.functional.cross_entropy(logits, ids[0, -quarter + 1 :]).backward()
        Clock("cuda").mark()


# --- the measurement ----------------------------------------------------------------------------------------------


class Lines:
    """A child whose lines are read as they come."""

    def __init__(self, argv: list[str], env: dict[str, str], log: Path) -> None:
        self.log = log
        self.process = subprocess.Popen(argv, env={**os.environ, **env}, stdout=log.open("w"), stderr=subprocess.STDOUT)

    def wait(self, word: str, count: int, seconds: float) -> bool:
        """Until that many lines begin with the word."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            if len(self.said(word)) >= count:
                return True
            time.sleep(0.1)
        return False

    def said(self, word: str) -> list[list[str]]:
        """The lines that begin with the word, in words."""
        lines = [line.split() for line in self.log.read_text().splitlines()]
        return [words for words in lines if words[:1] == [word]]

    def steps_rate(self, start: float, end: float) -> float:
        """Steps a second of those that ended between two times."""
        inside = [t for _, at in self.said("step") if start <= (t := float(at)) <= end]
        return (len(inside) - 1) / (inside[-1] - inside[0]) if len(inside) > 1 else 0.0

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


class Graph:
    """Decoding by a CUDA graph."""

    def __init__(self, args: argparse.Namespace, env: dict[str, str], folder: Path) -> None:
        self.pause, self.file, self.streams = folder / "pause", folder / "times", args.streams
        self.pause.touch()
        argv = [sys.executable, __file__, "--decode", "--shape", args.shape, "--streams", str(args.streams),
                "--times", str(self.file), "--pause", str(self.pause)]  # fmt: skip
        self.child = Lines(argv, env, folder / "decode.log")
        if not self.child.wait("ready", 1, 200):
            raise SystemExit(self.child.log.read_text()[-3000:])

    def measure(self, seconds: float) -> dict[str, float]:
        self.pause.unlink()
        time.sleep(0.5)
        start = time.time()
        time.sleep(seconds)
        rows = [tuple(map(float, line.split())) for line in self.file.read_text().splitlines() if line.count(" ") == 1]
        self.pause.touch()
        took = sorted(x for t, x in rows if t > start)
        itl = load.percentiles(took)
        return {"start": start, "tokens_per_s": len(took) * self.streams / seconds,
                "p50_ms": itl["p50"], "p99_ms": itl["p99"]}  # fmt: skip

    def end(self) -> None:
        self.child.end()


class Vllm:
    """A vLLM that serves a directory, without our plugin, under bench/load.py's closed loop."""

    def __init__(self, args: argparse.Namespace, env: dict[str, str], folder: Path) -> None:
        self.streams, self.url = args.streams, f"http://127.0.0.1:{args.port}"
        argv = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", args.vllm, "--port",
                str(args.port), "--served-model-name", "bench", "--gpu-memory-utilization", "0.4", "--max-model-len",
                "2048", "--no-enable-prefix-caching"]  # fmt: skip
        self.child = Lines(argv, {**env, "VLLM_PLUGINS": ""}, folder / "vllm.log")
        end = time.monotonic() + 400
        while "startup complete" not in self.child.log.read_text():
            if time.monotonic() > end or self.child.process.poll() is not None:
                raise SystemExit(self.child.log.read_text()[-3000:])
            time.sleep(0.5)
        self.measure(3.0)

    def measure(self, seconds: float) -> dict[str, float]:
        shape = load.Shape(url=self.url, model="bench")
        got = asyncio.run(load.measure(shape, streams=self.streams, seconds=seconds, warmup=1.5))
        return {"start": got["start"], "tokens_per_s": got["output_tokens_per_s"], "p50_ms": got["itl_ms"]["p50"],
                "p99_ms": got["itl_ms"]["p99"], "ttft_p50_ms": got["ttft_ms"]["p50"]}  # fmt: skip

    def end(self) -> None:
        self.child.process.terminate()
        self.child.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-8b")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--variants", default="hf,mini+compile,mini+keep+compile,mini+keep+compile:low")
    parser.add_argument("--vllm", metavar="DIRECTORY")
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--no-mps", action="store_true")
    parser.add_argument("--logs", type=Path, help="keep the processes' output here")
    parser.add_argument("--json", type=Path)
    for name in ("--train", "--times", "--pause"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--decode", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.decode or args.train:
        (decode if args.decode else train)(args)
        return

    from coserve import hardware

    from hogwild.config import Settings
    from hogwild.mps import Mps

    folder = args.logs or Path(tempfile.mkdtemp(prefix="hw"))
    folder.mkdir(parents=True, exist_ok=True)
    runtime = Path(tempfile.mkdtemp(prefix="hw"))  # short: sockets are made in it
    mps = None if args.no_mps else Mps.start(Settings(served_model_name="m", runtime_dir=runtime, mps="on"))
    env = mps.environment() if mps else {}
    record: dict[str, Any] = {
        "device": hardware("cuda"), "mps": mps is not None, "shape": args.shape, "train_tokens_per_step": args.tokens,
        "serving": "vllm" if args.vllm else "graph", "streams": args.streams, "pairs": {},
    }  # fmt: skip
    serving = (Vllm if args.vllm else Graph)(args, env, folder)
    try:
        alone = record["serving alone"] = serving.measure(args.seconds)
        print("serving alone", alone, flush=True)
        for variant in args.variants.split(","):
            options = dict(option.partition("=")[::2] for option in variant.split(":")[1:])
            limits = {k[4:]: v for k, v in options.items() if k.startswith("env.")}
            if "low" in options:
                limits["CUDA_MPS_CLIENT_PRIORITY"] = "1"
            if "threads" in options:
                limits["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] = options["threads"]
            argv = [sys.executable, __file__, "--train", variant, "--shape", args.shape, "--tokens", str(args.tokens)]
            trainer = Lines(argv, {**env, **limits}, folder / f"{variant.replace(':', '_').replace('/', '_')}.log")
            try:
                if not trainer.wait("step", 4, 150):
                    print(variant, "did not start:", trainer.log.read_text()[-1500:], flush=True)
                    continue
                start = time.time()
                time.sleep(args.seconds)
                before = trainer.steps_rate(start, time.time())
                both = serving.measure(args.seconds)
                beside = trainer.steps_rate(both["start"], both["start"] + args.seconds)
            finally:
                trainer.end()
            pair = {
                "training_tokens_per_s_alone": before * args.tokens, "training": beside / before if before else None,
                "serving": both["tokens_per_s"] / alone["tokens_per_s"], "p50": both["p50_ms"] / alone["p50_ms"],
                "p99": both["p99_ms"] / alone["p99_ms"], **both,
            }  # fmt: skip
            record["pairs"][variant] = pair
            print(
                f"{variant:32s} training {before * args.tokens:7.0f} tok/s alone, {pair['training']:.0%} beside; "
                f"serving {pair['serving']:.0%}, p50 {pair['p50']:.2f} x, p99 {pair['p99']:.2f} x",
                flush=True,
            )
            if args.json:
                args.json.write_text(json.dumps(record, indent=1) + "\n")
    finally:
        serving.end()
        if mps:
            mps.stop()


if __name__ == "__main__":
    main()
