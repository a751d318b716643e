"""Training speed and memory against what people would use otherwise: same model, same rows, one run, ratios in JSON.

    python bench/train.py --device cpu --model .cache/models/SmolLM2-135M-Instruct --tokens 256
    python bench/train.py --device cuda --shape qwen3-8b --tokens 4096 --steps 12 --memory-limit-gb 4
    python bench/train.py --device cuda --shape qwen3-8b --variants none,mini,mini+compile,mini+keep,mini+keep+compile

Variants (comma-separated):

    mini, apollo, adamw, sgd   Hogwild's engine with that optimizer; `none`: the engine with the update left out, which
                               is what the optimizer's share of a step is measured against
    …+compile                  decoder layers through torch.compile
    …+keep                     no memory limit: keep the activations of as many layers as fit
    …+masks                    transformers' SDPA with masks instead of the packed flash attention (CUDA)
    loop                       plain loop, torch's fused AdamW, transformers' loss, gradient checkpointing
    trainer                    transformers' Trainer with fused AdamW
    trainer-apollo             transformers' Trainer with its APOLLO-Mini integration (needs the package apollo-torch,
                               whose licence is CC-BY-NC: never a dependency, only measured here when it is there)

Every variant runs in a process of its own, in turn, `--rounds` times; the median step counts. A row is `--samples`
samples that together have `--tokens` tokens; the loss is on the last quarter of each. What is out of memory or not
installed says so in the result.
"""

import argparse
import importlib.util
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 2048, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True,
    },
    "qwen3-0.6b": {
        "vocab_size": 151_936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
    },
    "qwen3-8b": {
        "vocab_size": 151_936, "hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
    },
}  # fmt: skip
OURS = {"mini": "apollo-mini", "apollo": "apollo", "adamw": "adamw", "sgd": "sgd", "none": "sgd"}
DEFAULT = "none,mini,apollo,adamw,loop,trainer,trainer-apollo"


