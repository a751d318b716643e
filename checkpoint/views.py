"""Blocks of live weights: read from tensor views of any stride, on the CPU or on CUDA, and written back in place.

A view may be a slice of a fused parameter (a part of qkv, an expert, a column range of a tensor-parallel layer); the
blocks are those of its contiguous checkpoint bytes. Nothing larger than a few pieces is ever copied to look at it.
"""

import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from hogwild.checkpoint.constants import BLOCK, PIECE
from hogwild.checkpoint.fingerprints import Bytes, Indices, Table, differing, fingerprints
from hogwild.checkpoint.layout import Layout, TensorSpec
from hogwild.checkpoint.memo import FingerprintMemo
from hogwild.checkpoint.stage import Stage
from hogwild.errors import CheckpointError, CheckpointLayout

TORCH_DTYPES: dict[torch.dtype, str] = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64", torch.bool: "BOOL",
    torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip

Views = Mapping[str, Tensor]
"""Checkpoint tensor name → live view with the shape and dtype of the checkpoint tensor, any stride."""

DEVICE_PIECE = 64 << 20
"""Bytes of a strided CUDA view that are made contiguous at a time."""


def check_views(layout: Layout, views: Views) -> None:
    """Raise CheckpointLayout, with every name, unless each view has the name, dtype and shape of a file's tensor."""
    wrong = []
    for name, view in views.items():
        spec = layout.by_name.get(name)
        if spec is None:
            wrong.append(f"{name} is not in the checkpoint")
        elif TORCH_DTYPES.get(view.dtype) != spec.dtype:
            wrong.append(f"{name} is {str(view.dtype).removeprefix('torch.')} live and {spec.dtype} in {spec.file}")
        elif tuple(view.shape) != spec.shape:
            wrong.append(f"{name} is {tuple(view.shape)} live and {spec.shape} in {spec.file}")
    if wrong:
        raise CheckpointLayout(
            "the live weights do not fit the checkpoint: "
            + "; ".join(wrong)
            + ". Use a checkpoint directory made from the served model.",
            tensors=wrong,
        )


def pieces(view: Tensor, limit: int) -> Iterator[tuple[int, Tensor]]:
    """Split into (byte offset, part): parts begin and end at block boundaries; a contiguous view gives flat uint8 parts
    of `limit` bytes (a multiple of BLOCK), any other view sub-views of about that size.
    """
    view = view.detach()
    if view.numel() == 0:
        return
    if view.is_contiguous():
        flat = flat_bytes(view)
        for start in range(0, flat.numel(), limit):
            yield start, flat[start : start + limit]
        return
    yield from _strided(view, limit, 0)


