"""vLLM's pulse in shared memory: how fast tokens come out, readable by the worker in a few microseconds.

Why not only `/metrics`: a scrape makes vLLM render every metric it has on the event loop that also streams tokens, so
it can be asked a few times a second at most. This file is written by the stat logger (`hogwild.vllm_plugin.stats`) once
per engine step and read by the pacing governor whenever it likes, at no cost to vLLM.

`pulse.state`, in the runtime directory, mode 0600, native byte order, every field an aligned u64:

    header   0  magic  "HOGPULSE"      8  format version (2)      16  slots      24  bytes per slot       … 64
    slot     0  pid                    1  start time of that process, ms since the epoch
             2  engine index           3  time of the last update, CLOCK_MONOTONIC, ns (0: never)
             4  inter-token latencies counted    5  their sum, ns     6  requests running      7  requests waiting
             8  of 4, those of steps that also read prompts, or precede one    9  their sum, ns
             10… histogram of the others: bucket i holds [FLOOR · 2^(i/16), FLOOR · 2^((i+1)/16)), ends open

A step that reads prompts takes several times as long as one that only decodes, whatever training does. Some windows
have such steps and some have none: kept apart, the others can be compared with each other.

One slot per API-server process and engine, because vLLM can run several of both. A slot belongs to the process named
in it until that process is gone. There is one writer per slot and all counters only grow, so no lock is taken: a reader
that comes in the middle of an update sees counters one engine step apart, which the next reading makes good.
"""

import fcntl
import math
import mmap
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hogwild.runtime_files import process_alive, process_start_time

FILE_NAME = "pulse.state"
MAGIC = int.from_bytes(b"HOGPULSE", "little")
FORMAT_VERSION = 2
HEADER_BYTES = 64
SLOTS = 16  # API-server processes times engines on one host; more than that share nothing and fall back to /metrics
SLOT_WORDS = 256
SLOT_BYTES = SLOT_WORDS * 8
FILE_BYTES = HEADER_BYTES + SLOTS * SLOT_BYTES

_PID, _START, _ENGINE, _UPDATED, _TOKENS, _ITL_SUM, _RUNNING, _WAITING, _MIXED, _MIXED_SUM, _BUCKETS = range(11)
BUCKETS = SLOT_WORDS - _BUCKETS
FLOOR_S = 0.25e-3  # faster than any decode step; 246 buckets of 2^(1/16) reach 10 s
BUCKETS_PER_OCTAVE = 16


def bucket_of(latency_s: float) -> int:
    """Histogram bucket of an inter-token latency in seconds; below and above the range: the first and the last."""
    if latency_s <= FLOOR_S:
        return 0
    return min(BUCKETS - 1, int(BUCKETS_PER_OCTAVE * math.log2(latency_s / FLOOR_S)))


def bucket_bounds(bucket: int) -> tuple[float, float]:
    """Lower and upper edge of a bucket, in seconds."""
    return FLOOR_S * 2 ** (bucket / BUCKETS_PER_OCTAVE), FLOOR_S * 2 ** ((bucket + 1) / BUCKETS_PER_OCTAVE)


def quantile(histogram: Sequence[int], q: float) -> float:
    """Latency (s) below which a share `q` of a histogram lies, interpolated; right to about 2 %. 0.0 when empty."""
    rest = q * sum(histogram)
    for bucket, count in enumerate(histogram):
        if count and rest <= count:
            low, high = bucket_bounds(bucket)
            return low + (high - low) * rest / count
        rest -= count
    return 0.0


@dataclass(frozen=True, kw_only=True)
class PulseCounters:
    """The sum over all live slots. `updated` is time.monotonic() of the newest update; 0.0: nothing was recorded."""

    tokens: int
    itl_sum_s: float
    running: int
    waiting: int
    mixed_tokens: int  # of `tokens`, those of steps that also read prompts
    mixed_sum_s: float
    updated: float
    histogram: tuple[int, ...]  # of the others


