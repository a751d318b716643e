"""What sharing costs: at vLLM's load, in memory, and when a worker attaches.

Each repeat loads the model through vLLM's own loader in a fresh process, without and with the plugin in turn (file
cache warm), then attaches from another process:

  load       seconds in vLLM's load_model: stock; on a CPU also unpacked (stock, but linear layers left on F.linear, as
             sharing needs them: vLLM then doesn't pack weights); and with the plugin, which adds tracing, hashing,
             comparing and the manifest (goal: under 5 % more than the load it is added to). Wall clock, fastest of
             all repeats; CPU time of the loading thread, which other load on the machine hardly moves; CPU time of
             all threads, which includes hashing and page faults beside the load
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


def load(model: Path, device: str, variant: str) -> dict[str, Any]:
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

    times: list[dict[str, float]] = []
    loader = base_loader.BaseModelLoader
    wrapped = loader.load_model

    def timed(*args: Any, **kwargs: Any) -> Any:
        gc.collect()
        clocks = {"seconds": time.perf_counter, "thread_seconds": time.thread_time, "cpu_seconds": time.process_time}
        began = {name: clock() for name, clock in clocks.items()}
        result = wrapped(*args, **kwargs)
        times.append({name: clock() - began[name] for name, clock in clocks.items()})
        return result

    loader.load_model = timed
    if variant == "unpacked":
        from vllm.model_executor.layers import utils

        def plain(layer: Any, remove_weight: bool) -> None:
            layer.cpu_linear = torch.nn.functional.linear

        utils.dispatch_cpu_unquantized_gemm = plain
    before = process.memory_info()
    held = server.load(model, "bench")
    gc.collect()
    after = process.memory_info()
    held_bytes = after.rss - before.rss - (after.shared - before.shared) + _shared(process)
    row: dict[str, Any] = {**times[0], "bytes": held_bytes}
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        row["gpu_bytes"] = total - free
    row["parameters_bytes"] = sum({p.data_ptr(): p.nbytes for p in held.parameters()}.values())
    return row


def _shared(process: Any) -> int:
    """Bytes of anonymous shared memory that the process maps: the arena. Mapped files (the checkpoint) don't count."""
    return sum(m.rss for m in process.memory_maps(grouped=False) if "memfd:hogwild" in m.path)


def child(arguments: argparse.Namespace, runtime: Path, variant: str) -> subprocess.Popen[str]:
    """A process that runs `load`."""
    environment = {
        **os.environ, "HOGWILD_RUNTIME_DIR": str(runtime), "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    environment.update({} if variant == "plugin" else {"HOGWILD_DISABLE": "1"})
    command = [sys.executable, __file__, "--load", str(arguments.model), "--device", arguments.device]
    command += ["--variant", variant]
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
    parser.add_argument("--variant", default="plugin", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        print(json.dumps(load(arguments.load, arguments.device, arguments.variant)), flush=True)
        sys.stdin.read()
        os._exit(0)  # vLLM's own shutdown is not what is measured

    runtime = Path(tempfile.mkdtemp(prefix="hogwild-attach-"))
    variants = ["stock", "unpacked", "plugin"] if arguments.device == "cpu" else ["stock", "plugin"]
    loads: dict[str, list[dict[str, Any]]] = {variant: [] for variant in variants}
    workers: list[dict[str, float]] = []
    reads: list[float] = []
    read_files(arguments.model)
    for repeat in range(arguments.repeats):
        for variant in variants[repeat % len(variants) :] + variants[: repeat % len(variants)]:  # none is always first
            process = child(arguments, runtime, variant)
            loads[variant].append(answer(process))
            if variant == "plugin":
                workers.append(worker_side(runtime / "bench"))
                seconds, size = read_files(arguments.model)
                reads.append(seconds)
            process.communicate()
        shown = ", ".join(f"{variant} {rows[-1]['seconds']:.2f} s" for variant, rows in loads.items())
        print(f"repeat {repeat + 1}: {shown}", flush=True)

    def middle(rows: list[dict[str, Any]], key: str) -> float:
        return float(statistics.median(row[key] for row in rows))

    # The fastest of each: whatever else runs on the machine only ever adds.
    load_seconds = {variant: min(row["seconds"] for row in rows) for variant, rows in loads.items()}
    thread = {variant: middle(rows, "thread_seconds") for variant, rows in loads.items()}
    cpu = {variant: middle(rows, "cpu_seconds") for variant, rows in loads.items()}
    base = variants[-2]  # the load that sharing is added to
    result = {
        "device": arguments.device, "model": arguments.model.name, "file_bytes": size, "repeats": arguments.repeats,
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "load_seconds": load_seconds, "load_ratio": load_seconds["plugin"] / load_seconds[base],
        "load_thread_seconds": thread, "load_thread_ratio": thread["plugin"] / thread[base], "load_cpu_seconds": cpu,
        "memory_bytes": {variant: middle(rows, "bytes") for variant, rows in loads.items()},
        "attach_seconds": middle(workers, "attach"), "build_seconds": middle(workers, "build"),
        "verify_seconds": middle(workers, "verify"), "verify_seconds_per_gb": middle(workers, "verify") / size * 1e9,
        "read_files_seconds": statistics.median(reads), "views": int(workers[0]["views"]),
        "verify_against_read": middle(workers, "verify") / statistics.median(reads),
        "all": {**loads, "worker": workers, "read": reads},
    }  # fmt: skip
    if arguments.device == "cuda":
        result["gpu_bytes"] = {variant: middle(rows, "gpu_bytes") for variant, rows in loads.items()}
    out = arguments.out or ROOT / "bench" / "results" / f"attach-{arguments.device}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print("load     " + ", ".join(f"{v} {t:.2f} s" for v, t in load_seconds.items()) + f": {result['load_ratio']:.3f}×")
    in_thread = ", ".join(f"{v} {t:.2f} s" for v, t in thread.items())
    print(f"thread   {in_thread}: {result['load_thread_ratio']:.3f}×")
    print("CPU      " + ", ".join(f"{v} {t:.2f} s" for v, t in cpu.items()))
    print("memory   " + ", ".join(f"{v} {b / 1e6:.0f} MB" for v, b in result["memory_bytes"].items()))
    print(f"attach   {result['attach_seconds'] * 1e3:.1f} ms for {result['views']} views")
    verify = result["verify_seconds_per_gb"], result["verify_against_read"]
    print(f"verify   {verify[0]:.3f} s/GB, {verify[1]:.2f}× reading the files")
    print(f"build    {result['build_seconds']:.2f} s")


if __name__ == "__main__":
    main()
