"""Fingerprints and copies of CUDA weights: one pass over them on the GPU, and only changed blocks cross to the host.

The kernel computes XXH3-128 of each 4 KB block, the very value that the xxhash library gives, so that a checkpoint
written from a GPU is verified on any machine. Written from the specification
(https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md, XXH3 for inputs above 240 bytes). A 4 KB block is four
rounds of 16 stripes of 8 lanes, one GPU thread per lane; within a round the lanes only add up, so that lanes exchange
inputs once a round; three rounds end with a scramble, the last with the merge. Imported only where there is CUDA (or
Triton's interpreter).
"""

from collections import Counter
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from hogwild.checkpoint.constants import BLOCK
from hogwild.checkpoint.fingerprints import Bytes, Table, fingerprints
from hogwild.checkpoint.layout import Layout, TensorSpec
from hogwild.checkpoint.stage import Arena, Stage
from hogwild.checkpoint.views import DEVICE_PIECE, flat_bytes, pieces

_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221b8084674f743248e"
    "e03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8a8fa763fe39c343ff9dcbbc7c70b4f1d8a"
    "51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8f"
    "f8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
"""The default secret of XXH3, 192 bytes (specification, XXH3 section)."""
_P32_1, _P32_2, _P32_3 = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D
_P64_1, _P64_2, _P64_3 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
_P64_4, _P64_5 = 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5
_MASK = (1 << 64) - 1

BLOCKS_PER_PROGRAM = 16
WARPS = 4


@triton.jit  # type: ignore[untyped-decorator]
def _xxh3_128(  # type: ignore[no-untyped-def]  # Triton's own argument types
    data,  # (blocks * 512,) int64
    consts,  # (288,) int64: start 8, stripe keys (16, 8), last round's keys (16, 8), scramble 8, merge 8 low and 8 high
    out,  # (blocks, 2) int64: low, high
    blocks,
    start_low: tl.constexpr,
    start_high: tl.constexpr,
    PRIME32_1: tl.constexpr,
    AVALANCHE: tl.constexpr,
    N: tl.constexpr,  # blocks per program
):
    lane = tl.arange(0, 8)
    row = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    inside = row < blocks
    acc = tl.load(consts + lane)[None, :] + tl.zeros((N, 8), tl.int64)
    for part in tl.static_range(4):
        inputs = tl.zeros((N, 8), tl.int64)
        for stripe in tl.static_range(16):  # independent loads: all sixteen are under way at once
            key = tl.load(consts + (136 if part == 3 else 8) + stripe * 8 + lane)[None, :]
            value = tl.load(
                data + row[:, None] * 512 + part * 128 + stripe * 8 + lane[None, :], mask=inside[:, None], other=0
            )
            keyed = (value ^ key).to(tl.uint64, bitcast=True)
            acc += (keyed.to(tl.uint32).to(tl.uint64) * (keyed >> 32)).to(tl.int64, bitcast=True)
            inputs += value
        even, odd = tl.split(tl.reshape(inputs, (N, 4, 2)))
        acc += tl.reshape(tl.join(odd, even), (N, 8))  # each lane takes its neighbour's input
        if part < 3:
            mixed = acc.to(tl.uint64, bitcast=True)
            mixed ^= mixed >> 47
            mixed ^= tl.load(consts + 264 + lane).to(tl.uint64, bitcast=True)[None, :]
            acc = (mixed * PRIME32_1).to(tl.int64, bitcast=True)
    for half in tl.static_range(2):
        keyed = acc ^ tl.load(consts + 272 + half * 8 + lane)[None, :]
        a, b = tl.split(tl.reshape(keyed, (N, 4, 2)))
        a = a.to(tl.uint64, bitcast=True)
        b = b.to(tl.uint64, bitcast=True)
        folded = (a * b) ^ tl.umulhi(a, b)
        total = tl.sum(folded.to(tl.int64, bitcast=True), axis=1) + (start_high if half else start_low)
        h = total.to(tl.uint64, bitcast=True)
        h ^= h >> 37
        h *= AVALANCHE
        h ^= h >> 32
        tl.store(out + row * 2 + half, h.to(tl.int64, bitcast=True), mask=inside)


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


