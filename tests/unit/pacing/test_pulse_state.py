"""The shared pulse file: what one process writes, another reads; dead writers, foreign files, many writers."""

import errno
import fcntl
import stat
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hogwild.pulse_state import (
    BUCKETS,
    FILE_BYTES,
    SLOTS,
    PulseReader,
    PulseWriter,
    bucket_bounds,
    bucket_of,
    quantile,
)


def test_another_process_reads_what_was_recorded(tmp_path):
    path = tmp_path / "pulse.state"
    writer = PulseWriter(path)
    writer.record([0.010, 0.030], running=2, waiting=1)
    before = time.monotonic()
    writer.record([0.020])

    code = ("import sys; from pathlib import Path; from hogwild.pulse_state import PulseReader; "
            "c = PulseReader(Path(sys.argv[1])).read(); print(c.tokens, round(c.itl_sum_s, 6), c.running, c.waiting)")
    out = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)

    assert out.stdout.split() == ["3", "0.06", "2", "1"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    counters = PulseReader(path).read()
    assert counters is not None and before <= counters.updated <= time.monotonic()


def test_writers_of_one_host_are_added_up(tmp_path):
    path = tmp_path / "pulse.state"
    first, second = PulseWriter(path, engine_index=0), PulseWriter(path, engine_index=1)
    first.record([0.01], running=3, waiting=0)
    second.record([0.01, 0.01], running=1, waiting=2)

    counters = PulseReader(path).read()

    assert counters is not None
    assert (counters.tokens, counters.running, counters.waiting) == (3, 4, 2)
    assert sum(counters.histogram) == 3


def test_writer_killed(tmp_path):
    """Given a writer that died with a request running, when the file is read, then there is no pulse; and the next vLLM
    takes the slot over."""
    path = tmp_path / "pulse.state"
    code = ("import sys; from pathlib import Path; from hogwild.pulse_state import PulseWriter; "
            "PulseWriter(Path(sys.argv[1])).record([0.01], running=1, waiting=0); print(flush=True); sys.stdin.read()")
    command, pipe = [sys.executable, "-c", code, str(path)], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as child:
        assert child.stdout is not None and child.stdout.readline()
        reader = PulseReader(path)
        assert reader.read() is not None
        child.kill()
    reader._looked_up = float("-inf")

    assert reader.read() is None
    PulseWriter(path).record([0.01], running=0, waiting=0)
    reader._looked_up = float("-inf")
    counters = reader.read()
    assert counters is not None and counters.running == 0 and counters.tokens == 1


def test_a_new_engine_of_the_same_process_starts_from_zero(tmp_path):
    path = tmp_path / "pulse.state"
    PulseWriter(path).record([0.01] * 5, running=5, waiting=0)
    PulseWriter(path).record([0.01], running=1, waiting=0)

    counters = PulseReader(path).read()
    assert counters is not None and (counters.tokens, counters.running) == (1, 1)


def test_a_closed_writer_leaves_the_sum(tmp_path):
    path = tmp_path / "pulse.state"
    writer = PulseWriter(path)
    writer.record([0.01], running=1, waiting=0)
    writer.close()

    assert PulseReader(path).read() is None


def test_more_writers_than_slots(tmp_path):
    path = tmp_path / "pulse.state"
    for index in range(SLOTS):
        PulseWriter(path, index)

    with pytest.raises(OSError, match=f"{SLOTS} vLLM processes"):
        PulseWriter(path, SLOTS)


def test_a_full_disk_is_an_error_and_no_bus_error_later(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        PulseWriter(tmp_path / "pulse.state")


def test_a_file_of_an_older_format_is_started_anew_by_the_writer(tmp_path):
    path = tmp_path / "pulse.state"
    path.write_bytes(b"\xff" * FILE_BYTES)
    with pytest.raises(ValueError, match="not a pulse file"):
        PulseReader(path)

    PulseWriter(path).record([0.01], running=1, waiting=0)

    counters = PulseReader(path).read()
    assert counters is not None and counters.tokens == 1


@pytest.mark.parametrize("content", [b"", b"short", b"\0" * FILE_BYTES])
def test_reader_refuses_what_is_no_pulse_file(tmp_path, content):
    path = tmp_path / "pulse.state"
    path.write_bytes(content)

    with pytest.raises(ValueError, match="not a pulse file"):
        PulseReader(path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        PulseReader(tmp_path / "pulse.state")


@given(st.floats(0, 1000))
def test_buckets_cover_every_latency(latency):
    bucket = bucket_of(latency)
    low, high = bucket_bounds(bucket)

    assert 0 <= bucket < BUCKETS
    assert bucket == 0 or low <= latency * (1 + 1e-9)
    assert bucket == BUCKETS - 1 or latency <= high * (1 + 1e-9)


@given(st.lists(st.floats(0.001, 1.0), min_size=20, max_size=200))
def test_median_of_the_histogram_is_the_median(latencies):
    histogram = [0] * BUCKETS
    for latency in latencies:
        histogram[bucket_of(latency)] += 1
    ordered = sorted(latencies)

    median = quantile(histogram, 0.5)

    assert 0.95 * ordered[(len(ordered) - 1) // 2] <= median <= 1.05 * ordered[len(ordered) // 2]
    assert quantile([0] * BUCKETS, 0.5) == 0.0


def test_a_pid_that_was_given_out_again_is_not_the_writer(tmp_path):
    path = tmp_path / "pulse.state"
    writer = PulseWriter(path)
    writer.record([0.01], running=1, waiting=0)
    writer._slot[1] -= 10_000  # this pid's process started ten seconds earlier then

    assert PulseReader(path).read() is None


def test_a_process_that_hangs_with_the_lock_does_not_hang_vllm(tmp_path):
    path = tmp_path / "pulse.state"
    with path.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(OSError, match="locked by another process"):
            PulseWriter(path)


def test_reading_and_writing_cost_microseconds(tmp_path):
    """The writer runs on vLLM's event loop, the reader inside a training step. The limits are loose."""
    writer, latencies = PulseWriter(tmp_path / "pulse.state"), [0.01] * 16
    reader = PulseReader(tmp_path / "pulse.state")

    def fastest(action) -> float:
        times = []
        for _ in range(200):
            start = time.perf_counter()
            action()
            times.append(time.perf_counter() - start)
        return min(times)

    assert fastest(lambda: writer.record(latencies, 16, 0)) < 200e-6
    assert fastest(reader.read) < 200e-6
