"""Which model a checkpoint began with, so that another one of the same name is not taken for it.

`source.json` in our folder is durable before the first generation is. Where a model lies, its headers and its files'
times are looked at first; its contents are read only when those do not settle it.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import xxhash

from hogwild.checkpoint.blockfile import file_table
from hogwild.checkpoint.constants import SOURCE_FILE, SOURCE_VERSION
from hogwild.checkpoint.durable import FileIo
from hogwild.checkpoint.fingerprints import table_digest
from hogwild.checkpoint.layout import Layout


@dataclass(frozen=True, kw_only=True)
class SourceModel:
    """A model directory as it was when it was looked at."""

    path: str  # resolved
    config: str  # XXH3-128 of config.json, empty without one
    files: dict[str, list[str | int]]  # weight file → digest of its header, bytes
    times: dict[str, list[int]]  # weight file → times of its last write and last change, ns
    contents: str = ""  # digest of the fingerprints of all blocks: equal digests mean equal weights
    version: int = SOURCE_VERSION

    @classmethod
    def of(cls, directory: Path) -> Self:
        """What is known without reading the weights. Raises CheckpointLayout: no safetensors model there."""
        layout = Layout.read(directory)
        config = directory / "config.json"
        infos = {file.name: (directory / file.name).stat() for file in layout.files}
        return cls(
            path=str(directory.resolve()),
            config=xxhash.xxh3_128_hexdigest(config.read_bytes()) if config.exists() else "",
            files={file.name: [file.header, file.size] for file in layout.files},
            times={name: [info.st_mtime_ns, info.st_ctime_ns] for name, info in infos.items()},
        )

    @classmethod
    def read(cls, store: Path) -> Self | None:
        """What was recorded in our folder; None: nothing, by an earlier version, or nothing that can be read."""
        try:
            known = cls(**json.loads((store / SOURCE_FILE).read_bytes()))
        except (FileNotFoundError, ValueError, TypeError):
            return None
        return known if known.version == SOURCE_VERSION else None

    def write(self, io: FileIo, store: Path) -> None:
        """Record it, atomically."""
        io.write_atomic(store / SOURCE_FILE, [json.dumps(asdict(self), indent=1).encode()])

    def untouched_since(self, known: Self) -> bool:
        """Whether this is the model that is `known`, in its place, and nobody has written to it."""
        return (self.path, self.config, self.files, self.times) == (known.path, known.config, known.files, known.times)

    def other_files(self, known: Self) -> list[str]:
        """Names of the files that show, without a look at the weights, that this is another model."""
        names: Iterable[str] = self.files.keys() | known.files.keys()
        others = sorted(name for name in names if self.files.get(name) != known.files.get(name))
        return others if self.config == known.config else ["config.json", *others]


def contents(io: FileIo, directory: Path) -> str:
    """Digest of the fingerprints of the weights in `directory`, all of which are read."""
    return table_digest(file_table(io, directory, Layout.read(directory), durable=False))
