"""The manifest: where each checkpoint tensor lives in the memory of a running vLLM.

One JSON file per tensor-parallel rank, `rank<N>.json`, in the model's runtime directory; mode 0600 in a directory of
mode 0700, replaced atomically, no pickle. Whatever reads one treats it as hostile: `Manifest.load` either returns a
manifest in which every view lies inside its allocation, or raises `ManifestError` that says what is wrong. It needs
no torch.

docs/sharing.md describes each field.
"""

import contextlib
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from hogwild.errors import ExporterGone, ManifestError
from hogwild.runtime_files import boot_id, process_alive, read_private, write_private
from hogwild.strided import span
from hogwild.weight_state import WeightState

FORMAT = "hogwild-manifest"
REFUSAL_FORMAT = "hogwild-refusal"
FORMAT_VERSION = 1

MAX_DIMS = 8
MAX_INTEGER = 1 << 56  # of any size, stride or offset: keeps every product far from overflow anywhere

ITEM_BYTES: Mapping[str, int] = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
# What JSON that doesn't hold what is expected makes Python raise; an integer too large for a float overflows.
_MALFORMED = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
STATUSES = ("shared", "derived", "unequal", "ignored")
Status = Literal["shared", "derived", "unequal", "ignored"]


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """A block of memory of the exporter.

    kind `memfd`: file descriptor `fd` of process `pid`, an anonymous file with number `inode`; reached through /proc.
    kind `cuda_ipc`: `handle`, the 64 bytes of a `cudaIpcMemHandle_t` in hexadecimal.
    """

    kind: Literal["memfd", "cuda_ipc"]
    size: int
    pid: int = 0
    fd: int = -1
    inode: int = 0
    handle: str = ""

    @property
    def crc32(self) -> int:
        """Of the handle: CUDA can wait for ever for the owner of one that was damaged, so none is shown to it."""
        return _crc32(self.handle)


