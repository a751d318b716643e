"""Blocks of the safetensors files: read, checked and written in place."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from hogwild.checkpoint.codec import scratch
from hogwild.checkpoint.constants import BLOCK, FRAME_BLOCKS
from hogwild.checkpoint.durable import FileIo, Handle
from hogwild.checkpoint.fingerprints import Bytes, Indices, Table, differing, fingerprints
from hogwild.checkpoint.layout import Layout, TensorSpec
from hogwild.checkpoint.stage import bytes_of
from hogwild.checkpoint.together import Pieces
from hogwild.errors import CheckpointForeign

_SPARSE = 8
"""Blocks spread wider than this many blocks apart are read one by one, closer ones with everything between them."""


def pieces_of(spec: TensorSpec, blocks: Indices) -> Pieces:
    """Where `blocks` (ascending), one after the other in a buffer, lie in the file; neighbours are one piece."""
    firsts = np.flatnonzero(np.diff(blocks, prepend=-2) != 1)
    starts = firsts * BLOCK
    return Pieces(starts, np.diff(starts, append=bytes_of(spec, blocks)), spec.offset + blocks[firsts] * BLOCK)


def read_blocks(handle: Handle, spec: TensorSpec, blocks: Indices, out: Bytes | None = None) -> Bytes:
    """Contents of `blocks` (ascending), one after the other; in `out` if given."""
    first, last = int(blocks[0]), int(blocks[-1])
    if out is None:
        out = np.empty(bytes_of(spec, blocks), np.uint8)
    if last - first + 1 == len(blocks):
        _fill(handle, spec, first, out)
    elif last - first < _SPARSE * len(blocks):
        window = scratch("window", spec.block_bytes(first, last + 1))
        _fill(handle, spec, first, window)
        head = (len(blocks) - 1) * BLOCK
        np.take(
            window[: (last - first) * BLOCK].reshape(-1, BLOCK),
            blocks[:-1] - first,
            axis=0,
            out=out[:head].reshape(-1, BLOCK),
            mode="clip",
        )
        out[head:] = window[(last - first) * BLOCK :]
    elif not handle.pread_pieces(out, pieces_of(spec, blocks)):
        raise _too_short(handle)
    return out


def _fill(handle: Handle, spec: TensorSpec, block: int, out: Bytes) -> None:
    if handle.pread_into(out.data, spec.offset + block * BLOCK) != len(out):
        raise _too_short(handle)


def _too_short(handle: Handle) -> CheckpointForeign:
    return CheckpointForeign(f"{handle.path} is shorter than its header says.")


def write_blocks(handle: Handle, spec: TensorSpec, blocks: Indices, data: Bytes) -> None:
    """Write `blocks` (ascending) from `data` to their places."""
    handle.pwrite_pieces(data, pieces_of(spec, blocks))


def check_old(handle: Handle, spec: TensorSpec, blocks: Indices, data: Bytes, table: Table) -> None:
    """Raise CheckpointForeign unless `data` are the contents that the last generation left there."""
    wrong = differing(fingerprints(data), table[spec.first_block + blocks])
    if len(wrong):
        raise CheckpointForeign(
            f"{handle.path} was changed by something else: {spec.name} differs from the last generation in "
            f"{len(wrong)} of {len(blocks)} blocks looked at. Nothing was written. `hogwild checkpoint adopt` accepts "
            "the files as they are; earlier generations are then gone.",
            file=str(handle.path),
            tensor=spec.name,
        )


def windows(spec: TensorSpec, size: int) -> Iterator[Indices]:
    """All blocks of a tensor, `size` at a time."""
    for start in range(0, spec.blocks, size):
        yield np.arange(start, min(start + size, spec.blocks), dtype=np.int64)


def file_table(io: FileIo, directory: Path, layout: Layout, *, durable: bool = True) -> Table:
    """Fingerprints of the files.

    `durable`: the files are made durable, because a record that says what they hold must not outlive that.
    """
    parts: list[Table] = []
    for file in layout.files:
        with io.open(directory / file.name) as handle:
            if durable:
                handle.fsync()
            for spec in layout.of_file(file.name):
                parts.extend(fingerprints(read_blocks(handle, spec, window)) for window in windows(spec, FRAME_BLOCKS))
    if durable:
        io.fsync_dir(directory)
    return np.concatenate(parts) if parts else np.empty((0, 2), np.uint64)


def compare_files(io: FileIo, directory: Path, layout: Layout, table: Table) -> dict[str, int]:
    """Tensor name → number of blocks on disk that differ from `table`; empty when all agree."""
    found: dict[str, int] = {}
    for file in layout.files:
        with io.open(directory / file.name) as handle:
            for spec in layout.of_file(file.name):
                for window in windows(spec, FRAME_BLOCKS):
                    data = read_blocks(handle, spec, window)
                    wrong = len(differing(fingerprints(data), table[spec.first_block + window]))
                    if wrong:
                        found[spec.name] = found.get(spec.name, 0) + wrong
    return found
