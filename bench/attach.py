"""What sharing costs: at vLLM's load, in memory, and when a worker attaches.

Each repeat loads the model through vLLM's own loader in a fresh process, without and with the plugin in turn (file
cache warm), then attaches from another process:

  load       seconds in vLLM's load_model; with the plugin this includes tracing, hashing, comparing, the manifest
             (goal: under 5 % more)
  memory     bytes that vLLM's process holds afterwards, shared ones included, and on a GPU what the card holds (goal:
             no more)
  attach     manifest → views; verify: every view hashed, against reading the files (goal: under 2×); build: the
             Hugging Face model on the views

Run: python bench/attach.py [--model DIR] [--device cpu|cuda] [--repeats 5]
Writes bench/results/attach-<device>.json.
"""

import argparse
import gc
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

ROOT = Path(__file__).parents[1]


def load(model: Path, device: str) -> dict[str, Any]:
    """In a child: load once, say how long it took and what is held, then wait to be told to end."""
    import psutil
    import torch

    sys.path.insert(0, str(ROOT / "tests" / "acceptance"))
    from architectures import Server
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    server = Server(device)
    config = json.loads((model / "config.json").read_text())
    server.dtype = config.get("dtype") or config.get("torch_dtype") or server.dtype
    process = psutil.Process()
    import vllm.model_executor.model_loader.base_loader as base_loader

    seconds: list[float] = []
    loader = base_loader.BaseModelLoader
    wrapped = loader.load_model

    def timed(*args: Any, **kwargs: Any) -> Any:
        gc.collect()
        started = time.perf_counter()
        result = wrapped(*args, **kwargs)
        seconds.append(time.perf_counter() - started)
        return result

    loader.load_model = timed
    before = process.memory_info()
    held = server.load(model, "bench")
    gc.collect()
    after = process.memory_info()
    row = {"seconds": seconds[0], "bytes": after.rss - before.rss - (after.shared - before.shared) + _shared(process)}
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        row["gpu_bytes"] = total - free
    row["parameters_bytes"] = sum({p.data_ptr(): p.nbytes for p in held.parameters()}.values())
    return row


def _shared(process: Any) -> int:
    """Bytes of anonymous shared memory that the process maps: the arena. Mapped files (the checkpoint) don't count."""
    return sum(m.rss for m in process.memory_maps(grouped=False) if "memfd:hogwild" in m.path)


def child(arguments: argparse.Namespace, runtime: Path, *, plugin: bool) -> subprocess.Popen[str]:
    """A process that runs `load` with or without the plugin."""
    environment = {
        **os.environ, "HOGWILD_RUNTIME_DIR": str(runtime), "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    environment.update({} if plugin else {"HOGWILD_DISABLE": "1"})
    command = [sys.executable, __file__, "--load", str(arguments.model), "--device", arguments.device]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The child's one line of JSON."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            found: dict[str, Any] = json.loads(line)
            return found
    raise SystemExit(f"the load failed with exit code {process.wait()}")


def read_files(model: Path) -> tuple[float, int]:
    """Seconds and bytes of reading the checkpoint's weight files once."""
    buffer = memoryview(bytearray(16 << 20))
    started, size = time.perf_counter(), 0
    for path in sorted(model.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                size += count
    return time.perf_counter() - started, size


def worker_side(runtime: Path) -> dict[str, float]:
    """Attach, verify, build: in this process, as the worker does."""
    from hogwild.gpu_worker.attach import attach
    from hogwild.gpu_worker.model import build_model

    with attach(runtime) as attachment:
        verified = attachment.verify()
        started = time.perf_counter()
        model = build_model(attachment)
        row = {"attach": attachment.seconds, "verify": verified.seconds, "build": time.perf_counter() - started,
               "views": len(attachment.views), "bytes": verified.nbytes}  # fmt: skip
        del model
        gc.collect()
    return row


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / ".cache/models/SmolLM2-135M-Instruct")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        print(json.dumps(load(arguments.load, arguments.device)), flush=True)
        sys.stdin.read()
        os._exit(0)  # vLLM's own shutdown is not what is measured

    runtime = Path(tempfile.mkdtemp(prefix="hogwild-attach-"))
    loads: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
    workers: list[dict[str, float]] = []
    reads: list[float] = []
    read_files(arguments.model)
    for repeat in range(arguments.repeats):
        for plugin in (False, True) if repeat % 2 else (True, False):  # neither always goes first
            process = child(arguments, runtime, plugin=plugin)
            loads[plugin].append(answer(process))
            if plugin:
                workers.append(worker_side(runtime / "bench"))
                seconds, size = read_files(arguments.model)
                reads.append(seconds)
            process.communicate()
        last = {plugin: rows[-1]["seconds"] for plugin, rows in loads.items()}
        print(f"repeat {repeat + 1}: {last[False]:.2f} s without, {last[True]:.2f} s with", flush=True)

    def middle(rows: list[dict[str, Any]], key: str) -> float:
        return float(statistics.median(row[key] for row in rows))

    without, with_plugin = middle(loads[False], "seconds"), middle(loads[True], "seconds")
    gigabytes = size / 1e9
    result = {
        "device": arguments.device, "model": arguments.model.name, "file_bytes": size, "repeats": arguments.repeats,
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "load_seconds": {"without": without, "with": with_plugin, "ratio": with_plugin / without},
        "memory_bytes": {"without": middle(loads[False], "bytes"), "with": middle(loads[True], "bytes")},
        "attach_seconds": middle(workers, "attach"), "build_seconds": middle(workers, "build"),
        "verify_seconds": middle(workers, "verify"), "verify_seconds_per_gb": middle(workers, "verify") / gigabytes,
        "read_files_seconds": statistics.median(reads), "views": int(workers[0]["views"]),
        "verify_against_read": middle(workers, "verify") / statistics.median(reads),
        "all": {"without": loads[False], "with": loads[True], "worker": workers, "read": reads},
    }  # fmt: skip
    if arguments.device == "cuda":
        held = {name: middle(loads[plugin], "gpu_bytes") for name, plugin in (("without", False), ("with", True))}
        result["gpu_bytes"] = held
    out = arguments.out or ROOT / "bench" / "results" / f"attach-{arguments.device}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"load     {without:.2f} s without, {with_plugin:.2f} s with the plugin: {with_plugin / without:.3f}×")
    memory = result["memory_bytes"]
    print(f"memory   {memory['without'] / 1e6:.0f} MB without, {memory['with'] / 1e6:.0f} MB with")
    print(f"attach   {result['attach_seconds'] * 1e3:.1f} ms for {result['views']} views")
    verify = result["verify_seconds_per_gb"], result["verify_against_read"]
    print(f"verify   {verify[0]:.3f} s/GB, {verify[1]:.2f}× reading the files")
    print(f"build    {result['build_seconds']:.2f} s")


if __name__ == "__main__":
    main()
