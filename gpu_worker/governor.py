"""Serving first: decides how long training steps aside so that vLLM keeps the inter-token latency the user asked for.

Training calls `Governor.yield_point()` between micro-steps and, through `hogwild.gpu_worker.yield_points`, before every
layer. There the governor sees to it that training uses a share `duty` of the device: it picks the smallest part of the
multiprocessors that holds `duty`, where they can be divided (`hogwild.gpu_worker.partition`), and sleeps for the rest.
What `duty` should be is decided by `Controller`, which is pure: readings of vLLM's pulse and the time go in, a number
comes out.

THE RULE

Everything learned is kept per load class: requests running, rounded down to a power of two, with hysteresis. "Tokens"
are those of engine steps that only decoded, where the pulse tells them apart: a step that reads prompts takes several
times as long whatever training does, and which window has one is chance. Where every step reads prompts nothing is
learned and the class's first duty, 20 %, stays.

 1. IDLE. No request runs or waits: duty 1, in the moment the pulse says so. Requests that are "running" while the
    engine makes no step for 1 to 3 s are idle too: vLLM goes on reporting a last request whose client hung up.
 2. PROBING. When the latency of a class *alone* is not known, training yields altogether until at least 8 tokens of
    each request came in at least 0.25 s (1 s at most). `alone` is the mean of the last 2n probes. The next comes after
    10 s / n, 2 s at least: that costs training 3 % where n is 1. Probes never take more than a third of the time,
    however the load jumps.
 3. BUDGET. B = the smaller of the budget in ms and alone / serve_share. The set point S lies three quarters of the way
    from `alone` to B. A budget in ms is a promise to whoever waits for tokens, in each second and whatever vLLM does
    between two of them; S is then no more than leaves it for what prompts add to a second's mean (of all its tokens,
    less that of decode-only steps) and for three times what seconds differ by (root of the mean square, 16 seconds).
 4. PACING. A window is at least 0.25 s and 8 tokens of each request (2 s at most). It has a latency (the mean or the
    median, whichever is larger) and the share of the device that training used (share of the time × part of the
    multiprocessors); y and u are their means over the last n windows. y less `alone` is what training costs, and the
    cost is taken as proportional to u:
        duty* = u · (S − alone) / (y − alone)
    Down: at once to duty*. Up: 40 % of the way, at most 1.5 times (or + 0.02) per window, and never while the number of
    waiting requests grows.
    NOISE. A window's latency is what y and u let expect, give or take σ (root of the mean square over 16 windows). n,
    1 to 20, is as many as make y right to a fifth of the way from `alone` to B: n = (1 + (5σ / (B − alone))²) / 2, as
    newer ones count more. Under steady traffic n is 1 and each window decides; requests that come at random make
    windows as far apart as B is from `alone`, and no single one of them says anything about training.
 5. PARTS. Beside traffic training runs on the smallest part of the device that holds the duty, the largest part at
    most; the whole device is for silence.
 6. FLOOR. When vLLM alone does not hold B (S is below `alone`), yielding can't make it so: duty is the floor (5 %), so
    that jobs still end, and the status says that the budget can't be held at this load.
 7. BLIND. No reading for 2 s: duty 50 %, said in the log and the status. Whether vLLM is gone is for the lifecycle to
    decide; the governor never waits for it.

The mean is what throughput, and so serve_share, is made of, and it is linear in duty. The median is watched as well:
where training's slices are shorter than a token's time and touch more than half of the tokens, it is the larger one.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from hogwild.errors import ConfigError
from hogwild.gpu_worker.pulse import PulseSource, Reading
from hogwild.pulse_state import quantile

logger = logging.getLogger(__name__)

PART_SETTLED = 0.7  # a smaller part is taken when this much of it is enough, a larger one when 1/√ of this is asked for

Mode = Literal["off", "idle", "probing", "pacing", "floor", "blind"]


@dataclass(frozen=True, kw_only=True)
class GovernorConfig:
    """What to hold, and the constants of the rule. With neither target the governor is off: training never yields."""

    itl_budget_ms: float | None = None  # mean inter-token latency that vLLM keeps
    serve_share: float | None = None  # share of the serving speed at this load that vLLM keeps, in (0, 1]
    floor: float = 0.05  # least duty: a job must end even under a load that never lets it
    blind_duty: float = 0.5  # without metrics: what half duty cost when it was measured is bearable, full duty was not
    first_duty: float = 0.2  # of a class never seen before: reaches 1 within four windows if nothing suffers
    set_point: float = 0.75  # how far from `alone` to the budget training is let
    second_s: float = 1.0  # what is called a second below: a budget in ms is held in each
    second_margin: float = 3.0  # standard deviations of these below it: prompts come in clusters, so 2.33 give 98 %
    certainty: float = 5.0  # readings are averaged until the means are right to a 5th of the way to the budget
    average_max: float = 20.0  # windows
    noise_windows: int = 16  # that the noise is the mean of
    noise_seconds: int = 16  # the same for seconds
    window_s: float = 0.25
    window_max_s: float = 2.0
    window_steps: int = 8  # tokens of each running request
    probe_max_s: float = 1.0
    probe_every_s: float = 10.0
    blind_after_s: float = 2.0

    def __post_init__(self) -> None:
        """Raise ConfigError naming the setting."""
        if self.itl_budget_ms is not None and not self.itl_budget_ms > 0:
            raise ConfigError(f"HOGWILD_ITL_BUDGET_MS must be above 0 ms, not {self.itl_budget_ms}")
        if self.serve_share is not None and not 0 < self.serve_share <= 1:
            raise ConfigError(f"HOGWILD_SERVE_SHARE must be above 0 and at most 1, not {self.serve_share}")
        if not 0 < self.floor <= 1:
            raise ConfigError(f"the governor's floor must be above 0 and at most 1, not {self.floor}")

    @property
    def enabled(self) -> bool:
        """Whether there is anything to hold."""
        return self.itl_budget_ms is not None or self.serve_share is not None


@dataclass
class LoadClass:
    """What is known about one class of load."""

    duty: float
    alone_s: float | None = None  # inter-token latency without training
    probed_at: float = -math.inf
    retry_at: float = -math.inf  # after a probe in which no token came
    probes: int = 0  # that `alone_s` is the mean of, the older the less
    windows: int = 0  # paced so far; means of them, the older the less:
    itl_s: float = 0.0  # latency
    used: float = 0.0  # share of the device that training used
    variance: float = 0.0  # of a window's latency about what the means let expect
    average: float = 1.0  # number of windows that the means are taken over
    seconds: int = 0  # measured so far, of all tokens; means of them, the older the less:
    second_s: float = 0.0  # latency
    second_decoded_s: float = 0.0  # of the tokens of steps that only decoded
    second_variance: float = 0.0  # of the first


@dataclass(frozen=True)
class _Mark:
    """Where a window began: a reading, and training's active and yielded seconds at that time."""

    reading: Reading
    active_s: float
    yielded_s: float