@lru_cache
def _consts(device: str) -> Tensor:  # (288,) int64
    def words(offset: int) -> list[int]:
        return [int(word) for word in np.frombuffer(_SECRET, "<u8", 8, offset)]

    start = [_P32_3, _P64_1, _P64_2, _P64_3, _P64_4, _P32_2, _P64_5, _P32_1]
    keys = [words(8 * stripe) for stripe in range(16)]
    last = [*keys[:15], words(192 - 64 - 7)]  # the block's last stripe has a place of its own in the secret
    rows = [start, *keys, *last, words(192 - 64), words(11), words(192 - 64 - 11)]
    return torch.tensor([_signed(word) for row in rows for word in row], dtype=torch.int64, device=device)


def hash_blocks(
    data: Tensor,  # (blocks * 4096,) uint8, 8-byte aligned
    out: Tensor,  # (blocks, 2) int64: low, high
) -> None:
    """XXH3-128 of each 4 KB block."""
    blocks = len(out)
    if blocks:
        _xxh3_128[(triton.cdiv(blocks, BLOCKS_PER_PROGRAM),)](
            data.view(torch.int64), _consts(str(data.device)), out, blocks, _signed(BLOCK * _P64_1),
            _signed(~(BLOCK * _P64_2)), _P32_1, 0x165667919E3779F9, BLOCKS_PER_PROGRAM, num_warps=WARPS,
        )  # fmt: skip


def _hash_view(view: Tensor, out: Tensor, tails: list[tuple[Tensor, Tensor]]) -> None:
    """Fingerprint the whole blocks of a view into `out` (blocks, 2); a short last block is put aside in `tails`."""
    limit = 1 << 30 if view.is_contiguous() and view.data_ptr() % 8 == 0 else DEVICE_PIECE
    for offset, part in pieces(view, limit):
        flat = flat_bytes(part)
        if flat.data_ptr() % 8:
            flat = flat.clone()
        full = flat.numel() // BLOCK
        first = offset // BLOCK
        hash_blocks(flat[: full * BLOCK], out[first : first + full])
        if full * BLOCK < flat.numel():
            tails.append((out[first + full], flat[full * BLOCK :]))


def _hash_tails(tails: list[tuple[Tensor, Tensor]]) -> None:
    """Short blocks (one per tensor at most) are hashed on the host; they cross in one copy."""
    if not tails:
        return
    host = torch.cat([data for _, data in tails]).cpu().numpy()
    position = 0
    rows = []
    for _, data in tails:
        rows.append(fingerprints(host[position : position + data.numel()]))
        position += data.numel()
    values = torch.from_numpy(np.concatenate(rows).view(np.int64)).to(tails[0][0].device)
    for (row, _), value in zip(tails, values, strict=True):
        row.copy_(value)


def view_fingerprints(spec: TensorSpec, view: Tensor) -> Table:  # (spec.blocks, 2)
    """Fingerprints of one CUDA view."""
    out = torch.empty((spec.blocks, 2), dtype=torch.int64, device=view.device)
    tails: list[tuple[Tensor, Tensor]] = []
    _hash_view(view, out, tails)
    _hash_tails(tails)
    table: Table = out.cpu().numpy().view(np.uint64)
    return table


def pinned(nbytes: int) -> Bytes:
    """Page-locked host memory: the GPU's copy engine writes into it at the full rate of the bus."""
    array: Bytes = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy()
    return array


