"""What the checkpoint's file system can do, found out by trying, once."""

import errno
from functools import cached_property
from pathlib import Path

from hogwild.checkpoint.durable import FileIo

_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}


class FileSystem:
    """Tries with `file`, one of the checkpoint's, and leaves nothing behind in the folder `store`."""

    def __init__(self, io: FileIo, store: Path, file: Path) -> None:
        self._io, self._store, self._file = io, store, file

    @cached_property
    def reflinks(self) -> bool:
        """Whether files can share extents."""
        probe = self._store / "reflink.tmp"
        try:
            with self._io.open(self._file) as old, self._io.create(probe) as new:
                return self._io.reflink(old, new)
        finally:
            self._io.unlink(probe)

    @cached_property
    def links(self) -> bool:
        """Whether a file can have two names."""
        source, probe = self._store / "links.tmp", self._store / "linked.tmp"
        self._io.create(source).close()
        self._io.unlink(probe)
        try:
            self._io.link(source, probe)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return False
        finally:
            self._io.unlink(probe)
            self._io.unlink(source)
        return True