@dataclass
class Controller:
    """The rule above. `observe` may be called as often as one likes; it acts on new readings only."""

    config: GovernorConfig
    duty: float = 1.0
    mode: Mode = "idle"
    note: str = ""  # one sentence for people, when something stops the budget from being held
    itl_s: float | None = None  # mean of the last window
    budget_s: float | None = None
    classes: dict[int, LoadClass] = field(default_factory=dict)
    load_class: int | None = None
    _last: Reading | None = None
    _seen_at: float | None = None
    _mark: _Mark | None = None
    _second: Reading | None = None  # where the present second began
    _probe_started: float | None = None
    _still_since: float = -math.inf
    _probe_mark: Reading | None = None
    _last_probe: float = -math.inf
    _no_probe_until: float = -math.inf
    _progress_at: float = -math.inf
    _gap_s: float = 0.0
    _silent_until: dict[str, float] = field(default_factory=dict)

    def observe(self, reading: Reading | None, now: float, active_s: float = 0.0, yielded_s: float = 0.0) -> float:
        """Take in the newest reading (None: vLLM can't be seen) and return the duty.

        `active_s` and `yielded_s` count training's seconds since it started; all times are of one monotonic clock.
        """
        if not self.config.enabled:
            self.mode, self.duty = "off", 1.0
        elif reading is None:
            self._unseen(now)
        elif self._last is None or reading.at > self._last.at:
            self._seen(reading, now, active_s, yielded_s)
        if self._probe_started is not None and now - self._probe_started > 2 * self.config.probe_max_s:
            self._end_probe(now)  # readings stopped in the middle of a probe: training must not wait for them
        return self.duty

    def standing_still(self, now: float) -> None:
        """The device has done what training had queued: from now on a probe can see vLLM alone."""
        self._still_since = now

    def forget_window(self) -> None:
        """Training stood still for a reason of its own: what the window holds is not the duty's doing."""
        self._mark = None

    # --- one reading ----------------------------------------------------------------------------------------------

    def _unseen(self, now: float) -> None:
        if self._seen_at is None:
            self._seen_at = now
        if now - self._seen_at < self.config.blind_after_s and self.mode != "blind":
            return
        if self.mode != "blind":
            self._say("vLLM's latency can't be read: training at "
                      f"{self.config.blind_duty:.0%} duty until it can", "blind", now)
        self._drop_probe(now)
        self._mark = self._second = self._last = None
        self.mode, self.duty = "blind", self.config.blind_duty

    def _seen(self, reading: Reading, now: float, active_s: float, yielded_s: float) -> None:
        last, self._last, self._seen_at = self._last, reading, now
        if last is None or last.source != reading.source or reading.tokens < last.tokens:
            # Another vLLM, or another source's counters: not comparable with what came before.
            last = self._mark = self._second = self._probe_mark = None
        self._follow_progress(reading, last)
        if not reading.busy or self._stalled(reading):
            self._drop_probe(now)
            self._mark = self._second = self.load_class = None
            self.mode, self.duty, self.note, self.itl_s = "idle", 1.0, "", None
            return
        load_class = class_of(reading.running, self.load_class)
        if load_class != self.load_class:
            if self._probe_started is not None:
                self._end_probe(now)  # what it measured so far belongs to neither class
            self.load_class, self._mark, self._second = load_class, None, None
        state = self.classes.setdefault(load_class, LoadClass(duty=self.config.first_duty))
        if self._probe_started is None and self._probe_is_due(state, reading.at):
            self._probe_started, self._probe_mark, self._last_probe = now, None, reading.at
            self.mode, self.duty = "probing", 0.0
        if self._probe_started is not None:
            self._probe(state, reading, now)
            return
        self.duty = state.duty
        if self.mode not in ("pacing", "floor"):
            self.mode = "pacing"
        self._end_second(state, reading)
        self._window(state, reading, active_s, yielded_s)

    def _follow_progress(self, reading: Reading, last: Reading | None) -> None:
        """Note when vLLM last made a step, and how far apart its steps are."""
        moved = reading.updated if reading.updated is not None else (
            reading.at if last is None or (last.tokens, last.running, last.waiting) !=
            (reading.tokens, reading.running, reading.waiting) else self._progress_at)
        if last is not None and last.busy and moved > self._progress_at and not self._stalled(last):
            self._gap_s = max(moved - self._progress_at, 0.9 * self._gap_s)
        self._progress_at = max(self._progress_at, moved)

    def _stalled(self, reading: Reading) -> bool:
        return reading.at - self._progress_at > min(3.0, max(1.0, 4 * self._gap_s))

    # --- alone ----------------------------------------------------------------------------------------------------

    def _probe_is_due(self, state: LoadClass, at: float) -> bool:
        if at < self._no_probe_until:
            return False
        if state.alone_s is None:
            return at >= state.retry_at
        every = self.config.probe_every_s / min(5.0, state.average)
        return at - state.probed_at >= every and at - self._last_probe >= every

    def _probe(self, state: LoadClass, reading: Reading, now: float) -> None:
        config, started = self.config, self._probe_started
        if started is None:
            return
        # A token that training delayed is still to come, and the pulse counts it when the next one is there.
        settle_s = min(0.3, max(0.02, 2.5 * (self.itl_s or self._gap_s)))
        if self._probe_mark is None:
            if reading.at - max(started, self._still_since) >= settle_s:
                self._probe_mark = reading
            return
        tokens = reading.decoded - self._probe_mark.decoded
        seconds = reading.at - self._probe_mark.at
        long_enough = seconds >= config.window_s and tokens >= config.window_steps * max(1, reading.running)
        if not long_enough and now - started < config.probe_max_s:
            return
        if tokens > 0:
            mean = (reading.decoded_sum_s - self._probe_mark.decoded_sum_s) / tokens
            state.probes += 1
            known = mean if state.alone_s is None else state.alone_s
            state.alone_s = known + (mean - known) / min(state.probes, 2 * state.average)
            state.probed_at = reading.at
        else:  # a long prompt is being read: nothing to measure yet
            state.retry_at = reading.at + 1.0
        self._end_probe(now)

    def _drop_probe(self, now: float) -> None:
        """Probing is over, whatever came of it; the next one has to wait twice as long as it took."""
        if self._probe_started is not None:  # load that changes all the time must not turn training into probing
            self._no_probe_until = now + 2 * (now - self._probe_started)
        self._probe_started = self._probe_mark = None

    def _end_probe(self, now: float) -> None:
        self._drop_probe(now)
        self._mark = self._second = None
        state = None if self.load_class is None else self.classes.get(self.load_class)
        if state is None:
            self.mode, self.duty = "blind", self.config.blind_duty
            return
        if state.alone_s is None:
            state.retry_at = max(state.retry_at, now + 1.0)
        self.mode, self.duty = "pacing", state.duty

    # --- with training --------------------------------------------------------------------------------------------

    def _end_second(self, state: LoadClass, reading: Reading) -> None:
        """Take a second's latency into the means, of all tokens: what a budget in ms was promised for."""
        if self._second is None:
            self._second = reading
            return
        if reading.at - self._second.at < self.config.second_s:
            return
        second, self._second = self._second, reading
        tokens, decoded = reading.tokens - second.tokens, reading.decoded - second.decoded
        if tokens == 0 or decoded == 0:
            return
        state.seconds += 1
        weight = 1 / min(state.seconds, self.config.noise_seconds)
        off = (reading.itl_sum_s - second.itl_sum_s) / tokens - state.second_s
        state.second_variance = (1 - weight) * (state.second_variance + weight * off**2)
        state.second_s += weight * off
        decoded_s = (reading.decoded_sum_s - second.decoded_sum_s) / decoded
        state.second_decoded_s += weight * (decoded_s - state.second_decoded_s)

    def _window(self, state: LoadClass, reading: Reading, active_s: float, yielded_s: float) -> None:
        config = self.config
        if self._mark is None:
            self._mark = _Mark(reading, active_s, yielded_s)
            return
        tokens = reading.decoded - self._mark.reading.decoded
        seconds = reading.at - self._mark.reading.at
        enough = tokens >= config.window_steps * max(1, reading.running)
        if seconds < config.window_s or (not enough and seconds < config.window_max_s):
            return
        mark, self._mark = self._mark, _Mark(reading, active_s, yielded_s)
        if tokens == 0:
            return
        active, yielded = active_s - mark.active_s, yielded_s - mark.yielded_s
        used = active / (active + yielded) if active + yielded > 0 else state.duty
        itl_s = latency_between(mark.reading, reading)
        self._decide(state, itl_s, used, reading, queue_grows=reading.waiting > mark.reading.waiting)

    def _decide(self, state: LoadClass, itl_s: float, used: float, reading: Reading, *, queue_grows: bool) -> None:
        config = self.config
        self._average(state, itl_s, used)
        self.itl_s = itl_s = state.itl_s
        self.budget_s = budget = self._budget(state)
        if budget is None:
            return  # only a share is asked for and nothing is known to take it of: the class's first duty stays
        alone = state.alone_s if state.alone_s is not None else 0.8 * min(itl_s, budget)
        promised = math.inf if config.itl_budget_ms is None else config.itl_budget_ms / 1e3
        taken = self._taken(state)
        allowed = min(config.set_point * (budget - alone), promised - taken - alone)
        if allowed <= 0:
            state.duty = self.duty = config.floor
            if self.mode != "floor":
                more = ""
                if alone < budget:
                    budget, more = promised, f" and up to {taken * 1e3:.1f} ms more for prompts and by chance"
                self._say(f"{reading.running} running requests take {alone * 1e3:.1f} ms a token without training"
                          f"{more}, above the budget of {budget * 1e3:.1f} ms: training at the floor of "
                          f"{config.floor:.0%}", "floor", reading.at)
            return
        self.mode, self.note = "pacing", ""
        cost = itl_s - alone
        target = min(1.0, state.used * allowed / cost) if cost > 0.01 * alone else 1.0
        duty = state.duty
        if target < duty:
            duty = target
        elif not queue_grows:
            duty = min(duty + 0.4 * (target - duty), max(1.5 * duty, duty + 0.02))
            duty = 1.0 if duty > 0.98 else duty  # the last 2 % are not worth a wait for the device at every layer
        state.duty = self.duty = min(1.0, max(config.floor, duty))

    def _average(self, state: LoadClass, itl_s: float, used: float) -> None:
        """Take a window into the means, and find out over how many they have to be."""
        config, budget = self.config, self._budget(state)
        state.windows += 1
        if state.windows > 1 and state.alone_s is not None and budget is not None and budget > state.alone_s:
            cost = max(0.0, state.itl_s - state.alone_s) * (used / state.used if state.used > 0 else 1.0)
            surprise = itl_s - state.alone_s - cost
            state.variance += (surprise**2 - state.variance) / min(state.windows - 1, config.noise_windows)
            # Of a mean with weights that fall by 1 - 1/n per window the variance is a window's by 2n - 1.
            noise = config.certainty**2 * state.variance / (budget - state.alone_s) ** 2
            state.average = min(config.average_max, max(1.0, (1 + noise) / 2))
        weight = 1 / min(state.windows, state.average)
        state.itl_s += weight * (itl_s - state.itl_s)
        state.used += weight * (used - state.used)

    def _taken(self, state: LoadClass) -> float:
        """What prompts and the differences between seconds take of a budget in ms, in 99 seconds of 100 (s)."""
        if state.seconds < 3:
            return 0.0
        margin = self.config.second_margin * math.sqrt(state.second_variance)
        return max(0.0, state.second_s - state.second_decoded_s + margin)

    def _budget(self, state: LoadClass) -> float | None:
        budgets = []
        if self.config.itl_budget_ms is not None:
            budgets.append(self.config.itl_budget_ms / 1e3)
        if self.config.serve_share is not None and state.alone_s is not None:
            budgets.append(state.alone_s / self.config.serve_share)
        return min(budgets, default=None)

    def _say(self, note: str, mode: Mode, at: float) -> None:
        self.mode, self.note = mode, note
        if at >= self._silent_until.get(mode, -math.inf):  # the status always says it, the log once a minute
            self._silent_until[mode] = at + 60.0
            logger.warning("pace: %s", note)