class PulseWriter:
    """The side in vLLM. Not thread-safe: one per stat logger, which vLLM calls from one event loop."""

    def __init__(self, path: Path, engine_index: int = 0) -> None:
        """Claim a slot in `path`, made when missing. Raises OSError when the disk is full or every slot is in use."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            _lock(fd, path)
            # Its blocks, not its size alone: writing into a hole of a full disk would be SIGBUS in vLLM's API server.
            os.posix_fallocate(fd, 0, FILE_BYTES)
            self._map = mmap.mmap(fd, FILE_BYTES)
            words = memoryview(self._map).cast("Q")
            header = (MAGIC, FORMAT_VERSION, SLOTS, SLOT_BYTES)
            if tuple(words[0:4]) != header:  # new, or of another version: whoever wrote that is not this vLLM
                for i in range(len(words)):
                    words[i] = 0
                for i, value in enumerate(header):
                    words[i] = value
            self._slot = _claim(words, engine_index, path)
            words.release()
        finally:
            fcntl.flock(fd, fcntl.LOCK_UN)  # mmap keeps a duplicate of the descriptor: closing alone would not unlock
            os.close(fd)

    def record(self, latencies_s: Iterable[float], running: int | None = None, waiting: int | None = None, *,
               prompts: bool = False) -> None:  # fmt: skip
        """Count one engine step: its inter-token latencies in seconds, the queue if the step reported it, and whether
        the step read prompts as well."""
        slot = self._slot
        count = total_ns = 0
        for latency in latencies_s:
            count += 1
            total_ns += max(0, int(latency * 1e9))
            if not prompts:
                slot[_BUCKETS + bucket_of(latency)] += 1
        if count and prompts:
            slot[_MIXED_SUM] += total_ns
            slot[_MIXED] += count
        if count:
            slot[_ITL_SUM] += total_ns
            slot[_TOKENS] += count
        if running is not None:
            slot[_RUNNING] = running
        if waiting is not None:
            slot[_WAITING] = waiting
        slot[_UPDATED] = time.monotonic_ns()

    def close(self) -> None:
        """Give the slot back; its counts disappear from the readers' sums."""
        if self._slot.nbytes:
            for i in range(SLOT_WORDS):
                self._slot[i] = 0
        self._slot.release()
        self._map.close()


def _lock(fd: int, path: Path) -> None:
    """Lock for the moment that claiming a slot takes. vLLM starts up here: a holder that hangs must not hang it too."""
    for _ in range(200):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.01)
        else:
            return
    raise OSError(f"{path} has been locked by another process for two seconds")


def _claim(words: memoryview, engine_index: int, path: Path) -> memoryview:
    for slot in range(SLOTS):
        first = HEADER_BYTES // 8 + slot * SLOT_WORDS
        view = words[first : first + SLOT_WORDS]
        pid, start = view[_PID], view[_START]
        mine = pid == os.getpid() and view[_ENGINE] == engine_index  # a new engine of this process: the old one is gone
        if pid and not mine and process_alive(pid, start / 1e3):
            continue
        for i in range(SLOT_WORDS):
            view[i] = 0
        view[_START] = round(process_start_time(os.getpid()) * 1e3)
        view[_ENGINE] = engine_index
        view[_PID] = os.getpid()
        return view
    raise OSError(f"{path} has no free slot: {SLOTS} vLLM processes are writing to it already")


class PulseReader:
    """The side in the worker: a read-only mapping."""

    LIVENESS_PERIOD_S = 0.5  # how often a slot's process is looked up: a system call, unlike everything else here

    def __init__(self, path: Path) -> None:
        """Map `path`. Raises FileNotFoundError when vLLM has not made it, ValueError when it is not such a file."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(fd).st_size
            if size < FILE_BYTES:
                raise ValueError(f"{path} is not a pulse file: {size} bytes instead of {FILE_BYTES}")
            self._map = mmap.mmap(fd, FILE_BYTES, prot=mmap.PROT_READ)
        finally:
            os.close(fd)
        self._words = memoryview(self._map).cast("Q")
        header = tuple(self._words[0:4])
        if header != (MAGIC, FORMAT_VERSION, SLOTS, SLOT_BYTES):
            self.close()
            raise ValueError(f"{path} is not a pulse file of format {FORMAT_VERSION}: header {header}")
        self._live: list[int] = []  # first word of each live slot
        self._looked_up = -math.inf

    def read(self) -> PulseCounters | None:
        """The present counters, or None when no living process writes to this file."""
        now = time.monotonic()
        if now - self._looked_up > self.LIVENESS_PERIOD_S:
            self._looked_up = now
            words = self._words
            self._live = [first for first in range(HEADER_BYTES // 8, FILE_BYTES // 8, SLOT_WORDS)
                          if words[first] and process_alive(words[first], words[first + _START] / 1e3)]
        if not self._live:
            return None
        slots = [self._words[first : first + SLOT_WORDS].tolist() for first in self._live]
        total = slots[0] if len(slots) == 1 else [sum(column) for column in zip(*slots, strict=True)]
        return PulseCounters(
            tokens=total[_TOKENS], itl_sum_s=total[_ITL_SUM] / 1e9, running=total[_RUNNING], waiting=total[_WAITING],
            mixed_tokens=total[_MIXED], mixed_sum_s=total[_MIXED_SUM] / 1e9,
            updated=max(slot[_UPDATED] for slot in slots) / 1e9, histogram=tuple(total[_BUCKETS:]))

    def close(self) -> None:
        """Unmap the file."""
        self._words.release()
        self._map.close()
