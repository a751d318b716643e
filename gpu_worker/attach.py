"""Attaching to a running vLLM: from its manifest to one tensor per checkpoint tensor, on the same memory.

Nothing is copied. Everything the manifest says is checked before a pointer is made of it (`hogwild.manifest` checks
what can be checked without the memory, `shm` and `cuda_ipc` the rest).
"""

import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from hogwild.errors import AlreadyAttached, AttachRefused, ManifestError
from hogwild.gpu_worker import shm
from hogwild.gpu_worker.cuda_ipc import IpcMemory, local_device
from hogwild.manifest import ITEM_BYTES, Manifest, Refusal, manifest_path, refusal_path
from hogwild.strided import Layout
from hogwild.tensors import digest, hashers
from hogwild.weight_state import FILE_NAME as STATE_FILE
from hogwild.weight_state import WeightState

LOCK_FILE = "worker.lock"
PROGRESS_S = 5.0

logger = logging.getLogger(__name__)


@dataclass
class Attachment:
    """Live weights of a running vLLM. `views`: checkpoint tensor name → tensor on vLLM's own memory.

    `views` holds the shared tensors only; `manifest.tensors` says why others are not. Close it before attaching anew.
    """

    manifest: Manifest
    manifest_inode: int
    runtime_dir: Path
    device: torch.device
    views: dict[str, torch.Tensor]
    weights: WeightState
    seconds: float  # from reading the manifest to the last view
    memory: "Memory"
    _lock: int = -1

    @property
    def nbytes(self) -> int:
        """Bytes of the shared tensors; tied ones count once."""
        return sum({(v.data_ptr(), v.shape, v.stride()): v.nbytes for v in self.views.values()}.values())

    def alive(self) -> bool:
        """Whether the exporter still runs and its manifest is still the one we attached to."""
        path = manifest_path(self.runtime_dir, self.manifest.tensor_parallel_rank)
        try:
            return path.stat().st_ino == self.manifest_inode and self.manifest.exporter_alive()
        except OSError:
            return False

    def verify(self, progress: Callable[[int, int], None] | None = None) -> "Verification":
        """Compare every view with the exporter's hashes, which vLLM's load proved equal to the checkpoint.

        Once anything was written into the live weights they are meant to differ: then only the export id says that
        this is the memory the manifest describes, and the caller compares with its last checkpoint generation.
        `progress(done, total)` is called with bytes; without one, a long comparison says now and then where it is.

        Raises:
            AttachRefused: the weights were not trained, yet differ from what vLLM exported.
        """
        if not self.weights.untouched:
            return Verification(against="export id: trained since export", tensors=0, nbytes=0, seconds=0.0)
        started = said = time.monotonic()
        total = sum(v.nbytes for v in self.views.values())

        def say(done: int, total: int) -> None:
            nonlocal said
            if time.monotonic() - said > PROGRESS_S:
                said = time.monotonic()
                logger.info("comparing weights with vLLM's: %.1f of %.1f GB", done / 1e9, total / 1e9)

        done, different = 0, []
        with hashers() as pool:
            for (name, view), found in zip(self.views.items(), pool.map(digest, self.views.values()), strict=True):
                if found != self.manifest.tensors[name].hash:
                    different.append(name)
                done += view.nbytes
                (progress or say)(done, total)
        if different and self.weights.untouched:
            raise AttachRefused(
                f"{len(different)} of {len(self.views)} tensors differ from what vLLM exported though nothing was "
                f"trained, e.g. {', '.join(different[:3])}: restart vLLM",
                tensors=different,
            )
        return Verification(
            against="exporter's hashes", tensors=len(self.views), nbytes=done, seconds=time.monotonic() - started
        )

    def close(self) -> None:
        """Let go of the memory and the lock. Tensors on the views must not be used afterwards."""
        self.views.clear()
        self.memory.close()
        self.weights.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What the live weights were compared with."""

    against: str
    tensors: int
    nbytes: int
    seconds: float


def attach(runtime_dir: Path) -> Attachment:
    """Attach to the vLLM that exported its weights to this directory.

    Raises:
        ManifestError: there is no manifest, or it can't be trusted.
        ExporterGone: that vLLM is not running any more.
        AttachRefused: sharing would not be safe; says why.
        AlreadyAttached: another worker holds these weights.
    """
    started = time.monotonic()
    manifest, inode = _read(runtime_dir)
    if manifest.tensor_parallel_size > 1:
        raise AttachRefused(
            f"vLLM runs on {manifest.tensor_parallel_size} GPUs (tensor parallel); training across GPUs is not "
            f"supported yet: use --tensor-parallel-size 1"
        )
    lock = _take_lock(runtime_dir)
    memory: Memory | None = None
    weights: WeightState | None = None
    try:
        memory = Memory(manifest)
        weights = WeightState.open(runtime_dir / STATE_FILE)
        if weights.export_id != manifest.export_id:
            raise ManifestError(f"{runtime_dir / STATE_FILE} belongs to another export than the manifest: restart vLLM")
        views = memory.views()
    except BaseException:
        if weights is not None:
            weights.close()
        if memory is not None:
            memory.close()
        os.close(lock)
        raise
    return Attachment(
        manifest=manifest,
        manifest_inode=inode,
        runtime_dir=runtime_dir,
        device=memory.device,
        views=views,
        weights=weights,
        memory=memory,
        seconds=time.monotonic() - started,
        _lock=lock,
    )


@contextmanager
def open_views(manifest: Manifest) -> Iterator[dict[str, torch.Tensor]]:
    """The live tensors for a look, beside whoever is attached: nobody may write through them.

    Raises:
        ExporterGone, AttachRefused: as for `attach`.
    """
    manifest.check_alive()
    memory = Memory(manifest)
    try:
        yield memory.views()
    finally:
        memory.close()


class Memory:
    """The opened allocations of a manifest. Every tensor on them must be gone before `close`."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._blocks: list[torch.Tensor] = []
        self._ipc: IpcMemory | None = None
        try:
            if manifest.device == "cuda":
                self.device = local_device(manifest.gpu_uuid or "")
                self._ipc = IpcMemory(self.device)
                self._blocks += [self._ipc.open(allocation) for allocation in manifest.allocations]
            else:
                self.device = torch.device("cpu")
                self._blocks += [shm.open_memory(allocation) for allocation in manifest.allocations]
        except BaseException:
            self.close()
            raise

    def views(self) -> dict[str, torch.Tensor]:
        """Shared checkpoint tensor → live view; the manifest's parser has checked that each lies inside."""
        found: dict[str, torch.Tensor] = {}
        for name, record in self.manifest.tensors.items():
            if record.status == "shared" and record.allocation is not None:
                layout = Layout(record.offset // ITEM_BYTES[record.dtype], record.shape, record.stride)
                found[name] = self.view(record.allocation, record.dtype, layout)
        return found

    def view(self, allocation: int, dtype: str, layout: Layout) -> torch.Tensor:
        """A view of an allocation; `layout` in elements of `dtype`.

        Raises:
            AttachRefused: it would reach beyond the allocation.
        """
        block, item = self._blocks[allocation], ITEM_BYTES[dtype]
        if layout.offset < 0 or (layout.offset + layout.extent) * item > block.numel():
            raise AttachRefused(f"a view of {layout.shape} at {layout.offset} reaches beyond its allocation")
        # Only this tensor's bytes: an allocation's size need not be a multiple of the item size.
        part = block[layout.offset * item : (layout.offset + layout.extent) * item]
        typed: torch.dtype = getattr(torch, dtype)
        return part.view(typed).as_strided(layout.shape, layout.stride)

    def close(self) -> None:
        """Unmap."""
        self._blocks.clear()
        if self._ipc is not None:
            self._ipc.close()
            self._ipc = None


def _read(runtime_dir: Path) -> tuple[Manifest, int]:
    """The manifest of rank 0, of a vLLM that runs; a refusal that is there instead is reported."""
    path = manifest_path(runtime_dir)
    if path.exists():
        inode = path.stat().st_ino  # taken first: one that is replaced meanwhile shows as another manifest later
    else:
        inode = 0
        refusal = Refusal.load(refusal_path(runtime_dir))
        if refusal is not None:
            raise AttachRefused(
                f"vLLM does not share the weights of {refusal.served_model_name}: "
                + "; ".join(message for _, message in refusal.reasons),
                checks=[name for name, _ in refusal.reasons],
            )
    manifest = Manifest.load(path)
    manifest.check_alive()
    return manifest, inode


def _take_lock(runtime_dir: Path) -> int:
    """Hold `worker.lock`: one worker per model. Gone with the process, however it ends."""
    path = runtime_dir / LOCK_FILE
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(lock, 32, 0).decode(errors="replace").strip()
        os.close(lock)
        raise AlreadyAttached(
            f"another worker (pid {holder or 'unknown'}) is attached to these weights: stop it first"
        ) from error
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    return lock
