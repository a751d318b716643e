"""`hogwild weights`: the map of the served weights, as the running vLLM exported it."""

import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hogwild.config import load_settings
from hogwild.errors import AttachRefused, ManifestError
from hogwild.manifest import STATUSES, Manifest, Refusal, TensorRecord, manifest_path, refusal_path

COLOURS = {"shared": "green", "derived": "yellow", "unequal": "red", "ignored": "dim"}


def register(app: typer.Typer) -> None:
    """Add `weights` to the command line."""
    app.command("weights")(weights)


def weights(
    model: Annotated[str | None, typer.Option(help="Served model name; default: HOGWILD_SERVED_MODEL_NAME.")] = None,
    status: Annotated[str | None, typer.Option(help="Only these: shared, derived, unequal or ignored.")] = None,
    rank: Annotated[int, typer.Option(min=0, help="Tensor-parallel rank.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Print where each checkpoint tensor lives in vLLM's memory, and which can't be trained and why."""
    settings = load_settings()
    if model is not None:
        settings = settings.model_copy(update={"served_model_name": model})
    manifest = find(settings.model_runtime_dir, rank)
    chosen = {name: r for name, r in manifest.tensors.items() if status is None or r.status == status}
    if as_json:
        typer.echo(json.dumps(as_data(manifest, chosen), indent=1))
        return
    console = Console(highlight=False, emoji=False)
    alive = "" if manifest.exporter_alive() else " [bold red](not running any more)[/]"
    console.print(f"[bold]{escape(manifest.served_model_name)}[/] from {escape(manifest.model_path)}")
    console.print(
        f"vLLM {escape(manifest.vllm_version)}, pid {manifest.pid}{alive}, "
        f"{escape(manifest.gpu_uuid or manifest.device)}, rank "
        f"{manifest.tensor_parallel_rank} of {manifest.tensor_parallel_size}, export {manifest.export_id[:8]}"
    )
    table = Table("tensor", "parameter in vLLM", "place", "shape", "dtype", "status", box=None, pad_edge=False)
    for name, record in chosen.items():
        shape = "×".join(map(str, record.shape)) or "scalar"
        said = f"[{COLOURS[record.status]}]{record.status}[/]{escape(': ' + record.reason) if record.reason else ''}"
        table.add_row(escape(name), escape(record.parameter or "–"), place(record), shape, escape(record.dtype), said)
    console.print(table)
    for line in totals(manifest):
        console.print(escape(line))


def find(runtime_dir: Path, rank: int) -> Manifest:
    """The manifest of a rank; where vLLM has refused to share, its reasons.

    Raises:
        AttachRefused: vLLM runs, but doesn't share its weights.
        ManifestError: there is no manifest, or it can't be trusted.
    """
    path = manifest_path(runtime_dir, rank)
    refusal = None if path.exists() else Refusal.load(refusal_path(runtime_dir, rank))
    if refusal is not None:
        raise AttachRefused(
            f"vLLM {refusal.vllm_version} (pid {refusal.pid}) does not share the weights of "
            f"{refusal.served_model_name}: " + "; ".join(f"{text} [{check}]" for check, text in refusal.reasons)
        )
    if not path.exists():
        others = sorted(found.parent.name for found in runtime_dir.parent.glob(f"*/rank{rank}.json"))
        hint = f" There are weights of: {', '.join(others)} (choose with --model)." if others else ""
        raise ManifestError(f"no vLLM has exported its weights to {runtime_dir}.{hint}")
    return Manifest.load(path)


def place(record: TensorRecord) -> str:
    """Allocation and byte offset."""
    return "–" if record.allocation is None else f"{record.allocation}+{record.offset:#x}"


def totals(manifest: Manifest) -> list[str]:
    """Counts and bytes by status, and of the memory itself."""
    count: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for record in manifest.tensors.values():
        count[record.status] += 1
        size[record.status] += record.nbytes
    lines = [f"{count[s]} {s} ({_bytes(size[s])})" for s in STATUSES if count[s]]
    memory = sum(allocation.size for allocation in manifest.allocations)
    return [", ".join(lines), f"{len(manifest.allocations)} allocations ({_bytes(memory)}) of {manifest.device} memory"]


def as_data(manifest: Manifest, chosen: dict[str, TensorRecord]) -> dict[str, Any]:
    """For `--json`: the manifest's own form, less what only a worker needs."""
    data: dict[str, Any] = json.loads(manifest.to_json())
    data["tensors"] = {name: data["tensors"][name] for name in chosen}
    data["allocations"] = [{"kind": a.kind, "size": a.size} for a in manifest.allocations]
    data["exporter_alive"] = manifest.exporter_alive()
    return data


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1000
    raise AssertionError