def latency_between(first: Reading, last: Reading) -> float:
    """Inter-token latency (s) of the tokens between two readings: the mean, or the median where that is larger.

    Of steps that only decoded: there has to be one.
    """
    mean = (last.decoded_sum_s - first.decoded_sum_s) / (last.decoded - first.decoded)
    if not (first.histogram and last.histogram):
        return mean
    return max(mean, quantile([new - old for new, old in zip(last.histogram, first.histogram, strict=True)], 0.5))


def class_of(running: int, current: int | None) -> int:
    """Load class of `running` requests: 0 for none (all wait), then 1 + log2; the current one holds a third beyond."""
    if current and 0.75 * 2 ** (current - 1) <= running < 1.33 * 2**current:
        return current
    return running.bit_length()


class DeviceQueue(Protocol):
    """The work that training has queued on the device ahead of itself."""

    def bound(self) -> None:
        """Let training run at most a few layers ahead of the device, so that a yield can take effect soon."""
        ...  # pragma: no cover

    def drain(self) -> None:
        """Return when the device has done what was queued."""
        ...  # pragma: no cover


class Place(Protocol):
    """The part of the device that training runs on."""

    share: float
    parts: tuple[float, ...]  # that it can be besides 1.0, rising

    def move(self, share: float) -> None:
        """Run what comes on this share of the device; takes microseconds."""
        ...  # pragma: no cover


