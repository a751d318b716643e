"""Every durable write of the checkpoint room goes through here.

`FileIo` is the whole vocabulary: create, write at an offset, fsync, link, rename, unlink, mkdir, fsync of a directory,
reflink. The crash test puts a recorder in its place, replays every prefix of what was recorded as a disk that lost
power might have kept it, and opens the checkpoint again.
"""

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from hogwild.checkpoint.fingerprints import Bytes
from hogwild.checkpoint.together import READ, WRITE, Pieces, together
from hogwild.errors import CheckpointError

FICLONE = 0x40049409
"""ioctl request of linux/fs.h: make this file share the other's extents (btrfs, XFS, bcachefs, some overlays)."""

RWF_DONTCACHE = 0x80
"""Flag of preadv2 and pwritev2 (linux/fs.h, since Linux 6.14): begin to write at once, drop the pages afterwards."""

STREAM = 256 << 10
"""Bytes of a write from which it pays to go round the page cache."""

# EAGAIN: OpenZFS, while blocks of the source are still to be written.
_NO_REFLINK = {
    errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.ETXTBSY, errno.EAGAIN,
}  # fmt: skip


class Handle:
    """An open file. Writes are at absolute offsets; nothing is durable before `fsync`."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self.fd = fd
        self.once = False  # what is read is read only once: it need not stay in the page cache

    def pwrite(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        """Write all of `data` at `offset`."""
        self._write(memoryview(data).cast("B"), offset, 0)

    def stream(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        """`pwrite` of much that nobody reads soon: it goes to the disk at once and does not stay in memory.

        So writing overlaps with what the caller does next, `fsync` has little left to wait for, and a model that is
        saved does not push everything else out of the page cache.
        """
        view = memoryview(data).cast("B")
        if len(view) < STREAM:
            self.pwrite(view, offset)
            return
        try:
            self._write(view, offset, RWF_DONTCACHE)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            self._write(view, offset, 0)
            os.posix_fadvise(self.fd, offset, len(view), os.POSIX_FADV_DONTNEED)  # begins to write the range out

    def _write(self, view: memoryview, offset: int, flags: int) -> None:
        while view:
            written = os.pwritev(self.fd, [view], offset, flags)
            view = view[written:]
            offset += written

    def pread(self, length: int, offset: int) -> bytes:
        """Up to `length` bytes from `offset`; fewer only at the end of the file."""
        parts = []
        while length > 0:
            part = os.pread(self.fd, length, offset)
            if not part:
                break
            parts.append(part)
            length -= len(part)
            offset += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def pread_into(self, buffer: memoryview, offset: int) -> int:
        """Fill `buffer` from `offset`; the number of bytes read, fewer only at the end of the file."""
        done = 0
        while done < len(buffer):
            flags = RWF_DONTCACHE if self.once else 0
            try:
                count = os.preadv(self.fd, [buffer[done:]], offset + done, flags)
            except OSError as error:
                if not flags or error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
                self.once = False  # for other threads that read here as well
                continue
            if not count:
                break
            done += count
        return done

    def pwrite_pieces(self, data: Bytes, pieces: Pieces) -> None:
        """`pwrite` of each piece of `data`, in any order. Whoever overrides `pwrite` sees each by itself."""
        if type(self).pwrite is Handle.pwrite:
            pieces = together(self.fd, WRITE, data, pieces)
        for start, size, offset in pieces:
            self.pwrite(data[start : start + size].data, offset)

    def pread_pieces(self, out: Bytes, pieces: Pieces) -> bool:
        """`pread_into` of each piece of `out`; whether the file was long enough for all. See `pwrite_pieces`."""
        if type(self).pread_into is Handle.pread_into:
            flags = RWF_DONTCACHE if self.once else 0
            # First without waiting: what is not in memory is asked of the disk, which can then fetch it side by side.
            pieces = together(self.fd, READ, out, pieces, flags | os.RWF_NOWAIT)
            pieces = together(self.fd, READ, out, pieces, flags)
        return all(self.pread_into(out[start : start + size].data, offset) == size for start, size, offset in pieces)

    def size(self) -> int:
        """Length of the file in bytes."""
        return os.fstat(self.fd).st_size

    def fsync(self) -> None:
        """Return when the contents are on the medium."""
        os.fsync(self.fd)

    def close(self) -> None:
        """Close; does not make anything durable."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class FileIo:
    """The operations on files that must survive a power cut."""

    def create(self, path: Path, mode: int = 0o644) -> Handle:
        """A new empty file open for reading and writing; an old one of that name is emptied."""
        return Handle(path, os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode))

    def open(self, path: Path, *, write: bool = False) -> Handle:
        """An existing file."""
        return Handle(path, os.open(path, (os.O_RDWR if write else os.O_RDONLY) | os.O_CLOEXEC))

    def link(self, source: Path, target: Path) -> None:
        """Give the file `source` a second name. Raises OSError where the file system has no hard links."""
        target.hardlink_to(source)

    def rename(self, source: Path, target: Path) -> None:
        """Put `source` in the place of `target`, atomically."""
        source.replace(target)

    def unlink(self, path: Path) -> None:
        """Remove the name; it is no error when it is gone already."""
        path.unlink(missing_ok=True)

    def mkdir(self, path: Path) -> None:
        """Make a folder; it is no error when it is there."""
        path.mkdir(exist_ok=True)

    def fsync_dir(self, path: Path) -> None:
        """Return when the names in `path` are on the medium."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def reflink(self, source: Handle, target: Handle) -> bool:
        """Make `target` share the extents of `source`; False where the file system can't."""
        try:
            fcntl.ioctl(target.fd, FICLONE, source.fd)
        except OSError as error:
            if error.errno in _NO_REFLINK:
                return False
            raise
        return True

    def copy_range(self, source: Handle, target: Handle, offset: int, length: int) -> None:
        """Copy bytes [offset, offset + length) to the same place in `target`, inside the kernel where it can."""
        while length > 0:
            try:
                done = os.copy_file_range(source.fd, target.fd, length, offset, offset)
            except OSError as error:
                if error.errno not in _NO_REFLINK:
                    raise
                done = 0
            if not done:
                data = source.pread(min(length, 1 << 20), offset)
                if not data:
                    raise CheckpointError(f"{source.path} ended early while it was copied.")
                target.pwrite(data, offset)
                done = len(data)
            offset += done
            length -= done

    def write_atomic(self, path: Path, parts: list[bytes | memoryview], mode: int = 0o644) -> None:
        """`path` holds either its old contents or all of `parts`, whatever happens: temp, fsync, rename, fsync."""
        temp = path.with_name(path.name + ".tmp")
        try:
            with self.create(temp, mode) as handle:
                offset = 0
                for part in parts:
                    handle.pwrite(part, offset)
                    offset += len(memoryview(part).cast("B"))
                handle.fsync()
            self.rename(temp, path)
        except OSError:
            with contextlib.suppress(OSError):
                self.unlink(temp)
            raise
        self.fsync_dir(path.parent)


