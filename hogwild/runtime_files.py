"""Files and processes in the runtime directory: private, written atomically, and gone with who wrote them.

Needs neither torch nor vLLM.
"""

import contextlib
import multiprocessing
import multiprocessing.util
import os
from collections.abc import Callable
from pathlib import Path

import psutil

from hogwild.errors import ManifestError

# The largest file read whole: 1,000 layers of 512 experts have under 2 million tensors of about 300 bytes each.
MAX_BYTES = 1 << 30
TICKS_PER_S = os.sysconf("SC_CLK_TCK")  # of the start times in /proc
# A start time from here on counts from 1970, as where there is no /proc and in older files; below, from the machine's
# start, which no running machine had 31 years ago.
SINCE_1970 = 1e9


def remove_at_exit(path: Path) -> None:
    """Delete a file of ours when this process ends in good order; what a killed one leaves is swept by who finds it."""
    owner, inode = os.getpid(), path.stat().st_ino

    def remove() -> None:
        with contextlib.suppress(OSError):
            if os.getpid() == owner and path.stat().st_ino == inode:
                path.unlink()

    at_exit(remove)


def at_exit(function: Callable[[], object]) -> None:
    """Call it when this process ends in good order, be it a main process or one that multiprocessing started."""
    multiprocessing.util.Finalize(None, function, exitpriority=0)


def boot_id() -> str:
    """Identity of this boot of this machine."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"boot-{psutil.boot_time():.0f}"


def process_start_time(pid: int) -> float:
    """When a process started: seconds since the machine's start, or since 1970 where there is no /proc.

    The first does not move when somebody sets the clock.

    Raises:
        psutil.Error: there is no such process.
    """
    stat = _proc_stat(pid)
    return float(psutil.Process(pid).create_time()) if stat is None else stat[1] / TICKS_PER_S


def process_alive(pid: int, start_time: float) -> bool:
    """True when that very process runs: same pid and same start, and not a zombie."""
    stat = _proc_stat(pid)
    if stat is not None and start_time < SINCE_1970:
        return stat[0] not in "ZX" and abs(start_time * TICKS_PER_S - stat[1]) < 0.5
    try:
        process = psutil.Process(pid)
        # Two readers of /proc derive the start from the same tick count; a clock adjustment may shift it by a little.
        return abs(process.create_time() - start_time) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, OverflowError, ValueError):
        return False


def of_this_program(pid: int) -> bool:
    """Whether a process was started by this one, or by the one that multiprocessing started this one from."""
    parent = multiprocessing.parent_process()
    first = os.getpid() if parent is None else parent.pid
    try:
        return first in (pid, *(process.pid for process in psutil.Process(pid).parents()))
    except psutil.Error:
        return False


def _proc_stat(pid: int) -> tuple[str, int] | None:
    """State and start (ticks since the machine's start) of a process; None without /proc or without the process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (OSError, ValueError):
        return None
    fields = text.rpartition(")")[2].split()  # proc_pid_stat(5): from field 3, after a name that may hold anything
    return fields[0], int(fields[19])


def private_dir(path: Path) -> Path:
    """Make sure that `path` is a directory of ours that nobody else can enter.

    Raises:
        ManifestError: it belongs to another user.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    stat = path.stat()
    if stat.st_uid != os.getuid():
        raise ManifestError(
            f"the runtime directory {path} belongs to user {stat.st_uid}: set HOGWILD_RUNTIME_DIR to one of your own"
        )
    if stat.st_mode & 0o077:
        path.chmod(0o700)
    return path


def write_private(path: Path, text: str) -> None:
    """Write a file of mode 0600 atomically: readers see the old one or the whole new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    temporary.replace(path)


def read_private(path: Path, *, check_owner: bool = True) -> bytes:
    """Contents of a file that must be ours and closed to others.

    Raises:
        ManifestError: missing, too large, a link, of another user, or open to others.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise ManifestError(f"there is no {path}: is vLLM running with the hogwild plugin?") from error
    except OSError as error:
        raise ManifestError(f"can't open {path}: {error.strerror}") from error
    with os.fdopen(descriptor, "rb") as file:
        stat = os.fstat(file.fileno())
        if check_owner and stat.st_uid != os.getuid():
            raise ManifestError(
                f"{path} belongs to user {stat.st_uid}, not to user {os.getuid()}: the worker must run as "
                f"the same user as vLLM"
            )
        if check_owner and stat.st_mode & 0o077:
            raise ManifestError(
                f"{path} has mode {stat.st_mode & 0o777:04o}: others could have written it; 0600 wanted"
            )
        if stat.st_size > MAX_BYTES:
            raise ManifestError(f"{path} is {stat.st_size} bytes: more than {MAX_BYTES}")
        try:
            return file.read()
        except OSError as error:
            raise ManifestError(f"can't read {path}: {error.strerror}") from error
