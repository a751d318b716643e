"""A sync of changed blocks against saving the whole model, side by side: time, pause, bytes, memory.

    python bench/checkpoint.py --device cpu --mb 270 2000
    python bench/checkpoint.py --device cuda --mb 16000 --directory /mnt/nvme

The model is random bf16 in the shapes of a Llama. For each share of blocks, that many random blocks get a small update
(a fifth of their elements move by one step of their last place, as dense training at a learning rate of 1e-5 does), and
then each of these saves the same weights to the same disk, in turn:

    hogwild         CheckpointStore: fingerprints and copy (the pause), logs, fsync, blocks in place, fsync. Where files
                    were replaced, `compact` then makes undo data of the old ones; nobody waits for it: `compact_s`
    save_file       safetensors.torch.save_file, as it is (no fsync: the data may still be in memory only)
    save_safely     save_file to a new file, fsync, rename over the old one: what a power cut does not destroy
    dcp, dcp_async  torch.distributed.checkpoint.save and async_save; its pause is the time until async_save returns
    rsync           save_file to memory-backed storage, then rsync of that file over the old copy, and an fsync

Beside it stands what no way to change these blocks where they are can do without: writing them there, one fsync
("scattered_s"; nothing is compared, logged or protected).

"Pause" is how long the weights must not change. Memory is the growth of the process' peak resident size (the host's;
page cache not counted); for hogwild the staging memory that it keeps from sync to sync is added. The disk's write rate
(one new file, then fsync), and one pass of fingerprints with nothing changed, are measured in the same run. The result
goes to bench/results/checkpoint-<device>.json.
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from hogwild.checkpoint.blockfile import read_blocks, write_blocks
from hogwild.checkpoint.constants import BLOCK
from hogwild.checkpoint.durable import FileIo
from hogwild.checkpoint.fingerprints import Indices
from hogwild.checkpoint.store import CheckpointStore
from hogwild.checkpoint.transaction import side_by_side

ROOT = Path(__file__).parents[1]
SHARES = [0.0001, 0.01, 0.1, 1.0]
MOVED = 0.2  # share of elements that an update moves, of those in a changed block
SHARD = 5_000_000_000  # bytes; what save_pretrained makes

Tensors = dict[str, torch.Tensor]


def build(nbytes: int, device: str) -> Tensors:
    """Random bf16 tensors in the shapes of a Llama, about `nbytes` in all."""
    generator = torch.Generator(device).manual_seed(0)
    hidden, rows = (576, 1536) if nbytes < 1e9 else (2048, 8192) if nbytes < 8e9 else (4096, 12288)
    tensors: Tensors = {}

    def add(name: str, *shape: int) -> int:
        tensor = torch.empty(*shape, dtype=torch.bfloat16, device=device)
        tensors[name] = tensor.normal_(0, 0.02, generator=generator)
        return tensor.numel() * 2

    left = nbytes - add("model.embed_tokens.weight", min(150_000, nbytes // (8 * hidden)), hidden)
    layer = 0
    while left > 0:
        for name, shape in {
            "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (hidden // 3, hidden),
            "self_attn.v_proj": (hidden // 3, hidden), "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (rows, hidden), "mlp.up_proj": (rows, hidden), "mlp.down_proj": (hidden, rows),
            "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
        }.items():  # fmt: skip
            left -= add(f"model.layers.{layer}.{name}.weight", *shape)
        layer += 1
    return tensors


def save_shards(tensors: Tensors, directory: Path) -> None:
    """A model directory as save_pretrained writes it."""
    directory.mkdir(parents=True, exist_ok=True)
    shards: list[Tensors] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if size + tensor.numel() * 2 > SHARD:
            shards.append({})
            size = 0
        size += tensor.numel() * 2
        shards[-1][name] = tensor
    if len(shards) == 1:
        save_file(shards[0], directory / "model.safetensors")
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, directory / file)
        weight_map |= dict.fromkeys(shard, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def update(tensors: Tensors, share: float, seed: int) -> dict[str, Indices]:
    """Change `share` of all blocks, in place: a fifth of the elements of each by one step of the last place.

    Returns which: tensor → numbers of its blocks; nothing for all of them.
    """
    rng = np.random.default_rng(seed)
    changed: dict[str, Indices] = {}
    for name, tensor in tensors.items():
        flat = tensor.view(-1).view(torch.int16)
        count = -(-flat.numel() * 2 // BLOCK)
        if share == 1:
            for start in range(0, flat.numel(), 1 << 26):  # bounded memory
                part = flat[start : start + (1 << 26)]
                part ^= (torch.rand(part.shape, device=part.device) < MOVED).to(torch.int16)
            continue
        chosen = np.flatnonzero(rng.random(count) < share)
        for part in np.array_split(chosen, -(-len(chosen) // 8192) or 1):  # bounded memory
            places = part[:, None] * (BLOCK // 2) + np.arange(BLOCK // 2)
            mask = rng.random(places.shape) < MOVED
            mask[:, 0] = True
            places = torch.from_numpy(places[mask & (places < flat.numel())]).to(flat.device)
            flat[places] ^= 1
        changed[name] = chosen
    return changed


def fsync_tree(directory: Path) -> None:
    """Make everything in a directory durable."""
    for path in [*directory.rglob("*"), directory]:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


@contextlib.contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """Growth of the peak resident size in bytes since the beginning of the block."""
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the present size (proc(5))

    def read(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

    start = read("VmRSS")
    yield lambda: max(0, read("VmHWM") - start)


class Bench:
    """One model on one disk, and every way to save it."""

    def __init__(self, tensors: Tensors, directory: Path, *, lean: bool) -> None:
        self.tensors = tensors
        self.lean = lean
        self.directory = directory
        self.nbytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        save_shards(tensors, directory / "source")
        started = time.perf_counter()
        self.store = CheckpointStore.open(
            directory / "checkpoint", source=directory / "source", keep_last=1, host_budget=64 << 30
        )
        self.open_seconds = time.perf_counter() - started
        shutil.rmtree(directory / "source")
        self.store.prepare(tensors)
        self.version = 0
        self._group = tempfile.TemporaryDirectory()
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{self._group.name}/group", rank=0, world_size=1
        )

    def close(self) -> None:
        """Give everything back."""
        self.store.close()
        torch.distributed.destroy_process_group()
        self._group.cleanup()

    def hogwild(self) -> dict[str, Any]:
        """A sync; the report's own numbers and the wall clock's."""
        self.version += 1
        report = self.store.sync(self.tensors, weight_version=self.version)
        return {
            "pause_s": report.pause_seconds, "durable_s": report.durable_seconds, "bytes_written": report.bytes_written,
            "undo_bytes": report.undo_bytes, "bytes_changed": report.bytes_changed,
            "blocks_changed": report.blocks_changed, "blocks_total": report.blocks_total,
            "staging_bytes": self.store._arena.allocated,
        }  # fmt: skip

    def compact(self) -> dict[str, Any]:
        """What is left to do after a sync that replaced files, beside training."""
        started = time.perf_counter()
        undo = self.store.compact()
        return {"compact_s": time.perf_counter() - started, "compact_bytes": undo}

    def save_file(self) -> dict[str, Any]:
        """safetensors, as everybody calls it."""
        save_shards(self.tensors, self.directory / "save_file")
        return {"bytes_written": self.nbytes}

    def save_safely(self) -> dict[str, Any]:
        """... so that a power cut leaves the old model or the new one."""
        new, target = self.directory / "save_safely.new", self.directory / "save_safely"
        save_shards(self.tensors, new)
        fsync_tree(new)
        target.mkdir(exist_ok=True)
        for path in new.iterdir():
            path.replace(target / path.name)
        new.rmdir()
        fsync_tree(target)
        return {"bytes_written": self.nbytes}

    def dcp(self) -> dict[str, Any]:
        """PyTorch's distributed checkpoint, one process."""
        import torch.distributed.checkpoint as dcp

        dcp.save(self.tensors, checkpoint_id=self.directory / "dcp")
        return {"bytes_written": self.nbytes}

    def dcp_async(self) -> dict[str, Any]:
        """The same in the background: weights may change once async_save has returned."""
        import torch.distributed.checkpoint as dcp

        started = time.perf_counter()
        future = dcp.async_save(self.tensors, checkpoint_id=self.directory / "dcp_async")
        pause = time.perf_counter() - started
        future.result()
        return {"pause_s": pause, "bytes_written": self.nbytes}

    def rsync(self) -> dict[str, Any]:
        """A full save in memory, then rsync's rolling checksums to the disk."""
        with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
            save_shards(self.tensors, Path(memory))
            pause = time.perf_counter() - self.started
            command = [
                "rsync",
                "-r",
                "--inplace",
                "--no-whole-file",
                "--stats",
                f"{memory}/",
                f"{self.directory}/rsync/",
            ]
            answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            fsync_tree(self.directory / "rsync")
        literal = next(line for line in answer.splitlines() if line.startswith("Literal data"))
        return {"pause_s": pause, "bytes_written": int("".join(filter(str.isdigit, literal)))}

    def timed(self, method: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Run one way to save; seconds, pause and memory with what it says itself."""
        if self.lean:
            for path in self.directory.iterdir():
                if path.name != "checkpoint":
                    shutil.rmtree(path)
        os.sync()  # what others left in the page cache is not ours to write
        with peak_memory() as grown:
            self.started = time.perf_counter()
            found = method()
            seconds = time.perf_counter() - self.started
            memory = grown() + found.get("staging_bytes", 0)
            return {"seconds": seconds, "pause_s": seconds, **found, "memory_bytes": memory}

    def scattered(self, changed: dict[str, Indices]) -> float:
        """Seconds to write those blocks to their places and fsync, and nothing else: what a power cut tears."""
        io, tensors = FileIo(), {spec.name: spec for spec in self.store.layout.tensors}
        with contextlib.ExitStack() as stack:
            files = {
                name: stack.enter_context(io.open(self.directory / "checkpoint" / name, write=True))
                for name in {tensors[name].file for name in changed}
            }
            places = ((tensors[name], blocks) for name, blocks in changed.items() if len(blocks))
            todo = [(files[spec.file], spec, blocks) for spec, blocks in places]
            contents = [read_blocks(*place) for place in todo]
            os.sync()
            started = time.perf_counter()
            for place, data in zip(todo, contents, strict=True):
                write_blocks(*place, data)
            side_by_side(lambda file: file.fsync(), list(files.values()))
            return time.perf_counter() - started

    def disk_rate(self) -> float:
        """Bytes a second of writing a new file and making it durable."""
        size = min(self.nbytes, 1 << 30)
        data = memoryview(bytearray(os.urandom(1 << 20) * 16))
        path = self.directory / "rate"
        os.sync()
        started = time.perf_counter()
        with path.open("wb", buffering=0) as file:
            for _ in range(0, size, len(data)):
                file.write(data)
            os.fsync(file.fileno())
        rate = size / (time.perf_counter() - started)
        path.unlink()
        return rate


def median(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Median of each number."""
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def measure(mb: int, args: argparse.Namespace, directory: Path, note: Callable[[dict[str, Any]], None]) -> None:
    """Every method at every share, for one size; `note` gets what there is after each share."""
    tensors = build(mb * 1_000_000, args.device)
    bench = Bench(tensors, directory, lean=args.lean)
    methods: dict[str, Callable[[], dict[str, Any]]] = {
        "hogwild": bench.hogwild, "save_file": bench.save_file, "save_safely": bench.save_safely,
        "dcp": bench.dcp, "dcp_async": bench.dcp_async, "rsync": bench.rsync,
    }  # fmt: skip
    if not shutil.which("rsync"):
        del methods["rsync"]
    if args.only:
        methods = {name: method for name, method in methods.items() if name in args.only}
    for name, method in methods.items():  # the first time of each makes files and memory that are there later on
        if name == "hogwild" or not args.lean:
            bench.timed(method)
            bench.compact()
    result: dict[str, Any] = {"model_bytes": bench.nbytes, "open_s": bench.open_seconds, "shares": {}}
    rates, hashes = [], []
    for share in args.shares:
        rows: dict[str, list[dict[str, Any]]] = {name: [] for name in methods}
        for repeat in range(args.repeats):
            if "hogwild" in methods:
                hashes.append(bench.timed(bench.hogwild)["pause_s"])  # nothing changed: one pass of fingerprints
            rates.append(bench.disk_rate())
            changed = update(tensors, share, 1000 * repeat + int(share * 10_000))
            for name, method in methods.items():
                rows[name].append(bench.timed(method))
                if name == "hogwild":
                    rows[name][-1] |= bench.compact()
                    if changed:
                        rows[name][-1]["scattered_s"] = bench.scattered(changed)
        found = {name: median(several) for name, several in rows.items()}
        if "hogwild" in found:
            ours, rate, pass_s = found["hogwild"], statistics.median(rates), statistics.median(hashes)
            result["goal_inputs"] = {"disk_bytes_per_s": rate, "fingerprint_pass_s": pass_s}
            goal = 1.2 * ours["bytes_changed"] / rate + pass_s
            found["goal"] = {"seconds": goal, "met": ours["seconds"] <= goal, "durable_met": ours["durable_s"] <= goal}
            found["times_faster_than"] = {
                name: found[name]["seconds"] / ours["seconds"] for name in methods if name != "hogwild"
            }
            found["pause_times_shorter_than"] = {
                name: found[name]["pause_s"] / ours["pause_s"] for name in methods if name != "hogwild"
            }
        result["shares"][f"{share:.2%}"] = found
        note(result)
        print(f"{mb} MB, {share:.2%} of blocks")
        for name in methods:
            row = found[name]
            written, memory = row["bytes_written"] / 1e6, row["memory_bytes"] / 1e6
            times = f"{row['seconds']:8.3f} s  pause {row['pause_s']:8.3f} s"
            later = f"  undo data later: {row['compact_s']:.3f} s" if row.get("compact_bytes") else ""
            if "scattered_s" in row:
                later = f"  the same blocks, only written in place: {row['scattered_s']:.3f} s"
            print(f"  {name:16s} {times}  {written:9.1f} MB written  {memory:8.1f} MB memory{later}")
        sys.stdout.flush()
    if "hogwild" in methods and not bench.store.verify(tensors).ok:
        note({"error": "the checkpoint is not what is live"})
        raise SystemExit("the checkpoint is not what is live: no result")
    bench.close()


def machine(device: str) -> str:
    """The machine in words."""
    kind = "machine"
    with contextlib.suppress(OSError):
        kind = "virtual machine" if "hypervisor" in Path("/proc/cpuinfo").read_text() else kind
    words = f"{os.cpu_count()}-core {platform.machine()} {kind}"
    with contextlib.suppress(OSError, StopIteration):
        memory = next(x for x in Path("/proc/meminfo").read_text().splitlines() if x.startswith("MemTotal"))
        words += f", {round(int(memory.split()[1]) / 2**20)} GiB memory"
    return words + (f", {torch.cuda.get_device_name()}" if device == "cuda" else ", no GPU")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--mb", type=int, nargs="+", default=[270], help="model sizes in 10^6 bytes")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--repeats", type=int, default=3)
    lean = "small disk: one copy of the model besides the checkpoint; rsync then has no old one"
    parser.add_argument("--lean", action="store_true", help=lean)
    parser.add_argument("--only", nargs="+", help="methods to run")
    parser.add_argument("--directory", type=Path, default=ROOT / ".cache" / "bench", help="on the disk to measure")
    parser.add_argument("--out", type=Path, help="default: bench/results/checkpoint-<device>.json")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # torch.distributed explains at length that one process is few
    args.directory.mkdir(parents=True, exist_ok=True)
    disk = subprocess.run(["df", "--output=fstype", str(args.directory)], capture_output=True, text=True, check=True)
    result: dict[str, Any] = {
        "machine": machine(args.device), "file_system": disk.stdout.split()[-1], "device": args.device,
        "torch": torch.__version__, "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "update": f"{MOVED:.0%} of the elements of a changed block by one step of the last place",
        "repeats": args.repeats, "sizes": {},
    }  # fmt: skip
    out = args.out or ROOT / "bench" / "results" / f"checkpoint-{args.device}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    for mb in args.mb:

        def note(found: dict[str, Any], size: str = f"{mb} MB") -> None:
            result["sizes"][size] = found
            out.write_text(json.dumps(result, indent=1) + "\n")  # a run that is cut short leaves what it had

        with tempfile.TemporaryDirectory(dir=args.directory) as directory:
            measure(mb, args, Path(directory), note)
    print(f"written to {out}")


if __name__ == "__main__":
    main()