OS_IO = FileIo()
"""The real thing."""


@contextlib.contextmanager
def explained(doing: str, directory: Path, *, kept: Callable[[], str]) -> Iterator[None]:
    """Turn an OSError into a CheckpointError that says what to do and, by `kept`, what state the checkpoint is in."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = ""
            with contextlib.suppress(OSError):
                free = f" ({shutil.disk_usage(directory).free >> 20} MiB free)"
            advice = f"the disk is full{free}: free some space, or lower HOGWILD_KEEP_LAST"
        elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            advice = (
                f"{error.filename or directory} can't be written: make it writable for this user, "
                "or point HOGWILD_CHECKPOINT_DIR at another directory"
            )
        else:
            advice = f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
        raise CheckpointError(f"{doing} failed: {advice}. {kept()}", errno=error.errno) from error


class FileLock:
    """An advisory lock on a file (flock): held by an open file description, so a killed process drops it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = -1

    def acquire(self, *, shared: bool = False, write: bool = True) -> bool:
        """Take the lock; False when somebody else holds it."""
        flags = (os.O_RDWR | os.O_CREAT) if write else os.O_RDONLY
        fd = os.open(self.path, flags | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return False
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        return True

    def note(self, text: str) -> None:
        """Leave a word for whoever is refused the lock."""
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, text.encode(), 0)

    def read_note(self) -> str:
        """What the holder left."""
        with contextlib.suppress(OSError):
            return self.path.read_text(errors="replace").strip()[:200]
        return ""

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._fd >= 0

    def release(self) -> None:
        """Give the lock back."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            fcntl.flock(fd, fcntl.LOCK_UN)  # a child that was forked meanwhile has the description too
            os.close(fd)
