"""The lock between those who read the checkpoint's files and the one who puts blocks in place."""

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from hogwild.checkpoint.durable import FileLock

READER_PATIENCE = 60.0
"""Seconds that a sync waits for readers of the files before it leaves the last step to `CheckpointStore.finish`."""
POLL_S = 0.05


class ReadersLock:
    """`.hogwild/readers.lock`: held shared by readers, alone by a writer; waits `patience` seconds at most."""

    def __init__(self, path: Path, patience: float) -> None:
        self._path, self._patience = path, patience
        self._alone = False

    @contextlib.contextmanager
    def alone(self, patience: float = math.inf) -> Iterator[bool]:
        """Hold it alone; yields False when a reader did not finish in `patience` seconds.

        May be nested, and is for one thread at a time: that which holds the store's mutex.
        """
        if self._alone:
            yield True
            return
        lock = FileLock(self._path)
        end = time.monotonic() + min(patience, self._patience)
        while not lock.acquire():
            if time.monotonic() > end:
                yield False
                return
            time.sleep(POLL_S)
        self._alone = True
        try:
            yield True
        finally:
            self._alone = False
            lock.release()

    @contextlib.contextmanager
    def shared(self, ready: Callable[[], bool]) -> Iterator[bool]:
        """Hold it shared from a moment on when `ready`, asked while it is held, is true; yields False if none came."""
        lock = FileLock(self._path)
        end = time.monotonic() + self._patience
        try:
            while not (lock.acquire(shared=True, write=os.access(self._path.parent, os.W_OK)) and ready()):
                lock.release()
                if time.monotonic() > end:
                    break
                time.sleep(POLL_S)
            yield lock.held
        finally:
            lock.release()
