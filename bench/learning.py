"""Does it learn, and what does it forget? Invented facts taught to a small instruct model, measured before and after.

    python bench/learning.py --model .cache/models/SmolLM2-135M-Instruct             the defaults
    python bench/learning.py --device cuda --cases defaults,optimizers,pushed --plot docs/learning.svg
    python bench/learning.py --device cuda --cases sweep                             how the defaults were found

Cases:

    defaults     what a job gets that names nothing, with replay
    optimizers   the four optimizers at their default rates
    pushed       what happens beyond: four times the rate, no replay, twice the epochs
    sweep        rates for every optimizer, with and without replay, all weights or only those of the MLPs

`learning_task.py` says what recall, drift and replay are. A job with replay r holds the facts once for each epoch and,
shuffled among them, r tokens of the model's own text for each token of facts, every one of them once: text that is
seen again and again is learned by heart and stops saying "stay as you are". Every case starts from the same weights;
`--every` sets how often recall and drift are looked at. Weights are float32 on CPU, and bf16 with stochastic rounding
on CUDA.
"""

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from learning_task import Task, load_task, ordinary_loss, recall, replay_samples

from hogwild.gpu_worker.batch import Sample
from hogwild.gpu_worker.config import DEFAULT_EPOCHS, OPTIMIZERS, TrainConfig
from hogwild.gpu_worker.control import StepReport
from hogwild.gpu_worker.engine import Trainer, Unattended

GOAL_RECALL, GOAL_DRIFT = 0.95, 0.02
SWEEP_RATES = {
    "adamw": (1e-5, 2e-5, 5e-5, 1e-4),
    "apollo": (1e-5, 2e-5, 5e-5, 1e-4),
    "apollo-mini": (2e-6, 5e-6, 1e-5, 3e-5),
    "sgd": (1e-3, 3e-3, 1e-2, 3e-2),
}

MLP = ["*.mlp.*"]

Case = tuple[str, dict[str, Any], float]


def cases(names: list[str], replay: float, epochs: int) -> list[Case]:
    """(name, training options, replay) of each run."""
    out: list[Case] = []
    for name in names:
        if name == "defaults":
            out.append(("defaults", {}, replay))
        elif name == "optimizers":
            out += [(f"optimizer {o}", {"optimizer": o}, replay) for o in OPTIMIZERS]
        elif name == "pushed":
            out += [
                ("pushed: no replay", {}, 0.0),
                ("pushed: 4x rate", {"learning_rate": 4 * TrainConfig().peak_rate}, replay),
                ("pushed: 2x epochs", {"epochs": 2 * epochs}, replay),
            ]
        elif name == "sweep":
            out += [
                ("sweep", {"optimizer": o, "learning_rate": rate, **part}, r)
                for o, rates in SWEEP_RATES.items()
                for rate in rates
                for part in ({}, {"trainable": MLP})
                for r in (0.0, replay)
            ]
        else:
            raise SystemExit(f"unknown case {name}: defaults, optimizers, pushed, sweep")
    return out


