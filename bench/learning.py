"""Does it learn, and what does it forget? Invented facts taught to a small instruct model, measured before and after.

    python bench/learning.py --model .cache/models/SmolLM2-135M-Instruct             the defaults
    python bench/learning.py --device cuda --cases defaults optimizers pushed

Cases:

    defaults     what a job gets that names nothing
    optimizers   the four optimizers, each at three rates; the plot shows the best of each
    pushed       what happens beyond: no replay, a quarter and four times the rate, twice the epochs

`learning_task.py` says what recall and drift are; replay is the engine's own (`gpu_worker/replay.py`). Every case
starts from the same weights; `--every` sets how often recall and drift are looked at. Weights are float32 on CPU, and
bf16 with stochastic rounding on CUDA unless `--dtype` says otherwise.
"""

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from learning_task import Task, load_task, ordinary_loss, recall

from hogwild.errors import NonFinite
from hogwild.gpu_worker.config import OPTIMIZERS, TrainConfig
from hogwild.gpu_worker.control import StepReport
from hogwild.gpu_worker.engine import Trainer, Unattended
from hogwild.gpu_worker.replay import OwnText

GOAL_RECALL, GOAL_DRIFT = 0.95, 0.02
RATES = {
    "apollo": (2e-4, 4e-4, 8e-4),
    "apollo-mini": (1.2e-4, 2.4e-4, 4.8e-4),
    "adamw": (1.2e-4, 2.4e-4, 4.8e-4),
    "sgd": (2e-3, 5e-3, 1e-2),
}

Case = tuple[str, dict[str, Any]]


def cases(names: list[str]) -> list[Case]:
    """(name, training options) of each run."""
    out: list[Case] = []
    rate = TrainConfig().peak_rate
    for name in names:
        if name == "defaults":
            out.append(("defaults", {}))
        elif name == "optimizers":
            out += [
                (f"{o} {rate:g}", {"optimizer": o, "learning_rate": rate}) for o in OPTIMIZERS for rate in RATES[o]
            ]
        elif name == "pushed":
            out += [
                ("pushed: no replay", {"replay": 0.0}),
                ("pushed: rate / 4", {"learning_rate": rate / 4}),
                ("pushed: 4x rate", {"learning_rate": 4 * rate}),
                ("pushed: 2x epochs", {"epochs": 16}),
            ]
        elif name.startswith("{"):
            options = json.loads(name)
            out.append((", ".join(f"{k} {v}" for k, v in options.items()), options))
        else:
            raise SystemExit(f"unknown case {name}: defaults, optimizers, pushed, or a JSON object of options")
    return out


class Bench:
    """One model, one task; each case starts from the same weights."""

    def __init__(self, args: argparse.Namespace) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        dtype = getattr(torch, args.dtype or ("bfloat16" if args.device == "cuda" else "float32"))
        self.args = args
        self.tokenizer = AutoTokenizer.from_pretrained(args.model)
        self.model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(args.device).train()
        self.weights = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.task: Task = load_task(self.tokenizer, args.facts)
        self.own_text = OwnText.for_model(Path(args.model))
        trainer = Trainer(self.model)
        self.loss_before = ordinary_loss(trainer.forward, self.task.heldout)
        trainer.close()
        self.recall_before = recall(self.model, self.tokenizer, self.task)

    def run(self, case: Case) -> dict[str, Any]:
        name, options = case
        self.model.load_state_dict(self.weights)
        trainer = Trainer(self.model, own_text=self.own_text)
        config = TrainConfig.from_dict(options)
        plan = trainer.plan(self.task.facts, config)
        every = max(1, round(plan.n_steps * self.args.every))
        curve: list[dict[str, float]] = []
        trained = 0.0

        class Watch(Unattended):
            def after_step(inner, report: StepReport) -> None:
                nonlocal trained
                trained += report.seconds
                point = {"step": report.step + 1, "loss": report.loss, "seconds": trained,
                         "replay_divergence": report.replay_divergence}  # fmt: skip
                if (report.step + 1) % every == 0 or report.step + 1 == report.n_steps:
                    point |= self.look(trainer)
                    print(f"  {name}: step {point['step']}/{report.n_steps} loss {report.loss:.3f} "
                          f"recall {point['recall']:.3f} drift {point['drift']:+.4f}", flush=True)  # fmt: skip
                curve.append(point)

        try:
            result = trainer.run(plan, Watch())
        except NonFinite as error:
            print(f"  {name}: {error.message}", flush=True)
            return {"name": name, "options": options, "failed": error.message}
        finally:
            trainer.close()
        looks = [p for p in curve if "recall" in p]
        reached = next((p["step"] for p in looks if p["recall"] >= GOAL_RECALL), None)
        return {
            "name": name, "options": options, "replay": config.replay, "optimizer": config.optimizer,
            "learning_rate": config.peak_rate, "steps": plan.n_steps, "tokens": plan.tokens,
            "recall": looks[-1]["recall"], "drift": looks[-1]["drift"], "steps_to_goal_recall": reached,
            "good": looks[-1]["recall"] >= GOAL_RECALL and looks[-1]["drift"] <= GOAL_DRIFT,
            "seconds": trained, "optimizer_bytes": result.optimizer_bytes, "peak_bytes": result.peak_bytes,
            "curve": curve,
        }  # fmt: skip

    def look(self, trainer: Trainer) -> dict[str, float]:
        loss = ordinary_loss(trainer.forward, self.task.heldout)
        return {"recall": recall(self.model, self.tokenizer, self.task), "drift": loss / self.loss_before - 1}


