"""Commit records: one file per generation, which exists exactly when the generation does.

    0  8  magic HOGWCMIT          16  8  table entries n
    8  4  format version          24  4  table kind: 1 full, 2 changed blocks only
    12 4  bytes of JSON           28  4  zero
    32    JSON (UTF-8): the fields of `Commit`
          kind 2: n × 4 bytes, numbers of the changed blocks among all blocks, ascending
          n × 16 bytes: fingerprints (low, high), little-endian
          16 bytes: XXH3-128 of everything before

The table of generation g is that of the last full record at or before g, with the later ones applied in turn; its
digest (`fingerprints` in the JSON) proves the result.
"""

import json
import struct
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash

from hogwild.checkpoint.constants import COMMIT_MAGIC, HASH_NAME, RECORD_VERSION, RECORDS_READ
from hogwild.checkpoint.durable import FileIo
from hogwild.checkpoint.fingerprints import Indices, Table
from hogwild.checkpoint.layout import Layout
from hogwild.errors import CheckpointCorrupt, CheckpointError

_HEADER = struct.Struct("<8sIIQII")
FULL, CHANGED = 1, 2
Kind = Literal["clone", "sync", "rollback", "adopt"]


@dataclass(frozen=True, kw_only=True)
class Commit:
    """What is known about a generation."""

    generation: int
    parent: int  # the generation that its undo file leads back to; itself for the first one
    kind: Kind
    time: str  # ISO 8601, UTC
    weight_version: int
    jobs: tuple[str, ...]
    blocks_changed: int
    blocks_total: int
    bytes_changed: int
    undo_bytes: int
    restores: int | None = None  # for a rollback: the generation whose contents it has
    layout: str = ""  # Layout.id
    files: dict[str, str] = field(default_factory=dict)  # file name → FileSpec.header
    fingerprints: str = ""  # digest of the table: equal digests mean equal contents
    base_model: str = ""  # digest of the table of the first generation: which model this all began with
    redo: bool = False  # changed blocks are in <generation>.redo until they are in place
    replaced: dict[str, str] = field(default_factory=dict)  # file → name of the new file that takes its place
    deferred: dict[str, str] = field(default_factory=dict)  # file → name that its old contents keep until the undo file
    hash: str = HASH_NAME

    def other_headers(self, layout: Layout) -> tuple[str, ...]:
        """Names of the files whose headers, names and places of tensors with them, are not those of the generation."""
        today = {file.name: file.header for file in layout.files}
        return tuple(sorted(dict(today.items() ^ self.files.items())))


def new_commit(layout: Layout, digest: str, generation: int, parent: int, kind: Kind, weight_version: int) -> Commit:
    """The record of a generation with the contents that `digest` names (`table_digest`); nothing has changed yet."""
    return Commit(
        generation=generation, parent=parent, kind=kind, time=datetime.now(UTC).isoformat(timespec="milliseconds"),
        weight_version=weight_version, jobs=(), blocks_changed=0, blocks_total=layout.blocks, bytes_changed=0,
        undo_bytes=0, layout=layout.id, files={file.name: file.header for file in layout.files}, fingerprints=digest,
        base_model=digest,
    )  # fmt: skip


@dataclass(frozen=True)
class Record:
    """A commit with its table: full, or the changed rows."""

    commit: Commit
    blocks: Indices | None  # None: the table is full
    table: Table


def write_record(io: FileIo, path: Path, record: Record) -> int:
    """Write atomically; bytes written."""
    text = json.dumps(asdict(record.commit), separators=(",", ":")).encode()
    kind = FULL if record.blocks is None else CHANGED
    parts = [_HEADER.pack(COMMIT_MAGIC, RECORD_VERSION, len(text), len(record.table), kind, 0), text]
    if record.blocks is not None:
        parts.append(record.blocks.astype("<u4").tobytes())
    parts.append(record.table.astype("<u8").tobytes())
    state = xxhash.xxh3_128()
    for part in parts:
        state.update(part)
    parts.append(state.digest())
    io.write_atomic(path, list(parts))
    return sum(map(len, parts))


def read_record(path: Path) -> Record:
    """Read and check; raises CheckpointCorrupt, or CheckpointError for a whole record of a format that is not read."""
    data = path.read_bytes()
    if len(data) < _HEADER.size + 16 or xxhash.xxh3_128_digest(memoryview(data)[:-16]) != data[-16:]:
        raise CheckpointCorrupt(f"{path} does not match its checksum.")
    magic, version, length, entries, kind, _ = _HEADER.unpack(data[: _HEADER.size])
    if magic != COMMIT_MAGIC or version not in RECORDS_READ:
        raise CheckpointError(
            f"{path} is no commit record that this Hogwild reads: format version {version}, not {RECORDS_READ}."
        )
    position = _HEADER.size + length
    fields: dict[str, Any] = json.loads(data[_HEADER.size : position])
    fields["jobs"] = tuple(fields["jobs"])
    if fields["hash"] != HASH_NAME:
        raise CheckpointError(f"{path} uses the fingerprint {fields['hash']!r}; this Hogwild knows {HASH_NAME}.")
    blocks = None
    if kind == CHANGED:
        blocks = np.frombuffer(data, "<u4", entries, position).astype(np.int64)
        position += 4 * entries
    table = np.frombuffer(data, "<u8", 2 * entries, position).reshape(-1, 2).astype(np.uint64)
    return Record(Commit(**fields), blocks, table)
