"""Where each tensor of a safetensors checkpoint lies, byte for byte.

The format is https://github.com/huggingface/safetensors#format: 8 bytes little-endian header length N, N bytes of JSON
(`name → {dtype, shape, data_offsets}`), then the data, without holes. Shards are listed in an `*.index.json`.
Headers are validated strictly, because what is read here is later written to.

Blocks are counted per tensor: block b of a tensor is its contiguous checkpoint bytes [4096 b, 4096 (b + 1)), the last
one may be short. Tensors are numbered by file name and then by place in the file; `first_block` numbers all blocks.
"""

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import xxhash

from hogwild.checkpoint.constants import BLOCK, MAX_HEADER
from hogwild.errors import CheckpointLayout

DTYPE_BYTES: dict[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
"""Bytes per element; dtypes below a byte (F4, F6) are not here, so files that use them are refused."""


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One tensor of the checkpoint."""

    name: str
    number: int  # place in Layout.tensors
    file: str  # file name within the directory
    offset: int  # bytes from the start of the file
    nbytes: int
    dtype: str  # as safetensors writes it: F32, BF16, …
    shape: tuple[int, ...]
    first_block: int  # number of its first block among all blocks

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return DTYPE_BYTES[self.dtype]

    @property
    def blocks(self) -> int:
        """Number of blocks; the last may be short."""
        return -(-self.nbytes // BLOCK)

    def block_bytes(self, start: int, stop: int) -> int:
        """Bytes of blocks [start, stop)."""
        return min(stop * BLOCK, self.nbytes) - start * BLOCK


@dataclass(frozen=True, kw_only=True)
class FileSpec:
    """One safetensors file."""

    name: str
    size: int  # bytes
    header: str  # XXH3-128 of the length field and the header, hex
    data_start: int  # bytes


@dataclass(frozen=True, kw_only=True)
class Layout:
    """All tensors of a checkpoint directory, in block order."""

    files: tuple[FileSpec, ...]
    tensors: tuple[TensorSpec, ...]
    by_name: dict[str, TensorSpec] = field(repr=False)

    @property
    def blocks(self) -> int:
        """Number of blocks of all tensors."""
        last = self.tensors[-1]
        return last.first_block + last.blocks

    @cached_property
    def id(self) -> str:
        """XXH3-128 (hex) over names, types, shapes and places: equal ids mean that block numbers mean the same."""
        parts = [[spec.file, spec.name, spec.dtype, spec.shape, spec.offset, spec.nbytes] for spec in self.tensors]
        return xxhash.xxh3_128_hexdigest(json.dumps(parts, separators=(",", ":")).encode())

    def file(self, name: str) -> FileSpec:
        """The file of that name."""
        return next(spec for spec in self.files if spec.name == name)

    def of_file(self, name: str) -> Iterator[TensorSpec]:
        """Tensors of a file in the order of their data."""
        return (spec for spec in self.tensors if spec.file == name)

    @classmethod
    def read(cls, directory: Path) -> "Layout":
        """Parse the headers of the checkpoint in `directory`.

        Raises CheckpointLayout, naming file and tensor, for anything that does not hold together.
        """
        names, weight_map = _weight_files(directory)
        files: list[FileSpec] = []
        tensors: list[TensorSpec] = []
        block = 0
        for name in names:
            spec, entries = read_header(directory / name)
            files.append(spec)
            for tensor, dtype, shape, start, stop in entries:
                tensors.append(
                    TensorSpec(
                        name=tensor,
                        number=len(tensors),
                        file=name,
                        offset=spec.data_start + start,
                        nbytes=stop - start,
                        dtype=dtype,
                        shape=shape,
                        first_block=block,
                    )
                )
                block += tensors[-1].blocks
        by_name: dict[str, TensorSpec] = {}
        for tensor_spec in tensors:
            if tensor_spec.name in by_name:
                raise CheckpointLayout(
                    f"{tensor_spec.name} is both in {by_name[tensor_spec.name].file} and in {tensor_spec.file}."
                )
            by_name[tensor_spec.name] = tensor_spec
        for tensor, file in weight_map.items():
            if tensor not in by_name or by_name[tensor].file != file:
                raise CheckpointLayout(f"the index of {directory} says that {tensor} is in {file}, but it is not.")
        if not tensors:
            raise CheckpointLayout(f"{directory} holds no tensors.")
        return cls(files=tuple(files), tensors=tuple(tensors), by_name=by_name)


def _weight_files(directory: Path) -> tuple[list[str], dict[str, str]]:
    """Names of the safetensors files to use, sorted, and the index's weight map (empty without an index)."""
    if not directory.is_dir():
        raise CheckpointLayout(f"{directory} is not a directory.")
    indexes = sorted(directory.glob("*.safetensors.index.json"))
    singles = sorted(path.name for path in directory.glob("*.safetensors"))
    if len(indexes) > 1:
        raise CheckpointLayout(f"{directory} has several indexes: {', '.join(path.name for path in indexes)}.")
    if not indexes:
        if len(singles) == 1:
            return singles, {}
        if "model.safetensors" in singles:
            return ["model.safetensors"], {}
        found = f"has {len(singles)} safetensors files and no index" if singles else "has no safetensors file"
        raise CheckpointLayout(f"{directory} {found}: a Hugging Face model directory with safetensors is needed.")
    try:
        weight_map = json.loads(indexes[0].read_text())["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointLayout(f"{indexes[0]} is not a safetensors index: {type(error).__name__}.") from error
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard or shard not in singles:
            raise CheckpointLayout(f"{indexes[0]} names the shard {shard!r}, which is not in {directory}.")
    if "model.safetensors" in singles and "model.safetensors" not in shards:
        raise CheckpointLayout(
            f"{directory} has both model.safetensors and {indexes[0].name}, and loaders disagree on "
            "which one counts: remove one of them."
        )
    return shards, dict(weight_map)


def read_header(path: Path) -> tuple[FileSpec, list[tuple[str, str, tuple[int, ...], int, int]]]:
    """Parse one safetensors header: the file, and (name, dtype, shape, start, stop) by place; offsets from the data."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise CheckpointLayout(f"{path} is too short to be a safetensors file.")
            (length,) = struct.unpack("<Q", prefix)
            if length > MAX_HEADER or 8 + length > size:
                raise CheckpointLayout(f"{path}: header length {length} does not fit the file of {size} bytes.")
            raw = file.read(length)
    except OSError as error:
        raise CheckpointLayout(f"{path} can't be read: {error.strerror}.") from error
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointLayout(f"{path}: the header is not valid JSON ({error}).") from error
    if not isinstance(header, dict):
        raise CheckpointLayout(f"{path}: the header is not an object.")
    header.pop("__metadata__", None)
    entries = sorted((_entry(path, name, value) for name, value in header.items()), key=lambda entry: entry[3:])
    position = 0
    for name, _, _, start, stop in entries:
        if start != position:
            raise CheckpointLayout(f"{path}: {name} starts at byte {start} of the data, expected {position}.")
        position = stop
    if 8 + length + position != size:
        raise CheckpointLayout(f"{path}: the tensors end at byte {8 + length + position} of {size}.")
    digest = xxhash.xxh3_128_hexdigest(prefix + raw)
    return FileSpec(name=path.name, size=size, header=digest, data_start=8 + length), entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are all different."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _entry(path: Path, name: str, value: Any) -> tuple[str, str, tuple[int, ...], int, int]:
    """Check one tensor of a header."""
    try:
        dtype, shape, (start, stop) = value["dtype"], value["shape"], value["data_offsets"]
        counts = [*shape, start, stop]
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointLayout(f"{path}: the entry of {name} is malformed.") from error
    if dtype not in DTYPE_BYTES:
        raise CheckpointLayout(f"{path}: {name} has the dtype {dtype!r}, which can't be updated in place.")
    if any(type(count) is not int or count < 0 for count in counts):
        raise CheckpointLayout(f"{path}: {name} has a shape or offset that is not a natural number.")
    if stop - start != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise CheckpointLayout(
            f"{path}: {name} takes {stop - start} bytes, but its shape {shape} needs "
            f"{math.prod(shape) * DTYPE_BYTES[dtype]}."
        )
    return name, dtype, tuple(shape), start, stop