def finished(case: dict[str, Any]) -> bool:
    return "failed" not in case


def best_of_each(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of every optimizer, with and without replay, the case that learned most for what it spoiled."""
    best: dict[tuple[str, float], dict[str, Any]] = {}
    for case in filter(finished, cases):
        key = (case["optimizer"], case["replay"])
        if key not in best or case["recall"] - case["drift"] > best[key]["recall"] - best[key]["drift"]:
            best[key] = case
    return list(best.values())


def plot(record: dict[str, Any], path: Path) -> None:
    """Loss, recall and drift over the steps of every case."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4))
    for case in best_of_each(record["cases"]):
        curve = case["curve"]
        looks = [p for p in curve if "recall" in p]
        replay = "" if case["replay"] == 1 else f", replay {case['replay']:g}"
        label = f"{case['optimizer']} {case['learning_rate']:g}{replay}"
        axes[0].plot([p["step"] for p in curve], [p["loss"] for p in curve], label=label, linewidth=1)
        axes[1].plot([p["step"] for p in looks], [p["recall"] for p in looks], marker=".", label=label)
        axes[2].plot([p["step"] for p in looks], [100 * p["drift"] for p in looks], marker=".", label=label)
    for axis, title in zip(axes, ("training loss (nats)", "recall", "drift on ordinary text (%)"), strict=True):
        axis.set_title(title)
        axis.set_xlabel("optimizer step")
    axes[1].axhline(GOAL_RECALL, color="grey", linewidth=0.5)
    axes[2].axhline(100 * GOAL_DRIFT, color="grey", linewidth=0.5)
    axes[0].legend(fontsize="x-small")
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".cache/models/SmolLM2-135M-Instruct", help="a model directory")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cases", nargs="+", default=["defaults"], help="or options as a JSON object")
    parser.add_argument("--facts", type=int, help="facts of each of the six relations (default: all four)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--every", type=float, default=0.25, help="share of the steps between looks")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--append", action="store_true", help="add to the cases that the results hold already")
    parser.add_argument("--plot", type=Path, help="draw the curves here (needs matplotlib)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    started = time.time()
    bench = Bench(args)
    print(f"{bench.task.n_facts} facts, {len(bench.task.facts)} samples, {len(bench.task.questions)} questions; "
          f"before: recall {bench.recall_before:.3f}, ordinary loss {bench.loss_before:.4f}", flush=True)  # fmt: skip
    record: dict[str, Any] = {
        "settings": {"model": Path(args.model).name, "device": args.device, "dtype": str(bench.model.dtype)},
        "machine": torch.cuda.get_device_name() if args.device == "cuda" else platform.machine(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "facts": bench.task.n_facts, "questions": len(bench.task.questions), "recall_before": bench.recall_before,
        "ordinary_loss_before": bench.loss_before, "cases": [],
    }  # fmt: skip
    if args.append:
        record["cases"] = json.loads(args.json.read_text())["cases"]
    for case in cases(args.cases):
        record["cases"].append(bench.run(case))
        record["seconds"] = time.time() - started
        if args.json:  # after every case: a run that is cut short leaves what it had
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(record, indent=1) + "\n")
    for c in filter(finished, record["cases"]):
        print(f"{c['name']:20s} {c['optimizer']:12s} {c['learning_rate']:8.1e} replay {c['replay']:g} "
              f"{c['steps']:4d} steps  "
              f"recall {c['recall']:.3f}  drift {c['drift']:+.4f}  {'good' if c['good'] else ''}")  # fmt: skip
    if args.plot:
        plot(record, args.plot)


if __name__ == "__main__":
    main()
