"""Parameters of a CPU model in memory that another process can map.

An anonymous file (`memfd_create`) holds them all. Nothing has a name in /dev/shm, so nothing can be left behind,
whoever is killed: the memory goes when the last process that maps it goes. A worker of the same user opens it through
`/proc/<pid>/fd/<n>`. It is not bound by the size of /dev/shm either (64 MB in a container by default).
"""

import ctypes
import mmap
import os
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

# One parameter per page group: pages are the unit in which memory is given and taken, and 4 KB blocks of the checkpoint
# then never hold two parameters.
ALIGNMENT = 4096
PREFAULT_BYTES = 16 << 20  # a few milliseconds' work: how long `finish` may wait
MADV_POPULATE_WRITE = 23  # linux/mman.h; Python 3.11's mmap doesn't know it


@dataclass(frozen=True, kw_only=True)
class Arena:
    """The shared memory of one model."""

    fd: int
    inode: int
    size: int
    mapping: mmap.mmap
    base: int

    def offset_of(self, address: int) -> int | None:
        """Byte offset in the file of an address of this process, None when it is elsewhere."""
        offset = address - self.base
        return offset if 0 <= offset < self.size else None


class Prefault(threading.Thread):
    """Has the kernel provide an arena's pages while the load goes on.

    First touches of shared memory cost about twice those of private memory; here they happen beside the load instead of
    within it. `finish` waits for what is under way and ends the thread.
    """

    def __init__(self, arena: Arena) -> None:
        super().__init__(name="hogwild-prefault", daemon=True)
        self._arena = arena
        self._ended = threading.Event()
        self.start()

    def run(self) -> None:
        """Chunk by chunk: through ctypes, which lets other threads run meanwhile."""
        advise = ctypes.CDLL(None, use_errno=True).madvise
        advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        for start in range(0, self._arena.size, PREFAULT_BYTES):
            length = min(PREFAULT_BYTES, self._arena.size - start)
            if self._ended.is_set() or advise(self._arena.base + start, length, MADV_POPULATE_WRITE):
                return  # a kernel before 5.14: a matter of speed only

    def finish(self) -> None:
        """End the thread."""
        self._ended.set()
        self.join()


def rehome(model: torch.nn.Module, name: str) -> Arena:
    """Move every CPU parameter and saved buffer of `model` into one new arena.

    Each keeps its contents, shape, strides and identity. Parameters that share a storage keep sharing it. Call it
    before anything keeps a pointer to a parameter.

    Raises:
        OSError: no memory, or the system refuses anonymous files.
    """
    storages = _storages(model)
    starts: dict[int, int] = {}
    size = 0
    for key, tensors in storages.items():
        starts[key] = size
        size += -(-tensors[0].untyped_storage().nbytes() // ALIGNMENT) * ALIGNMENT
    size = max(size, ALIGNMENT)

    fd = os.memfd_create(f"hogwild-{name}"[:200], os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)
        mapping = mmap.mmap(fd, size)
    except BaseException:
        os.close(fd)
        raise
    _advise_huge_pages(mapping)
    anonymous = _anonymous_memory()
    for key, tensors in storages.items():
        count = tensors[0].untyped_storage().nbytes()
        block = torch.frombuffer(mapping, dtype=torch.uint8, count=count, offset=starts[key])
        source = torch.empty(0, dtype=torch.uint8).set_(tensors[0].untyped_storage(), 0, (count,), (1,))
        address = source.data_ptr()
        if any(start <= address and address + count <= end for start, end in anonymous):
            _copy_touched(source, block)
        else:
            block.copy_(source)
        for tensor in tensors:
            item = tensor.element_size()
            flat = block[: count // item * item].view(tensor.dtype)
            tensor.data = flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    first = torch.frombuffer(mapping, dtype=torch.uint8, count=1)
    return Arena(fd=fd, inode=os.fstat(fd).st_ino, size=size, mapping=mapping, base=first.data_ptr())


def _storages(model: torch.nn.Module) -> dict[int, list[torch.Tensor]]:
    """Every CPU storage that holds a parameter or a saved buffer, with all tensors of the model that lie on it.

    A plain attribute that is a view of a parameter moves along: left behind, it would show memory nobody loads into.
    """
    saved = {id(t) for t in model.state_dict(keep_vars=True).values()}
    tensors = {
        id(t): t for t in (*model.parameters(), *model.buffers()) if isinstance(t, torch.nn.Parameter) or id(t) in saved
    }
    storages: dict[int, list[torch.Tensor]] = {}
    for tensor in tensors.values():
        if tensor.device.type == "cpu" and tensor.untyped_storage().nbytes():
            storages.setdefault(tensor.untyped_storage()._cdata, []).append(tensor)
    for module in model.modules():
        for value in (*vars(module).values(), *module._buffers.values()):
            if isinstance(value, torch.Tensor) and value.device.type == "cpu" and id(value) not in tensors:
                group = storages.get(value.untyped_storage()._cdata)
                if group is not None and all(value is not t for t in group):
                    group.append(value)
    return storages


def _anonymous_memory() -> list[tuple[int, int]]:
    """Ranges of this process' addresses that are private memory of no file: what was never touched there is zero.

    Of a file, or of memory shared with others, a page that this process has not touched can hold anything.
    """
    try:
        lines = Path("/proc/self/maps").read_text(errors="replace").splitlines()
    except OSError:
        return []
    found: list[tuple[int, int]] = []
    for line in lines:  # proc_pid_maps(5): start-end permissions offset device inode [name]
        addresses, permissions, _, _, inode, *_ = line.split(maxsplit=5)
        if permissions[3] != "p" or inode != "0":
            continue
        start, end = (int(address, 16) for address in addresses.split("-"))
        if found and found[-1][1] == start:
            start = found.pop()[0]
        found.append((start, end))
    return found


def _copy_touched(source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy bytes of anonymous memory into fresh shared memory, leaving out pages that were never touched.

    Parameters that wait for their checkpoint are mostly such: reading them would map each page only to copy zeros over
    zeros, and cost as much as the load itself.
    """
    page, address, count = mmap.PAGESIZE, source.data_ptr(), source.numel()
    first = address // page
    pages = (address + count - 1) // page - first + 1
    try:
        with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
            entries = np.frombuffer(os.pread(pagemap.fileno(), pages * 8, first * 8), dtype=np.uint64)
    except OSError:
        entries = np.empty(0, dtype=np.uint64)
    if len(entries) != pages:  # not told: copy everything
        target.copy_(source)
        return
    touched = np.flatnonzero(entries >> np.uint64(62))  # bit 63: present, bit 62: swapped out
    for run in np.split(touched, np.flatnonzero(np.diff(touched) > 1) + 1):
        if len(run):
            begin = max(0, (first + int(run[0])) * page - address)
            end = min(count, (first + int(run[-1]) + 1) * page - address)
            target[begin:end].copy_(source[begin:end])


def _advise_huge_pages(mapping: mmap.mmap) -> None:
    try:
        mapping.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        return  # a kernel without huge pages for shared memory: a matter of speed only