@dataclass(frozen=True, kw_only=True)
class TensorRecord:
    """A checkpoint tensor: where its live values are, and whether they may be trained.

    shared: the view equals the checkpoint bit for bit at export. derived: vLLM serves something computed from it.
    unequal: it landed there, but the contents differ (permuted, packed). ignored: vLLM doesn't hold it.
    `shape`, `stride` (elements), `offset` (bytes) describe this rank's part; `slices` ([dim, start, length] each) says
    which part of the checkpoint tensor that is, None for all of it. `hash`: xxh3_128 of the view's row-major bytes at
    export. A tensor that is not shared has no allocation.
    """

    status: Status
    shape: tuple[int, ...]
    dtype: str
    allocation: int | None = None
    offset: int = 0
    stride: tuple[int, ...] = ()
    reason: str | None = None
    parameter: str | None = None
    slices: tuple[tuple[int, int, int], ...] | None = None
    full_shape: tuple[int, ...] | None = None
    hash: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the values (not of the memory that a strided view spans)."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything a worker needs to find the weights of one rank of one running vLLM."""

    export_id: str
    model_path: str
    served_model_name: str
    vllm_version: str
    pid: int
    process_start_time: float
    boot_id: str
    device: Literal["cpu", "cuda"]
    gpu_uuid: str | None = None
    tensor_parallel_rank: int = 0
    tensor_parallel_size: int = 1
    max_model_len: int
    vocab_size: int
    dtype: str
    created_at: float = 0.0
    trust_remote_code: bool = False
    allocations: tuple[Allocation, ...] = ()
    tensors: Mapping[str, TensorRecord] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path, *, check_owner: bool = True) -> Self:
        """Read and check a manifest.

        Raises:
            ManifestError: missing, of another user, readable by others, truncated, of another version, or hostile.
        """
        return cls.from_json(read_private(path, check_owner=check_owner), str(path))

    @classmethod
    def from_json(cls, text: str | bytes, source: str = "manifest") -> Self:
        """Parse and check; see `load`."""
        try:
            data = json.loads(text, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise ManifestError(f"{source} is truncated or not JSON: {error}") from error
        try:
            manifest = _parse(cls, data)
        except _Invalid as error:
            raise ManifestError(f"{source}: {error}") from error
        return manifest

    def to_json(self) -> str:
        """The manifest's file contents."""
        meta = {k: v for k, v in asdict_shallow(self).items() if k not in ("allocations", "tensors")}
        meta = {"format": FORMAT, "format_version": FORMAT_VERSION, **meta}
        kinds = {"memfd": ("kind", "size", "pid", "fd", "inode"), "cuda_ipc": ("kind", "size", "handle", "crc32")}
        return json.dumps(
            {
                "__metadata__": meta,
                "allocations": [{k: getattr(a, k) for k in kinds[a.kind]} for a in self.allocations],
                "tensors": {name: asdict_shallow(record) for name, record in self.tensors.items()},
            }
        )

    def write(self, path: Path) -> None:
        """Put the manifest in place atomically, readable by its user only."""
        write_private(path, self.to_json())

    def exporter_alive(self) -> bool:
        """True while the process that exported these weights runs (same pid, same start, same boot)."""
        return self.boot_id == boot_id() and process_alive(self.pid, self.process_start_time)

    def check_alive(self) -> None:
        """Raises:
        ExporterGone: the exporter is not running any more.
        """
        if self.boot_id != boot_id():
            raise ExporterGone("these weights were exported before the machine's last restart, or on another machine")
        if not process_alive(self.pid, self.process_start_time):
            raise ExporterGone(
                f"vLLM (pid {self.pid}), which exported these weights, is not running any more, or runs in another "
                f"PID namespace: containers of vLLM and the worker must share one"
            )


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why vLLM's weights are not shared: written as `rank<N>.refused.json` where the manifest would be."""

    reasons: tuple[tuple[str, str], ...]  # (name of the check, what is wrong and what to do)
    served_model_name: str
    vllm_version: str
    pid: int
    process_start_time: float
    boot_id: str

    @classmethod
    def load(cls, path: Path) -> Self | None:
        """The refusal of a vLLM that is running now, or None.

        Raises:
            ManifestError: there is one, but it can't be read.
        """
        try:
            text = read_private(path)
        except ManifestError:
            if not path.exists():
                return None
            raise
        try:
            data = json.loads(text, parse_constant=_no_constant)
            meta = data["__metadata__"]
            if meta["format"] != REFUSAL_FORMAT or meta["format_version"] != FORMAT_VERSION:
                raise ManifestError(f"{path} is no refusal of format version {FORMAT_VERSION}")
            refusal = cls(
                reasons=tuple((str(name), str(text)) for name, text in data["reasons"]),
                served_model_name=str(meta["served_model_name"]),
                vllm_version=str(meta["vllm_version"]),
                pid=int(meta["pid"]),
                process_start_time=float(meta["process_start_time"]),
                boot_id=str(meta["boot_id"]),
            )
        except _MALFORMED as error:
            raise ManifestError(f"{path} is not a refusal report: {error!r}") from error
        alive = refusal.boot_id == boot_id() and process_alive(refusal.pid, refusal.process_start_time)
        return refusal if alive else None

    def write(self, path: Path) -> None:
        """Put the report in place atomically, readable by its user only."""
        meta = {k: v for k, v in asdict_shallow(self).items() if k != "reasons"}
        write_private(
            path,
            json.dumps(
                {
                    "__metadata__": {"format": REFUSAL_FORMAT, "format_version": FORMAT_VERSION, **meta},
                    "reasons": self.reasons,
                }
            ),
        )


def manifest_path(runtime_dir: Path, rank: int = 0) -> Path:
    """Where the manifest of a tensor-parallel rank is."""
    return runtime_dir / f"rank{rank}.json"


def refusal_path(runtime_dir: Path, rank: int = 0) -> Path:
    """Where the report is when the weights of a rank were not shared."""
    return runtime_dir / f"rank{rank}.refused.json"


def living_exports(runtime_dir: Path) -> Iterator[tuple[Path, int, str]]:
    """The manifests of running vLLMs: file, process and export id of each, not checked any further.

    A vLLM whose front end was killed is none: its engine ends soon, or is left behind and serves nobody.
    """
    for path in sorted(runtime_dir.glob("rank*.json")):
        try:
            meta = json.loads(path.read_bytes())["__metadata__"]
            pid, started = int(meta["pid"]), float(meta["process_start_time"])
            alive = meta["format"] == FORMAT and meta["boot_id"] == boot_id() and process_alive(pid, started)
            if alive and not _front_end_killed(runtime_dir, path):
                yield path, pid, str(meta["export_id"])
        except (OSError, *_MALFORMED):
            continue


def _front_end_killed(runtime_dir: Path, manifest: Path) -> bool:
    """Whether the front end that was published after this manifest is gone and left its file there."""
    path = runtime_dir / "frontend.json"
    try:
        front = json.loads(path.read_bytes())
        later = path.stat().st_mtime_ns >= manifest.stat().st_mtime_ns
        return later and not process_alive(int(front["pid"]), float(front["process_start_time"]))
    except (OSError, *_MALFORMED):
        return False


def sweep(runtime_dir: Path) -> list[Path]:
    """Delete what dead processes left in a model's runtime directory; returns the files that went."""
    gone: list[Path] = []
    exports: set[str] = set()
    for path in sorted(runtime_dir.glob("rank*.json")):
        try:
            meta = json.loads(path.read_bytes())["__metadata__"]
            alive = meta["boot_id"] == boot_id() and process_alive(int(meta["pid"]), float(meta["process_start_time"]))
            exports |= {str(meta["export_id"])} if not alive and "export_id" in meta else set()
        except (OSError, *_MALFORMED):
            alive = False
        if not alive:
            gone.append(path)
    try:
        front = json.loads((runtime_dir / "frontend.json").read_bytes())
        alive = process_alive(int(front["pid"]), float(front["process_start_time"]))
    except (OSError, *_MALFORMED):
        alive = False
    if not alive:
        gone.append(runtime_dir / "frontend.json")
    try:  # only the state of an export that is gone: a vLLM that is just starting writes it before its manifest
        with contextlib.closing(WeightState.open(runtime_dir / "weights.state")) as state:
            ended = state.export_id in exports
    except ManifestError:
        ended = False
    if ended:
        gone.append(runtime_dir / "weights.state")
    gone = [path for path in gone if path.exists()]
    for path in gone:
        path.unlink(missing_ok=True)
    return gone


def asdict_shallow(value: Any) -> dict[str, Any]:
    """Fields of a dataclass by name, values as they are."""
    return {name: getattr(value, name) for name in value.__dataclass_fields__}


# --- checking ------------------------------------------------------------------------------------------------------


ManifestT = TypeVar("ManifestT", bound=Manifest)


class _Invalid(Exception):
    """What is wrong; `load` turns it into a ManifestError with the file's name."""


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not allowed")


def _get(data: Any, key: str, kind: type | tuple[type, ...], where: str, *, optional: bool = False) -> Any:
    value = data.get(key)
    if value is None and optional:
        return None
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise _Invalid(f"{where}{key!r} must be {' or '.join(k.__name__ for k in kinds)}, not {_brief(value)}")
    return value


def _int(value: Any, where: str, low: int = 0, high: int = MAX_INTEGER) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise _Invalid(f"{where} must be an integer from {low} to {high}, not {_brief(value)}")
    return value


def _ints(value: Any, where: str, low: int = 0) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > MAX_DIMS:
        raise _Invalid(f"{where} must be a list of at most {MAX_DIMS} integers, not {_brief(value)}")
    return tuple(_int(n, where, low) for n in value)


def _seconds(data: Any, key: str, where: str) -> float:
    value = _get(data, key, (int, float), where)
    if not abs(value) < MAX_INTEGER:
        raise _Invalid(f"{where}{key!r} must be a number of seconds, not {_brief(value)}")
    return float(value)


def _brief(value: Any) -> str:
    text = repr(value) if not isinstance(value, (list, dict)) else type(value).__name__
    return text if len(text) <= 80 else text[:77] + "..."


def _parse(cls: type[ManifestT], data: Any) -> ManifestT:
    if not isinstance(data, dict) or not isinstance(data.get("__metadata__"), dict):
        raise _Invalid("not a manifest: '__metadata__' is missing")
    meta = data["__metadata__"]
    if meta.get("format") != FORMAT:
        raise _Invalid(f"not a manifest: format is {_brief(meta.get('format'))}")
    if meta.get("format_version") != FORMAT_VERSION:
        raise _Invalid(
            f"format version {_brief(meta.get('format_version'))}: this hogwild reads {FORMAT_VERSION}; vLLM's and "
            f"the worker's installation must be the same version"
        )
    where = "__metadata__."
    text = {
        k: _get(meta, k, str, where)
        for k in ("export_id", "model_path", "served_model_name", "vllm_version", "boot_id", "dtype")
    }
    if not re.fullmatch(r"[0-9a-f]{32}", text["export_id"]):
        raise _Invalid("__metadata__.export_id must be 32 hexadecimal digits")
    if "\0" in text["model_path"]:
        raise _Invalid("__metadata__.model_path holds a zero byte")
    device = _get(meta, "device", str, where)
    if device not in ("cpu", "cuda"):
        raise _Invalid(f"__metadata__.device must be cpu or cuda, not {_brief(device)}")
    gpu_uuid = _get(meta, "gpu_uuid", str, where, optional=True)
    if device == "cuda" and not gpu_uuid:
        raise _Invalid("__metadata__.gpu_uuid is missing")
    size = _int(meta.get("tensor_parallel_size"), "__metadata__.tensor_parallel_size", 1, 1 << 16)
    rank = _int(meta.get("tensor_parallel_rank"), "__metadata__.tensor_parallel_rank", 0, size - 1)
    pid = _int(meta.get("pid"), "__metadata__.pid", 1, (1 << 31) - 1)

    raw_allocations = _get(data, "allocations", list, "")
    allocations = tuple(_allocation(raw, i, device, pid) for i, raw in enumerate(raw_allocations))
    raw_tensors = _get(data, "tensors", dict, "")
    tensors = {name: _tensor(name, raw, allocations) for name, raw in raw_tensors.items()}
    return cls(
        export_id=text["export_id"],
        model_path=text["model_path"],
        served_model_name=text["served_model_name"],
        vllm_version=text["vllm_version"],
        pid=pid,
        boot_id=text["boot_id"],
        dtype=text["dtype"],
        process_start_time=_seconds(meta, "process_start_time", where),
        device="cuda" if device == "cuda" else "cpu",
        gpu_uuid=gpu_uuid,
        tensor_parallel_rank=rank,
        tensor_parallel_size=size,
        max_model_len=_int(meta.get("max_model_len"), "__metadata__.max_model_len", 1, 1 << 31),
        vocab_size=_int(meta.get("vocab_size"), "__metadata__.vocab_size", 1, 1 << 31),
        created_at=_seconds(meta, "created_at", where),
        trust_remote_code=bool(_get(meta, "trust_remote_code", bool, where)),
        allocations=allocations,
        tensors=tensors,
    )


def _crc32(handle: str) -> int:
    return zlib.crc32(bytes.fromhex(handle))


def _allocation(raw: Any, index: int, device: str, pid: int) -> Allocation:
    where = f"allocations[{index}]"
    if not isinstance(raw, dict):
        raise _Invalid(f"{where} must be an object")
    size = _int(raw.get("size"), f"{where}.size", 1)
    if raw.get("kind") == "memfd" and device == "cpu":
        if raw.get("pid") != pid:
            raise _Invalid(f"{where}.pid is not the exporter's")
        return Allocation(
            kind="memfd",
            size=size,
            pid=pid,
            fd=_int(raw.get("fd"), f"{where}.fd", 0, 1 << 30),
            inode=_int(raw.get("inode"), f"{where}.inode", 0, 1 << 64),
        )
    if raw.get("kind") == "cuda_ipc" and device == "cuda":
        handle = raw.get("handle")
        if not isinstance(handle, str) or not re.fullmatch(r"[0-9a-f]{128}", handle):
            raise _Invalid(f"{where}.handle must be 64 bytes in hexadecimal")
        if raw.get("crc32") != _crc32(handle):
            raise _Invalid(f"{where}.handle is damaged: its crc32 is another")
        return Allocation(kind="cuda_ipc", size=size, handle=handle)
    raise _Invalid(f"{where}.kind {_brief(raw.get('kind'))} does not go with device {device}")


def _tensor(name: str, raw: Any, allocations: tuple[Allocation, ...]) -> TensorRecord:
    where = f"tensor {_brief(name)}"
    if not isinstance(raw, dict):
        raise _Invalid(f"{where} must be an object")
    status = raw.get("status")
    if status not in STATUSES:
        raise _Invalid(f"{where}: status {_brief(status)} is none of {', '.join(STATUSES)}")
    dtype = raw.get("dtype")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise _Invalid(f"{where}: unknown dtype {_brief(dtype)}")
    shape = _ints(raw.get("shape"), f"{where}: shape")
    if prod(shape) > MAX_INTEGER:
        raise _Invalid(f"{where}: shape {shape} is too large")
    digest = _get(raw, "hash", str, f"{where}: ", optional=True)
    if digest is not None and not re.fullmatch(r"[0-9a-f]{32}", digest):
        raise _Invalid(f"{where}: hash must be 32 hexadecimal digits")
    reason = _get(raw, "reason", str, f"{where}: ", optional=True)
    parameter = _get(raw, "parameter", str, f"{where}: ", optional=True)
    full_shape = None if raw.get("full_shape") is None else _ints(raw["full_shape"], f"{where}: full_shape")

    allocation = raw.get("allocation")
    if allocation is None:
        if status == "shared":
            raise _Invalid(f"{where} is shared but has no allocation")
        slices = _slices(raw.get("slices"), shape, full_shape, where)
        return TensorRecord(
            status=status,
            shape=shape,
            dtype=dtype,
            reason=reason,
            parameter=parameter,
            slices=slices,
            full_shape=full_shape,
            hash=digest,
        )
    index = _int(allocation, f"{where}: allocation", 0, max(len(allocations) - 1, 0))
    if not allocations:
        raise _Invalid(f"{where}: there is no allocation {index}")
    stride = _ints(raw.get("stride"), f"{where}: stride")
    offset = _int(raw.get("offset"), f"{where}: offset")
    if len(stride) != len(shape):
        raise _Invalid(f"{where}: {len(shape)} dimensions but {len(stride)} strides")
    if any(s == 0 and n > 1 for n, s in zip(shape, stride, strict=True)):
        raise _Invalid(f"{where}: a stride of 0 would put several elements in one place")
    item = ITEM_BYTES[dtype]
    if offset % item:
        raise _Invalid(f"{where}: offset {offset} is not a multiple of {dtype}'s {item} bytes")
    end = offset + span(shape, stride) * item
    if end > allocations[index].size:
        raise _Invalid(f"{where} ends at byte {end} of an allocation of {allocations[index].size} bytes")
    slices = _slices(raw.get("slices"), shape, full_shape, where)
    return TensorRecord(
        status=status,
        shape=shape,
        dtype=dtype,
        allocation=index,
        offset=offset,
        stride=stride,
        reason=reason,
        parameter=parameter,
        slices=slices,
        full_shape=full_shape,
        hash=digest,
    )


def _slices(
    raw: Any, shape: tuple[int, ...], full_shape: tuple[int, ...] | None, where: str
) -> tuple[tuple[int, int, int], ...] | None:
    if raw is None:
        if full_shape not in (None, shape):
            raise _Invalid(f"{where}: shape {shape} is not the full_shape {full_shape}, and there are no slices")
        return None
    if not isinstance(raw, list) or len(raw) > MAX_DIMS or full_shape is None or len(full_shape) != len(shape):
        raise _Invalid(f"{where}: slices must be a list and come with a full_shape of as many dimensions as shape")
    slices = []
    for entry in raw:
        numbers = _ints(entry, f"{where}: slices")
        if len(numbers) != 3 or numbers[0] >= len(shape):
            raise _Invalid(f"{where}: a slice is [dimension, start, length]")
        dim, start, length = numbers
        if length != shape[dim] or start + length > full_shape[dim]:
            raise _Invalid(f"{where}: slice {list(numbers)} does not fit shape {list(full_shape)}")
        slices.append((dim, start, length))
    cut = {dim for dim, _, _ in slices}
    if len(cut) != len(slices) or any(n != full_shape[dim] and dim not in cut for dim, n in enumerate(shape)):
        raise _Invalid(f"{where}: the slices don't make shape {shape} of the full_shape {full_shape}")
    return tuple(slices)
