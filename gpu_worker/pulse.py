"""How vLLM is doing right now, for the pacing governor: requests running and waiting, inter-token latency.

Two sources with one face, `latest() -> Reading | None`:

- `StatePulse`: the shared file that our stat logger in vLLM writes every engine step (`hogwild.pulse_state`). A
  reading costs microseconds and is at most one engine step old.
- `MetricsPulse`: a thread that fetches vLLM's `/metrics` at most four times a second. It works with any vLLM, but a
  scrape costs vLLM a few milliseconds of the event loop that streams tokens, and readings are up to a period plus a
  scrape old. Its buckets are too wide for a median, so the governor holds the mean only.

`Pulse` prefers the first and falls back to the second, and says so when neither can be read.
"""

import logging
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from hogwild.pulse_state import FILE_NAME, PulseCounters, PulseReader

logger = logging.getLogger(__name__)

MIN_PERIOD_S = 0.25
STALE_S = 5.0  # a scrape older than this says nothing about now: several periods and one timeout

# `{model_name="…",engine="0"} 3.0`; several engines are several lines, summed. vLLM renamed the inter-token histogram
# from time_per_output_token to inter_token_latency; where both are there they count the same tokens, so one is read.
_GAUGES = re.compile(r"^vllm:num_requests_(running|waiting)(?:\{[^}]*\})? ([0-9.eE+-]+)$", re.MULTILINE)
_ITL = re.compile(r"^vllm:(inter_token_latency|time_per_output_token)_seconds_(sum|count)(?:\{[^}]*\})? ([0-9.eE+-]+)$",
                  re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One look at vLLM. `at` and `updated` are time.monotonic(); `updated` is when vLLM last made a step, if known."""

    at: float
    tokens: int  # inter-token latencies counted since vLLM started
    itl_sum_s: float  # and their sum
    running: int
    waiting: int
    mixed_tokens: int = 0  # of `tokens`, those of steps that also read prompts, where that is known
    mixed_sum_s: float = 0.0
    histogram: tuple[int, ...] = ()  # of the others, in the buckets of hogwild.pulse_state; () when unknown
    updated: float | None = None
    source: str = "state"

    @property
    def decoded(self) -> int:
        """Inter-token latencies of steps that only decoded."""
        return self.tokens - self.mixed_tokens

    @property
    def decoded_sum_s(self) -> float:
        """Their sum."""
        return self.itl_sum_s - self.mixed_sum_s

    @property
    def busy(self) -> bool:
        """Whether vLLM has requests."""
        return self.running > 0 or self.waiting > 0


class PulseSource(Protocol):
    """Where readings come from."""

    def latest(self) -> Reading | None:
        """The newest reading; None when vLLM can't be seen. Never blocks."""
        ...  # pragma: no cover

    def close(self) -> None:
        """Stop reading."""
        ...  # pragma: no cover


def parse_metrics(text: str, at: float) -> Reading:
    """Read vLLM's Prometheus text. Raises ValueError when it has none of vLLM's gauges (some other server, say)."""
    gauges: dict[str, float] = {}
    for name, value in _GAUGES.findall(text):
        gauges[name] = gauges.get(name, 0.0) + float(value)
    if "running" not in gauges:
        raise ValueError("no vllm:num_requests_running in the metrics: is this a vLLM, and are its statistics on?")
    itl: dict[tuple[str, str], float] = {}
    for name, part, value in _ITL.findall(text):
        itl[name, part] = itl.get((name, part), 0.0) + float(value)
    name = "inter_token_latency" if ("inter_token_latency", "count") in itl else "time_per_output_token"
    return Reading(at=at, tokens=int(itl.get((name, "count"), 0)), itl_sum_s=itl.get((name, "sum"), 0.0),
                   running=int(gauges["running"]), waiting=int(gauges.get("waiting", 0)), source="metrics")


class StatePulse:
    """Reads `<runtime_dir>/pulse.state`. A file that is not there yet is looked for twice a second."""

    RETRY_S = 0.5

    def __init__(self, runtime_dir: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = runtime_dir / FILE_NAME
        self._clock = clock
        self._reader: PulseReader | None = None
        self._next_try = 0.0
        self._complained = False

    def latest(self) -> Reading | None:
        """The present counters; None without a living writer."""
        now = self._clock()
        if self._reader is None:
            if now < self._next_try:
                return None
            self._next_try = now + self.RETRY_S
            try:
                self._reader = PulseReader(self._path)
            except FileNotFoundError:
                return None
            except (OSError, ValueError) as error:
                if not self._complained:
                    self._complained = True
                    logger.warning("vLLM's pulse can't be read: %s", error)
                return None
        counters = self._reader.read()
        if counters is None:  # vLLM is gone; the next one may write to a new file
            self.close()
            self._next_try = now + self.RETRY_S
            return None
        return _reading(counters, now)

    def close(self) -> None:
        """Unmap the file."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None


def _reading(counters: PulseCounters, now: float) -> Reading:
    return Reading(at=now, tokens=counters.tokens, itl_sum_s=counters.itl_sum_s, running=counters.running,
                   waiting=counters.waiting, mixed_tokens=counters.mixed_tokens,
                   mixed_sum_s=counters.mixed_sum_s, histogram=counters.histogram, updated=counters.updated,
                   source="state")


class MetricsPulse:
    """Polls `fetch()` (which returns the text of `/metrics` and has its own short timeout) off the training thread."""

    def __init__(self, fetch: Callable[[], str], *, period_s: float = MIN_PERIOD_S,
                 clock: Callable[[], float] = time.monotonic) -> None:
        if period_s < MIN_PERIOD_S:
            raise ValueError(f"period_s is {period_s}: scraping more often than every {MIN_PERIOD_S} s slows vLLM down")
        self._fetch = fetch
        self._period = period_s
        self._clock = clock
        self._latest: Reading | None = None
        self._complained = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hogwild-metrics-pulse", daemon=True)
        self._thread.start()

    def latest(self) -> Reading | None:
        """The last scrape, if it is fresh enough to mean anything."""
        reading = self._latest
        return reading if reading is not None and self._clock() - reading.at <= STALE_S else None

    def close(self) -> None:
        """Stop polling; a scrape in flight ends by its own timeout."""
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.is_set():
            started = self._clock()
            try:
                self._latest = parse_metrics(self._fetch(), started)
                self._complained = False
            except Exception as error:  # whatever the HTTP client raises: an unread pulse must never stop training
                if not self._complained:
                    self._complained = True
                    logger.warning("vLLM's metrics can't be read: %s", error)
            self._stop.wait(self._period)


class Pulse:
    """The shared file when vLLM writes it, else `/metrics`; `fetch` starts being called only when it is needed."""

    def __init__(self, runtime_dir: Path, fetch: Callable[[], str] | None = None,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self._state = StatePulse(runtime_dir, clock)
        self._fetch = fetch
        self._clock = clock
        self._metrics: MetricsPulse | None = None

    def latest(self) -> Reading | None:
        """The best reading there is, or None."""
        reading = self._state.latest()
        if reading is not None:
            if self._metrics is not None:
                self._metrics.close()
                self._metrics = None
            return reading
        if self._fetch is None:
            return None
        if self._metrics is None:
            self._metrics = MetricsPulse(self._fetch, clock=self._clock)
        return self._metrics.latest()

    def close(self) -> None:
        """Stop both."""
        self._state.close()
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