def _strided(view: Tensor, limit: int, offset: int) -> Iterator[tuple[int, Tensor]]:
    row = view[0].numel() * view.element_size()  # bytes
    unit = BLOCK // math.gcd(row, BLOCK)  # fewest rows that end at a block boundary
    if view.dim() > 1 and row > limit and row % BLOCK == 0:
        for index in range(view.shape[0]):
            yield from _strided(view[index], limit, offset + index * row)
        return
    rows = max(1, limit // (unit * row)) * unit
    for start in range(0, view.shape[0], rows):
        yield offset + start * row, view[start : start + rows]


def flat_bytes(part: Tensor) -> Tensor:  # (n,) uint8
    """A part's contiguous bytes: the memory itself where it is contiguous, else a copy."""
    # as_strided: a single element counts as contiguous whatever its stride, but .view(uint8) wants a stride of 1.
    return part.contiguous().as_strided((part.numel(),), (1,)).view(torch.uint8)


def host_bytes(part: Tensor) -> Bytes:  # (n,)
    """`flat_bytes` as numpy memory (CPU tensors)."""
    array: Bytes = flat_bytes(part).numpy()
    return array


def take_blocks(data: Bytes, blocks: Indices, out: Bytes) -> None:
    """Gather `blocks` (ascending numbers) of `data`, of which the last may be short, into `out`."""
    full = len(data) // BLOCK
    whole = blocks if blocks[-1] < full else blocks[:-1]
    if len(whole):
        rows = out[: len(whole) * BLOCK].reshape(-1, BLOCK)
        np.take(data[: full * BLOCK].reshape(-1, BLOCK), whole, axis=0, out=rows, mode="clip")  # raise would buffer
    if len(whole) < len(blocks):
        out[len(whole) * BLOCK :] = data[full * BLOCK :]


def stage_changed(layout: Layout, views: Views, table: Table, stage: Stage, memo: FingerprintMemo) -> None:
    """Fingerprint every view and stage the blocks that differ from `table`. Training must be paused meanwhile."""
    on_device: dict[str, Tensor] = {}
    for spec in layout.tensors:
        view = views.get(spec.name)
        if view is None:
            continue
        if view.device.type == "cpu":
            _stage_cpu(spec, view, table[spec.first_block : spec.first_block + spec.blocks], stage, memo)
        elif view.device.type == "cuda":
            on_device[spec.name] = view
        else:
            raise CheckpointError(f"{spec.name} is on {view.device}: only CPU and CUDA weights can be synced.")
    if on_device:
        from hogwild.checkpoint import device  # Triton: only where there is a GPU

        device.stage_changed(layout, on_device, table, stage)


def _stage_cpu(spec: TensorSpec, view: Tensor, table: Table, stage: Stage, memo: FingerprintMemo) -> None:
    memo.begin(spec)
    for offset, part in pieces(view, PIECE):
        data = host_bytes(part)
        first = offset // BLOCK
        now = memo.fingerprints(spec, first, data)
        changed = differing(now, table[first : first + len(now)])
        if not len(changed):
            continue
        for frame, buffer in stage.slots(spec, changed + first, now[changed]):
            take_blocks(data, frame.blocks - first, buffer)


def view_fingerprints(spec: TensorSpec, view: Tensor) -> Table:  # (spec.blocks, 2)
    """Fingerprints of a live view."""
    if view.device.type == "cuda":
        from hogwild.checkpoint import device

        return device.view_fingerprints(spec, view)
    parts = [fingerprints(host_bytes(part)) for _, part in pieces(view, PIECE)]
    return np.concatenate(parts) if parts else np.empty((0, 2), np.uint64)


def write_blocks(
    spec: TensorSpec,
    view: Tensor,
    blocks: Indices,  # (n,) within the tensor, ascending
    read: Callable[[Indices], Bytes],  # block numbers → their new contents
) -> None:
    """Copy new contents into a live view, in place; the storage never moves, so vLLM serves them at once."""
    limit = PIECE if view.device.type == "cpu" else DEVICE_PIECE
    for offset, part in pieces(view, limit):
        first = offset // BLOCK
        nbytes = part.numel() * part.element_size()
        mine = blocks[np.searchsorted(blocks, first) : np.searchsorted(blocks, first + -(-nbytes // BLOCK))]
        if not len(mine):
            continue
        source = torch.from_numpy(read(mine))
        whole = flat_bytes(part)
        _put(whole, mine - first, source.to(whole.device))
        if whole.data_ptr() != part.data_ptr():  # the view is strided: `whole` is a contiguous copy of it
            part.copy_(whole.view(part.dtype).view(part.shape))


def _put(whole: Tensor, blocks: Indices, source: Tensor) -> None:
    """Scatter the blocks in `source` into contiguous bytes."""
    full = whole.numel() // BLOCK
    count = len(blocks) if blocks[-1] < full else len(blocks) - 1
    if count:
        numbers = torch.from_numpy(blocks[:count]).to(whole.device)
        whole[: full * BLOCK].view(-1, BLOCK).index_copy_(0, numbers, source[: count * BLOCK].view(-1, BLOCK))
    if count < len(blocks):
        whole[full * BLOCK :] = source[count * BLOCK :]
