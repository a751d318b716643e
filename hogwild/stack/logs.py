"""Follow the services' log files and print each line behind its service's name.

The files are the truth (they survive, they rotate); the terminal shows a copy.
"""

import threading
from collections.abc import Callable, Iterable
from pathlib import Path

POLL_S = 0.2


def tail(path: Path, lines: int) -> list[str]:
    """The last `lines` lines of a log; empty when there is none."""
    try:
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - lines * 400))
            return file.read().decode(errors="replace").splitlines()[-lines:]
    except OSError:
        return []


class LogFollower(threading.Thread):
    """Prints what is appended to each file, from its present end on; follows rotation."""

    def __init__(self, files: Iterable[tuple[str, Path]], emit: Callable[[str, str], None]) -> None:
        super().__init__(name="hogwild-logs", daemon=True)
        self._emit = emit
        self._done = threading.Event()
        self._files = [_Followed(name, path) for name, path in files]

    def run(self) -> None:
        """Until `stop`: a last look after it, so that the services' last words are shown."""
        while not self._done.wait(POLL_S):
            self._pump()
        self._pump()

    def _pump(self) -> None:
        for followed in self._files:
            for line in followed.new_lines():
                self._emit(followed.name, line)

    def stop(self) -> None:
        """Print what is left and end."""
        self._done.set()
        self.join()


class _Followed:
    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self._path = path
        self._rest = b""
        self._position, self._inode = 0, 0
        if path.exists():
            stat = path.stat()
            self._position, self._inode = stat.st_size, stat.st_ino

    def new_lines(self) -> list[str]:
        try:
            with self._path.open("rb") as file:
                stat = self._path.stat()
                if stat.st_ino != self._inode or stat.st_size < self._position:
                    self._position, self._inode = 0, stat.st_ino
                file.seek(self._position)
                data = file.read()
        except OSError:
            return []
        self._position += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [line.decode(errors="replace").rstrip("\r") for line in lines]