class Bench:
    """One model, one task; each case starts from the same weights."""

    def __init__(self, args: argparse.Namespace) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
        self.args = args
        self.tokenizer = AutoTokenizer.from_pretrained(args.model)
        self.model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(args.device).train()
        self.weights = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.task: Task = load_task(self.tokenizer, args.facts)
        self.replay: list[Sample] = []
        """The model's own text, made when a case first needs so much of it."""
        trainer = Trainer(self.model)
        self.loss_before = ordinary_loss(trainer.forward, self.task.heldout)
        trainer.close()
        self.recall_before = recall(self.model, self.tokenizer, self.task)

    def run(self, case: Case) -> dict[str, Any]:
        name, options, replay = case
        self.model.load_state_dict(self.weights)
        options = {"epochs": self.args.epochs} | options
        samples = self.task.facts * options["epochs"]
        samples = samples + self.own_text(int(replay * sum(s.input_tokens for s in samples)))
        trainer = Trainer(self.model)
        config = TrainConfig.from_dict(options | {"epochs": 1, "max_tokens_per_step": self.args.max_tokens_per_step})
        plan = trainer.plan(samples, config)
        every = max(1, round(plan.n_steps * self.args.every))
        curve: list[dict[str, float]] = []
        trained = 0.0

        class Watch(Unattended):
            def after_step(inner, report: StepReport) -> None:
                nonlocal trained
                trained += report.seconds
                point = {"step": report.step + 1, "loss": report.loss, "seconds": trained}
                if (report.step + 1) % every == 0 or report.step + 1 == report.n_steps:
                    point |= self.look(trainer)
                    print(f"  {name}: step {point['step']}/{report.n_steps} loss {report.loss:.3f} "
                          f"recall {point['recall']:.3f} drift {point['drift']:+.4f}", flush=True)  # fmt: skip
                curve.append(point)

        result = trainer.run(plan, Watch())
        trainer.close()
        looks = [p for p in curve if "recall" in p]
        reached = next((p["step"] for p in looks if p["recall"] >= GOAL_RECALL), None)
        return {
            "name": name, "options": options, "replay": replay, "optimizer": config.optimizer,
            "learning_rate": config.peak_rate, "steps": plan.n_steps, "tokens": plan.tokens,
            "recall": looks[-1]["recall"], "drift": looks[-1]["drift"], "steps_to_goal_recall": reached,
            "good": looks[-1]["recall"] >= GOAL_RECALL and looks[-1]["drift"] <= GOAL_DRIFT,
            "seconds": trained, "optimizer_bytes": result.optimizer_bytes, "peak_bytes": result.peak_bytes,
            "curve": curve,
        }  # fmt: skip

    def own_text(self, tokens: int) -> list[Sample]:
        """So many tokens of text by the untouched model; the live weights must be untouched too."""
        while sum(s.input_tokens for s in self.replay) < tokens:
            self.replay += replay_samples(self.model, self.tokenizer, seed=len(self.replay))
        chosen: list[Sample] = []
        have = 0
        for sample in self.replay:
            if have >= tokens:
                break
            chosen.append(sample)
            have += sample.input_tokens
        return chosen

    def look(self, trainer: Trainer) -> dict[str, float]:
        loss = ordinary_loss(trainer.forward, self.task.heldout)
        return {"recall": recall(self.model, self.tokenizer, self.task), "drift": loss / self.loss_before - 1}


def plot(record: dict[str, Any], path: Path) -> None:
    """Loss, recall and drift over the steps of every case."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4))
    for case in record["cases"]:
        curve = case["curve"]
        looks = [p for p in curve if "recall" in p]
        label = f"{case['name']} ({case['learning_rate']:g})"
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
    parser.add_argument("--cases", default="defaults")
    parser.add_argument("--facts", type=int, help="facts of each of the six relations (default: all four)")
    parser.add_argument("--epochs", type=int, default=DEFAULT_EPOCHS)
    parser.add_argument("--replay", type=float, default=2.0, help="tokens of the model's own text for each of facts")
    parser.add_argument("--max-tokens-per-step", type=int, default=1024)
    parser.add_argument("--every", type=float, default=0.25, help="share of the steps between looks")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--plot", type=Path, help="draw the curves here (needs matplotlib)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    started = time.time()
    bench = Bench(args)
    print(f"{bench.task.n_facts} facts, {len(bench.task.facts)} samples, {len(bench.task.questions)} questions; "
          f"before: recall {bench.recall_before:.3f}, ordinary loss {bench.loss_before:.4f}", flush=True)  # fmt: skip
    record: dict[str, Any] = {
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "machine": torch.cuda.get_device_name() if args.device == "cuda" else platform.machine(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "facts": bench.task.n_facts, "questions": len(bench.task.questions), "recall_before": bench.recall_before,
        "ordinary_loss_before": bench.loss_before, "cases": [],
    }  # fmt: skip
    for case in cases(args.cases.split(","), args.replay, args.epochs):
        record["cases"].append(bench.run(case))
        record["seconds"] = time.time() - started
        if args.json:  # after every case: a run that is cut short leaves what it had
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(record, indent=1) + "\n")
    for c in record["cases"]:
        part = ",".join(c["options"].get("trainable", ["all"]))
        print(f"{c['name']:20s} {c['optimizer']:12s} {c['learning_rate']:8.1e} replay {c['replay']:g} {part:10s} "
              f"{c['steps']:4d} steps  "
              f"recall {c['recall']:.3f}  drift {c['drift']:+.4f}  {'good' if c['good'] else ''}")  # fmt: skip
    if args.plot:
        plot(record, args.plot)


if __name__ == "__main__":
    main()
