"""The counter that says which weights are being served, shared by vLLM's processes and the worker.

One 4 KB file, mapped by everybody who needs it, holding little-endian 64-bit words:

    word 0      magic
    word 1      weight version: +1 for each optimizer step that was applied
    word 2      begun: version + 1 while a step is being written, otherwise equal to the version
    word 3      writes begun since the export; 0 means the live weights are still what vLLM loaded
    word 4, 5   export id, as the 16 bytes it stands for
    word 6      1 while a generation is being written into the live weights: until it is 0 they are no generation's
    word 7      which generation the live weights were last equal to: low half its number + 1 (0: none), high half a
                hash of the checkpoint's directory

Only the worker that holds `worker.lock` writes; each word is stored by one aligned 8-byte move, so a reader sees an old
or a new value, never a mixture. A worker that dies within a step leaves begun = version + 1: the next one sees that the
weights were torn. Needs neither torch nor vLLM.
"""

import contextlib
import hashlib
import mmap
import os
from pathlib import Path
from typing import Self

from hogwild.errors import ManifestError

FILE_NAME = "weights.state"
SIZE = mmap.PAGESIZE
_MAGIC = int.from_bytes(b"HOGWILD1", "little")
_VERSION, _BEGUN, _WRITES, _ID, _RESTORING, _ORIGIN = 1, 2, 3, 4, 6, 7


class WeightState:
    """A mapped weight state. Use `create` or `open`."""

    def __init__(self, mapping: mmap.mmap, inode: int) -> None:
        self._mapping = mapping
        self._words = memoryview(mapping).cast("Q")
        self.inode = inode

    @classmethod
    def create(cls, path: Path, export_id: str) -> Self:
        """Make a fresh state (version 0) in place of whatever was there; who mapped the old file keeps the old one.

        `export_id`: 32 hexadecimal digits.
        """
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        words = [_MAGIC, 0, 0, 0, *(int(export_id[i : i + 16], 16) for i in (0, 16))]
        data = b"".join(word.to_bytes(8, "little") for word in words)
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.write(descriptor, data.ljust(SIZE, b"\0"))
        finally:
            os.close(descriptor)
        temporary.replace(path)
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Map an existing state.

        Raises:
            ManifestError: there is none, it belongs to another user, or it is not a weight state.
        """
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise ManifestError(f"can't open the weight state {path}: {error.strerror}") from error
        try:
            stat = os.fstat(descriptor)
            if stat.st_uid != os.getuid():
                raise ManifestError(f"{path} belongs to user {stat.st_uid}, not to user {os.getuid()}")
            if stat.st_size != SIZE:
                raise ManifestError(f"{path} is {stat.st_size} bytes, a weight state is {SIZE}")
            mapping = mmap.mmap(descriptor, SIZE)
        finally:
            os.close(descriptor)
        state = cls(mapping, stat.st_ino)
        if state._words[0] != _MAGIC:
            state.close()
            raise ManifestError(f"{path} is not a weight state")
        return state

    @property
    def export_id(self) -> str:
        """Which export of weights this counts for."""
        return f"{self._words[_ID]:016x}{self._words[_ID + 1]:016x}"

    @property
    def version(self) -> int:
        """Weight version: optimizer steps applied to the live weights."""
        return self._words[_VERSION]

    @property
    def begun(self) -> int:
        """`version + 1` while a step is being written into the live weights, otherwise `version`."""
        return self._words[_BEGUN]

    @property
    def torn(self) -> bool:
        """A step was begun and not (yet) completed."""
        return self._words[_BEGUN] != self._words[_VERSION]

    @property
    def untouched(self) -> bool:
        """Nothing was written into the live weights since vLLM exported them."""
        return self._words[_WRITES] == 0

    @property
    def restoring(self) -> bool:
        """A generation was being written into the live weights and may be there in part."""
        return self._words[_RESTORING] != 0

    def touch(self) -> None:
        """Say that live weights are about to be written."""
        self._words[_WRITES] += 1

    def begin_restore(self) -> None:
        """A generation is about to be written into the live weights (a rollback, a restore)."""
        self._words[_RESTORING] = 1
        self.touch()

    def restored(self, version: int) -> None:
        """The generation of that version is in the live weights, all of it."""
        self.set_version(version)
        self._words[_RESTORING] = 0

    def note_generation(self, directory: Path, generation: int) -> None:
        """The live weights come from this generation of the checkpoint in `directory`: saved as it, or read from it.

        A commit may end after its weights were let go of: then there is nothing to note.
        """
        with contextlib.suppress(ValueError):  # closed
            self._words[_ORIGIN] = _directory_hash(directory) << 32 | generation + 1

    def generation_in(self, directory: Path) -> int | None:
        """The generation of the checkpoint in `directory` that the live weights come from; None: not known."""
        found, number = divmod(self._words[_ORIGIN], 1 << 32)
        return number - 1 if number and found == _directory_hash(directory) else None

    def begin(self) -> int:
        """A step starts to write; returns the version it will produce."""
        self.touch()
        self._words[_BEGUN] = self._words[_VERSION] + 1
        return self._words[_BEGUN]

    def applied(self) -> int:
        """The step is complete; returns the new version."""
        self._words[_VERSION] = self._words[_BEGUN] = self._words[_VERSION] + 1
        return self._words[_VERSION]

    def set_version(self, version: int) -> None:
        """Continue counting elsewhere: after a rollback, or when vLLM loaded a checkpoint of that version."""
        self._words[_VERSION] = self._words[_BEGUN] = version

    def close(self) -> None:
        """Unmap; the object is of no use afterwards."""
        self._words.release()
        with contextlib.suppress(BufferError):  # somebody holds a view of ours: the mapping goes with it
            self._mapping.close()


def _directory_hash(directory: Path) -> int:
    return int.from_bytes(hashlib.blake2b(os.fsencode(directory.resolve()), digest_size=4).digest(), "little")