class Everywhere:
    """A device that is not divided."""

    share = 1.0
    parts: tuple[float, ...] = ()

    def move(self, share: float) -> None:
        """There is one part only."""


def part_for(duty: float, current: float, parts: Sequence[float]) -> float:
    """The smallest part that holds a duty, the largest if none does; the present one where another is hardly better."""
    if current in parts and current < duty <= current / PART_SETTLED**0.5:
        return current
    wanted = next((part for part in parts if duty <= part), parts[-1])
    next_larger = next((part for part in parts if part > wanted), wanted)
    return current if current == next_larger and duty > PART_SETTLED * wanted else wanted


class NoQueue:
    """The CPU: when an operator returns, its work is done."""

    def bound(self) -> None:
        """Nothing is queued."""

    def drain(self) -> None:
        """Nothing is queued."""


class Governor:
    """Yields. One thread at a time may call it: training's, or autograd's while training's waits for that."""

    IDLE_POLL_S = 0.02  # how old the news that traffic started may be; reading the shared pulse takes microseconds
    SLICE_S = 0.005  # sleeps are cut into these, so that a yield ends soon after traffic does
    QUANTUM_S = 0.001  # shorter sleeps are saved up: the kernel's timer slack would double them
    LONGEST_YIELD_S = 1.0  # of one yield point: cancel, pause and sync requests are looked at after it
    STANDSTILL_S = 0.5  # without work: what a window measured since is not training's doing
    LONGEST_ACTIVE_S = 5.0  # between two yield points; more was a pause of training's own, not work

    def __init__(self, config: GovernorConfig, pulse: PulseSource, *, device: DeviceQueue | None = None,
                 place: Place | None = None, clock: Callable[[], float] = time.monotonic,
                 sleep: Callable[[float], None] = time.sleep) -> None:
        self.controller = Controller(config)
        # Seconds of the whole device that training used, and left to serving, since the governor was made: a second on
        # a quarter of it is a quarter of a second used.
        self.active_s = 0.0
        self.yielded_s = 0.0
        self._enabled = config.enabled
        self._pulse = pulse
        self._device = device or NoQueue()
        self._place = place or Everywhere()
        self._clock = clock
        self._sleep = sleep
        self._resumed = clock()
        self._next_poll = 0.0
        self._owed_s = 0.0

    def begin_work(self) -> None:
        """Training goes on after something else (a new job, a pause, a sync): that time was not work.

        Cheap; to be called at the start of every step. What lies between two steps, the ledger's writes to a disk that
        may be slow, is rest like any other: forgotten with its window, it could keep short steps from being judged.
        """
        now = self._clock()
        paused, self._resumed = max(0.0, now - self._resumed), now
        if paused > self.STANDSTILL_S:
            self._owed_s = 0.0
            self.controller.forget_window()
        elif self._enabled:
            self.yielded_s += paused
            self._owed_s = max(0.0, self._owed_s - paused)

    def worked(self) -> None:
        """The time up to now was work: called at a step's end, before what is none."""
        if self._enabled:
            self._owed_s += self._account(self._clock()) * _rest_per_work(self._working_share())

    def yield_point(self, *_: Any) -> None:
        """Step aside for as long as the rule says; takes microseconds when it says nothing. Usable as a hook."""
        if not self._enabled:
            return
        now = self._clock()
        if now >= self._next_poll:
            self._poll(now)
        if self._working_share() >= 1.0:
            self._device.bound()
            self._account(self._clock())
            self._owed_s = 0.0
        else:
            self._device.drain()
            now = self._clock()
            self.controller.standing_still(now)
            active = self._account(now)
            self._owed_s = min(self.LONGEST_YIELD_S, self._owed_s + active * _rest_per_work(self._working_share()))
            if self._owed_s >= self.QUANTUM_S or self.controller.duty == 0.0:
                self._rest(now)
        self._choose_part()

    def status(self) -> dict[str, Any]:
        """For `GET /train/status`: milliseconds and shares."""
        rule = self.controller
        reading = rule._last
        state = rule.classes.get(rule.load_class) if rule.load_class is not None else None
        alone_s = state.alone_s if state is not None else None
        return {
            "mode": rule.mode if self._enabled else "off", "duty": round(rule.duty, 4), "note": rule.note,
            "device_share": round(self._place.share, 4),
            "itl_ms": None if rule.itl_s is None else round(rule.itl_s * 1e3, 3),
            "itl_alone_ms": None if alone_s is None else round(alone_s * 1e3, 3),
            "itl_budget_ms": None if rule.budget_s is None else round(rule.budget_s * 1e3, 3),
            "requests_running": None if reading is None else reading.running,
            "requests_waiting": None if reading is None else reading.waiting,
            "pulse": None if reading is None else reading.source,
            "active_seconds": round(self.active_s, 3), "yielded_seconds": round(self.yielded_s, 3),
        }

    def close(self) -> None:
        """Stop reading the pulse."""
        self._pulse.close()

    def _choose_part(self) -> None:
        """The part of the device for what comes next."""
        duty = self.controller.duty
        if not self._place.parts or duty <= 0.0:  # a probe: nothing runs
            return
        idle = self.controller.mode == "idle"
        share = 1.0 if idle else part_for(duty, self._place.share, self._place.parts)
        if share != self._place.share:
            self._place.move(share)
            self._owed_s = 0.0
            self.controller.forget_window()

    def _working_share(self) -> float:
        """Share of the time to work on the present part of the device: all of it where the duty fills the part."""
        return min(1.0, self.controller.duty / self._place.share)

    def _poll(self, now: float) -> None:
        self._next_poll = now + (self.IDLE_POLL_S if self._working_share() >= 1.0 else self.SLICE_S)
        self.controller.observe(self._pulse.latest(), now, self.active_s, self.yielded_s)

    def _account(self, now: float) -> float:
        active = min(self.LONGEST_ACTIVE_S, max(0.0, now - self._resumed))
        self.active_s += active * self._place.share
        self.yielded_s += active * (1.0 - self._place.share)
        self._resumed = now
        return active

    def _rest(self, now: float) -> None:
        deadline = now + self.LONGEST_YIELD_S + self.SLICE_S
        while now < deadline:
            share = self._working_share()
            if share >= 1.0:
                self._owed_s = 0.0
            if share > 0.0 and self._owed_s < self.QUANTUM_S / 10:
                break
            self._sleep(self.SLICE_S if share == 0.0 else min(self.SLICE_S, self._owed_s))
            slept = max(0.0, self._clock() - now)
            now += slept
            self.yielded_s += slept
            if share > 0.0:
                self._owed_s -= slept
            self._poll(now)
            if 0.0 < share < 1.0 and self.controller.duty > 0.0:  # what is still owed was reckoned at the old duty
                self._owed_s *= _rest_per_work(self._working_share()) / _rest_per_work(share)
        self._owed_s = max(0.0, self._owed_s)
        self._resumed = now


def _rest_per_work(share: float) -> float:
    """Seconds to rest for each second of work; a probe (no work at all) leaves no debt behind."""
    return 1.0 / share - 1.0 if share > 0.0 else 0.0
