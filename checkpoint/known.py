"""Which files are still as this process left them, so that they need not be read before they are replaced.

A file whose inode, size and times are those it had when its contents were known has not been written to by anybody
since: the rule by which git, rsync and make go. It saves a sync that replaces most of a file from reading all of it.
Contents are compared with their fingerprints nevertheless, when undo data is made of them.
"""

import os
import time
from collections.abc import Iterable
from pathlib import Path

from hogwild.checkpoint.layout import Layout
from hogwild.checkpoint.stage import StagedFrame

Stamp = tuple[int, int, int, int, int]
"""Device, inode, size, time of the last write, time of the last change of any kind."""
_COARSE = 5  # CLOCK_REALTIME_COARSE: the clock that files' times are taken from (before Linux 6.13, and at most)
_LONGEST_TICK = 0.02  # seconds; the kernel's tick is 1 to 10 ms


def stamp(info: os.stat_result) -> Stamp:
    """What changes whenever somebody writes to a file."""
    return info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns


class KnownFiles:
    """File name → its stamp and the tensors in it whose contents are those of the last generation."""

    def __init__(self) -> None:
        self._files: dict[str, tuple[Stamp, frozenset[int]]] = {}

    def tensors(self, name: str, fd: int) -> frozenset[int]:
        """Numbers of the tensors that are known to be what the last generation left in the open file `fd`."""
        seen, tensors = self._files.get(name, (None, frozenset[int]()))
        return tensors if seen == stamp(os.fstat(fd)) else frozenset()

    def keep(self, name: str, path: Path, tensors: frozenset[int]) -> None:
        """Note what is known of a file that was just written."""
        if not tensors:
            self._files.pop(name, None)
            return
        self._files[name] = lasting_stamp(path), tensors

    def note_written(
        self, directory: Path, layout: Layout, frames: Iterable[StagedFrame], before: dict[str, frozenset[int]]
    ) -> None:
        """Tensors of which everything was written, or was known `before` (file → tensors), are known now."""
        written: dict[int, int] = {}
        for frame in frames:
            written[frame.spec.number] = written.get(frame.spec.number, 0) + frame.nbytes
        for file, known in before.items():
            whole = {spec.number for spec in layout.of_file(file) if written.get(spec.number) == spec.nbytes}
            self.keep(file, directory / file, known | whole)

    def keep_all(self, layout: Layout, stamps: dict[str, Stamp]) -> None:
        """Note that all of every file was compared after `stamps` were taken."""
        for name, found in stamps.items():
            self._files[name] = found, frozenset(spec.number for spec in layout.of_file(name))


def lasting_stamp(path: Path) -> Stamp:
    """A stamp that no later write can leave behind too: taken when the clock's tick of the last write is over."""
    changed = path.stat().st_ctime_ns
    end = time.monotonic() + _LONGEST_TICK
    while time.clock_gettime_ns(_COARSE) <= changed and time.monotonic() < end:
        time.sleep(0.001)
    return stamp(path.stat())


def stamps_of(directory: Path, layout: Layout) -> dict[str, Stamp]:
    """The stamp of every weight file."""
    return {file.name: lasting_stamp(directory / file.name) for file in layout.files}