def build_model(args: argparse.Namespace) -> Any:
    """The model on its device, bf16 on CUDA, float32 on CPU (bf16 is slower there)."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    torch.manual_seed(0)
    if args.model:
        return AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(args.device).train()
    config = Qwen3Config(**SHAPES[args.shape], max_position_embeddings=40_960, dtype=dtype)
    with torch.device(args.device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).train()


def rows(args: argparse.Namespace, vocabulary: int, count: int) -> list[list[list[int]]]:
    """`count` rows of `--samples` token lists each."""
    g = torch.Generator().manual_seed(1)
    length = args.tokens // args.samples
    return [
        [torch.randint(10, vocabulary - 10, (length + 1,), generator=g).tolist() for _ in range(args.samples)]
        for _ in range(count)
    ]


class Clock:
    """Seconds of each step, by the wall clock with the device waited for."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.marks: list[float] = []

    def mark(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        self.marks.append(time.perf_counter())

    def steps(self, warmup: int) -> list[float]:
        return [b - a for a, b in zip(self.marks, self.marks[1:], strict=False)][warmup:]


def run_ours(args: argparse.Namespace, model: Any, kind: str, options: set[str], clock: Clock) -> dict[str, Any]:
    from hogwild.gpu_worker import attention
    from hogwild.gpu_worker.batch import Sample
    from hogwild.gpu_worker.config import TrainConfig
    from hogwild.gpu_worker.engine import Trainer, Unattended
    from hogwild.gpu_worker.optim import SGD

    if "masks" in options:
        attention.register = lambda: (_ for _ in ()).throw(attention.Unsupported("switched off"))  # type: ignore[assignment]
    keep = "keep" in options or args.memory_limit_gb is None
    limit = None if keep else int(args.memory_limit_gb * 1e9) + torch.cuda.memory_allocated() * (args.device == "cuda")
    trainer = Trainer(model, memory_limit=limit, compile_layers="compile" in options)
    quarter = 3 * (args.tokens // args.samples) // 4
    n = args.warmup + args.steps
    samples = [Sample(ids[:quarter], ids[quarter:]) for row in rows(args, model.config.vocab_size, n) for ids in row]
    config = TrainConfig(
        optimizer=OURS[kind], learning_rate=1e-5, steps=n, shuffle=False, max_tokens_per_step=args.tokens
    )
    plan = trainer.plan(samples, config)
    if kind == "none":
        # The hooks free each gradient; the update alone is left out.
        trainer.optimizer = SGD()
        trainer.optimizer.update = lambda name, p, g, *rest: torch.ones((), device=p.device)  # type: ignore[method-assign]

    class Timed(Unattended):
        def before_step(self, step: int) -> None:
            if step == 0:
                clock.mark()

        def after_step(self, report: Any) -> None:
            clock.mark()

    result = trainer.run(plan, Timed())
    kernels = kernels_of(trainer, samples[:args.samples], config, args) if args.kernels else None
    return {
        **({"kernels": kernels} if kernels else {}),
        "losses": result.losses, "kept_layers": plan.budget.kept_layers, "layers": trainer.profile().layers,
        "planned_bytes": plan.budget.total, "optimizer_bytes": result.optimizer_bytes,
        "attention": model.config._attn_implementation, "packs": trainer.forward.abilities.packs,
        "tokens_per_step": result.tokens // n,
    }  # fmt: skip


def kernels_of(trainer: Any, samples: list[Any], config: Any, args: argparse.Namespace) -> list[dict[str, Any]]:
    """What one more step spends the device's time on: the most expensive kernels, with the sum of all; on CUDA also
    when it had nothing to do, by what came after."""
    from torch.profiler import ProfilerActivity, profile

    cuda = args.device == "cuda"
    plan = trainer.plan(samples, replace(config, steps=1))
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as found:
        trainer.run(plan)
    field = "self_device_time_total" if cuda else "self_cpu_time_total"
    times = [(getattr(e, field), e.count, e.key) for e in found.key_averages()]
    rows = sorted(times, reverse=True)[: args.kernels]
    all_of_them = (sum(t for t, _, _ in times), sum(n for _, n, _ in times), "all")
    rows = [all_of_them, *rows, *(idle_before(found.events()) if cuda else [])]
    return [{"name": name[:160], "ms": t / 1e3, "count": n} for t, n, name in rows]


def idle_before(events: Any) -> list[tuple[float, int, str]]:
    """(µs, times, name) of the ten longest idle times of the device, by the kernel that ended them, after their sum."""
    cuda = torch.autograd.DeviceType.CUDA
    on_device = sorted((e.time_range.start, e.time_range.end, e.name) for e in events if e.device_type == cuda)
    idle: dict[str, list[float]] = {}
    until = on_device[0][0] if on_device else 0.0
    for start, end, name in on_device:
        if start > until:
            idle.setdefault(name, []).append(start - until)
        until = max(until, end)
    rows = sorted(((sum(gaps), len(gaps), f"idle before {name}") for name, gaps in idle.items()), reverse=True)
    return [(sum(t for t, _, _ in rows), sum(n for _, n, _ in rows), "idle"), *rows[:10]]


def hf_batch(args: argparse.Namespace, row: list[list[int]]) -> dict[str, list[int]]:
    """One row as transformers takes it: positions that start again, -100 where there is no loss."""
    ids, labels, positions = [], [], []
    for sample in row:
        quarter = 3 * (args.tokens // args.samples) // 4
        ids += sample
        labels += [-100] * quarter + sample[quarter:]
        positions += list(range(len(sample)))
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def run_loop(args: argparse.Namespace, model: Any, clock: Clock) -> dict[str, Any]:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
    losses = []
    clock.mark()
    for row in rows(args, model.config.vocab_size, args.warmup + args.steps):
        batch = {k: torch.tensor([v], device=args.device) for k, v in hf_batch(args, row).items()}
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        clock.mark()
    return {"losses": losses}


def run_trainer(args: argparse.Namespace, model: Any, optimizer: str, clock: Clock) -> dict[str, Any]:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Timed(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.mark()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.mark()

    data = [hf_batch(args, row) for row in rows(args, model.config.vocab_size, args.warmup + args.steps)]
    extra: dict[str, Any] = {}
    if optimizer.startswith("apollo"):
        stand_in_for_bitsandbytes()
        extra = {
            "optim_target_modules": [r".*attn.*", r".*mlp.*"],
            "optim_args": "proj=random,rank=1,scale=128,scale_type=tensor,update_proj_gap=200",
        }
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=1, max_steps=len(data), learning_rate=1e-5, optim=optimizer,
            lr_scheduler_type="constant", gradient_checkpointing=True, report_to=[], save_strategy="no",
            gradient_checkpointing_kwargs={"use_reentrant": False}, logging_strategy="no", disable_tqdm=True,
            use_cpu=args.device == "cpu", dataloader_pin_memory=False, **extra,
        )  # fmt: skip
        out = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[Timed()]).train()
    return {"losses": [out.training_loss]}


def stand_in_for_bitsandbytes() -> None:
    """apollo-torch imports bitsandbytes for 8-bit variants, not measured here: names with nothing behind them."""
    if importlib.util.find_spec("bitsandbytes") is not None:
        return
    names = ("bitsandbytes", "bitsandbytes.optim", "bitsandbytes.optim.optimizer", "bitsandbytes.functional")
    modules = {name: types.ModuleType(name) for name in names}
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    modules["bitsandbytes.optim.optimizer"].Optimizer2State = torch.optim.Optimizer  # type: ignore[attr-defined]
    sys.modules |= modules


def run_one(args: argparse.Namespace) -> dict[str, Any]:
    """One variant in this process."""
    kind, *options = args.one.split("+")
    if kind == "trainer-apollo" and importlib.util.find_spec("apollo_torch") is None:
        return {"error": "apollo-torch is not installed"}
    if args.threads:
        torch.set_num_threads(args.threads)
    model = build_model(args)
    cuda = args.device == "cuda"
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    numbers = sum(p.numel() for p in model.parameters())
    rss_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    clock = Clock(args.device)
    try:
        if kind in OURS:
            out = run_ours(args, model, kind, set(options), clock)
        elif kind == "loop":
            out = run_loop(args, model, clock)
        else:
            out = run_trainer(args, model, "apollo_adamw" if kind == "trainer-apollo" else "adamw_torch_fused", clock)
    except torch.OutOfMemoryError as e:
        return {"error": f"out of memory: {str(e).splitlines()[0]}"}
    seconds = clock.steps(args.warmup)
    step = statistics.median(seconds)
    tokens = args.tokens // args.samples * args.samples
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "step_seconds": step, "steps_seconds": seconds, "tokens_per_second": tokens / step,
        "model_tflops": 6 * numbers * tokens / step / 1e12, "parameters": numbers, "weights_bytes": weights,
        "peak_bytes": peak, "peak_above_weights_bytes": peak - (weights if cuda else rss_before),
    } | out  # fmt: skip


def compare(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Ratios between the variants that ran."""
    ran = {k: r for k, r in results.items() if "error" not in r}
    ours = {k: r for k, r in ran.items() if k.split("+")[0] in OURS and not k.startswith("none")}
    out: dict[str, Any] = {"speedup": {}, "peak_above_weights_ratio": {}, "optimizer_share_of_step": {}}
    for k, r in ours.items():
        for other in ("loop", "trainer", "trainer-apollo"):
            if other in ran:
                out["speedup"][f"{k} / {other}"] = r["tokens_per_second"] / ran[other]["tokens_per_second"]
                out["peak_above_weights_ratio"][f"{k} / {other}"] = (
                    r["peak_above_weights_bytes"] / ran[other]["peak_above_weights_bytes"]
                )
        base = ran.get("+".join(["none", *k.split("+")[1:]]))
        if base is not None:
            out["optimizer_share_of_step"][k] = 1 - base["step_seconds"] / r["step_seconds"]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tiny", help="random weights of this shape")
    parser.add_argument("--model", help="a model directory instead of a shape")
    parser.add_argument("--tokens", type=int, default=256, help="input tokens in a step")
    parser.add_argument("--samples", type=int, default=1, help="samples that share the row")
    parser.add_argument("--steps", type=int, default=5, help="measured steps")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--variants", default=DEFAULT)
    parser.add_argument("--memory-limit-gb", type=float, help="what training may take beside the weights (CUDA)")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--kernels", type=int, default=0, help="of ours, also list this many of a step's kernels")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print("RESULT " + json.dumps(run_one(args)), flush=True)
        return
    rounds: dict[str, list[dict[str, Any]]] = {}
    record: dict[str, Any] = {
        "settings": {k: v for k, v in vars(args).items() if k not in ("one", "json")},
        "machine": torch.cuda.get_device_name() if args.device == "cuda" else platform.machine(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }  # fmt: skip
    for _ in range(args.rounds):
        for variant in args.variants.split(","):
            print(f"{variant:18s} ", end="", flush=True)
            done = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--one", variant], capture_output=True, text=True,
                check=False,
            )  # fmt: skip
            line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT ")), None)
            last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
            result = json.loads(line[7:]) if line else {"error": last[0]}
            rounds.setdefault(variant, []).append(result)
            print(result.get("error") or f"{result['tokens_per_second']:10.1f} tok/s  "
                  f"{result['peak_above_weights_bytes'] / 1e9:7.3f} GB above the weights", flush=True)  # fmt: skip
            best = {k: min(rs, key=lambda r: r.get("step_seconds", float("inf"))) for k, rs in rounds.items()}
            record |= {"results": best, "ratios": compare(best)}
            if args.json:  # after every variant: a run that is cut short leaves what it had
                args.json.parent.mkdir(parents=True, exist_ok=True)
                args.json.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["ratios"], indent=1))


if __name__ == "__main__":
    main()