def reserve(views: dict[str, Tensor], arena: Arena) -> None:
    """Everything that a first `stage_changed` would have to make while training waits: kernels and host memory."""
    blocks: Counter[torch.device] = Counter()
    for view in views.values():
        blocks[view.device] += -(-view.numel() * view.element_size() // BLOCK)
    for where, count in blocks.items():
        with torch.cuda.device(where):
            _numbers(arena, where, count)
            data = torch.zeros(2 * BLOCK, dtype=torch.uint8, device=where)
            now = torch.empty((2, 2), dtype=torch.int64, device=where)
            hash_blocks(data, now)
            changed = (now != now.flip(0)).any(dim=1).nonzero().flatten()
            data.view(-1, BLOCK).index_select(0, torch.zeros(1, dtype=torch.int64, device=where))
            now[changed].cpu()


def _numbers(arena: Arena, where: torch.device, blocks: int) -> tuple[Tensor, Tensor]:
    """Page-locked memory for the fingerprints (blocks, 2) and numbers (blocks,) of changed blocks of a device."""
    rows = torch.from_numpy(arena.scratch(f"{where} rows", 16 * blocks)).view(torch.int64).view(-1, 2)
    return rows, torch.from_numpy(arena.scratch(f"{where} numbers", 8 * blocks)).view(torch.int64)


def stage_changed(layout: Layout, views: dict[str, Tensor], table: Table, stage: Stage) -> None:
    """Fingerprint CUDA views on their devices and copy the blocks that differ from `table` to the host."""
    by_device: dict[torch.device, list[TensorSpec]] = {}
    for spec in layout.tensors:
        if spec.name in views and spec.blocks:
            by_device.setdefault(views[spec.name].device, []).append(spec)
    for where, specs in by_device.items():
        with torch.cuda.device(where):
            _stage_device(where, specs, views, table, stage)


def _stage_device(
    where: torch.device, specs: list[TensorSpec], views: dict[str, Tensor], table: Table, stage: Stage
) -> None:
    # Other streams may have written the weights: their work has to be done before it is looked at.
    torch.cuda.synchronize(where)
    ends = np.cumsum([spec.blocks for spec in specs])
    now = torch.empty((int(ends[-1]), 2), dtype=torch.int64, device=where)
    tails: list[tuple[Tensor, Tensor]] = []
    for spec, end in zip(specs, ends.tolist(), strict=True):
        _hash_view(views[spec.name], now[end - spec.blocks : end], tails)
    _hash_tails(tails)
    # Nothing here takes fresh host memory: its first touch would cost more than the copies.
    old = torch.empty_like(now)
    for start, end, first in _stretches(specs):
        old[start:end].copy_(torch.from_numpy(table[first : first + end - start].view(np.int64)))
    changed = (now != old).any(dim=1).nonzero().flatten()
    host_rows, host_numbers = (host[: len(changed)] for host in _numbers(stage.arena, where, len(now)))
    host_rows.copy_(now[changed], non_blocking=True)
    host_numbers.copy_(changed, non_blocking=True)
    torch.cuda.synchronize(where)
    rows, numbers = host_rows.numpy().view(np.uint64), host_numbers.numpy()
    for spec, end in zip(specs, ends.tolist(), strict=True):
        here = slice(*np.searchsorted(numbers, (end - spec.blocks, end)).tolist())
        if here.start == here.stop:
            continue
        _copy_blocks(spec, views[spec.name], numbers[here] - (end - spec.blocks), rows[here], stage)
    torch.cuda.synchronize(where)


def _stretches(specs: list[TensorSpec]) -> list[tuple[int, int, int]]:
    """Tensors whose rows follow each other in the checkpoint's table: (start, end) in a device's, first row in that."""
    found: list[tuple[int, int, int]] = []
    end = 0
    for spec in specs:
        if found and found[-1][2] + found[-1][1] - found[-1][0] == spec.first_block:
            found[-1] = (found[-1][0], end + spec.blocks, found[-1][2])
        else:
            found.append((end, end + spec.blocks, spec.first_block))
        end += spec.blocks
    return found


def _copy_blocks(spec: TensorSpec, view: Tensor, blocks: Any, rows: Table, stage: Stage) -> None:
    """Gather the changed blocks of a view on the device and send them to the stage's pinned memory."""
    for offset, part in pieces(view, 1 << 30 if view.is_contiguous() else DEVICE_PIECE):
        first = offset // BLOCK
        nbytes = part.numel() * part.element_size()
        here = slice(*np.searchsorted(blocks, (first, first + -(-nbytes // BLOCK))).tolist())
        if here.start == here.stop:
            continue
        flat = flat_bytes(part)
        full = flat.numel() // BLOCK
        for frame, buffer in stage.slots(spec, blocks[here], rows[here]):
            mine = frame.blocks - first
            target = torch.from_numpy(buffer)
            if mine[-1] - mine[0] + 1 == len(mine):  # neighbours: no gathering
                start = int(mine[0]) * BLOCK
                target.copy_(flat[start : start + frame.nbytes], non_blocking=True)
            else:
                count = len(mine) if mine[-1] < full else len(mine) - 1
                index = torch.from_numpy(mine[:count]).to(flat.device, non_blocking=True)
                gathered = flat[: full * BLOCK].view(-1, BLOCK).index_select(0, index).flatten()
                target[: count * BLOCK].copy_(gathered, non_blocking=True)
                if count < len(mine):
                    target[count * BLOCK :].copy_(flat[full * BLOCK :], non_blocking=True)
            if frame.data is None:  # spilled as soon as we go on: the bytes have to be here
                torch.cuda.synchronize(flat.device)
