"""A model of vLLM and a trainer on one device, in virtual time, to try the governor's rule against.

Requests in a batch advance together: a decode step takes `alone(n)` seconds of device time, and while training is
active the device serves at a share `1 / (1 + slowdown)` of its speed. Training is a loop of layers of `layer_s` seconds
with a yield point after each, which is where the real governor is called with this plant's clock and sleep.
"""

import dataclasses
import math
import random
from collections.abc import Callable

from hogwild.gpu_worker.governor import Governor, GovernorConfig
from hogwild.gpu_worker.partition import PARTS
from hogwild.gpu_worker.pulse import Reading
from hogwild.pulse_state import BUCKETS, bucket_of

PROMPT_STEPS = 4  # a step that reads prompts takes so many more steps' time
TICK_S = 0.005  # how finely changes of the traffic are followed


@dataclasses.dataclass
class Traffic:
    """Requests (running, waiting) at a time, and when a token can be made at all (False: a prompt is being read)."""

    load: Callable[[float], tuple[int, int]]
    decoding: Callable[[float], bool] = lambda t: True


class Arrivals:
    """Traffic of requests that come at random, at `rate` a second, and leave after `tokens` steps.

    An engine step reads the prompts of whoever waits: 1.2 to 1.7 times as long for one, 4 times for more. The step
    after it is late one time in four, and one step in a hundred takes 2 to 4 times as long for no reason, with training
    or without. With 21.6 requests a second the mean gap between tokens is 1.17 of its median; on an H100 it was 1.12.
    """

    def __init__(self, rate: float, *, tokens: int = 128, seed: int = 0) -> None:
        self.rate, self.tokens = rate, tokens
        self.random = random.Random(seed)
        self.steps = random.Random(seed + 1)
        self.arrival = self.random.expovariate(rate)
        self.left: list[int] = []  # tokens that each running request has still to make
        self.reading = self.waiting = 0

    def load(self, t: float) -> tuple[int, int]:
        while self.arrival <= t:
            self.waiting += 1
            self.arrival += self.random.expovariate(self.rate)
        return len(self.left) + self.reading, self.waiting

    def decoding(self, t: float) -> bool:
        return True

    def end_step(self) -> int:
        """The tokens that it made after another of the same request."""
        made = len(self.left)
        self.left = [left - 1 for left in self.left if left > 1] + [self.tokens - 1] * self.reading
        return made

    def begin_step(self) -> float:
        """How much longer than a step without anything the next one takes: so many times that."""
        late = self.steps.random() < 0.25 and 2.0 * self.steps.random()
        odd = self.steps.random() < 0.01 and self.steps.uniform(1.0, 3.0)
        after_prompt, self.reading, self.waiting = self.reading > 0, self.waiting, 0
        if self.reading:
            return odd + self.steps.uniform(0.2, 0.7) + 2.5 * (self.reading > 1)
        return odd + late * after_prompt


class Parts:
    """A device in quarters: the real rule, no real streams."""

    parts = PARTS

    def __init__(self) -> None:
        self.share = 1.0
        self.moves: list[float] = []

    def move(self, share: float) -> None:
        self.share = share
        self.moves.append(share)


class Plant:
    def __init__(self, config: GovernorConfig, traffic: Traffic | Arrivals, *,
                 alone: Callable[[int], float] = lambda n: 0.007, slowdown: float = 1.0,
                 layer_s: float = 0.004, noise: float = 0.0, seed: int = 0, pulse_period_s: float = 0.0,
                 visible: Callable[[float], bool] = lambda t: True,
                 parts: Parts | None = None, part_slowdown: float = 0.35, step_layers: int = 72,
                 prompts: float = 0.0, tells_prompts: bool = True, ahead: bool = False) -> None:  # fmt: skip
        self.now = 100.0
        self.start = self.now
        self.traffic, self.alone, self.slowdown, self.layer_s, self.noise = traffic, alone, slowdown, layer_s, noise
        self.random = random.Random(seed)
        self.pulse_period_s, self.visible = pulse_period_s, visible
        self.tokens, self.itl_sum_s, self.updated = 0, 0.0, self.now
        self.histogram = [0] * BUCKETS
        self.emitted: list[tuple[float, int, float]] = []  # time, tokens, latency
        self.decoded: list[tuple[float, int, float]] = []  # the same, of steps that only decoded
        self.active_log: list[tuple[float, float]] = []  # time, seconds of training
        self.longest_yield_s = 0.0
        self._progress, self._last_token, self._work = 0.0, self.now, 1.0
        self._reading: Reading | None = None
        self.parts, self.part_slowdown, self.step_layers = parts, part_slowdown, step_layers
        self.prompts, self.tells_prompts = prompts, tells_prompts  # share of the steps that also read prompts
        self.mixed, self.mixed_sum_s, self._reads = 0, 0.0, False
        self.ahead, self._queued_s = ahead, 0.0  # training's layers run after they were queued, as on a GPU
        self._counted = self._counters()
        self.governor = Governor(config, self, device=self, place=parts, clock=lambda: self.now,
                                 sleep=lambda s: self.advance(s, training=False))

    @property
    def t(self) -> float:
        return self.now - self.start

    def latest(self) -> Reading | None:
        if not self.visible(self.t):
            return None
        if self._reading is None or self.now - self._reading.at >= self.pulse_period_s:
            running, waiting = self.traffic.load(self.t)
            polled = self.pulse_period_s > 0
            tokens, itl_sum_s, mixed, mixed_sum_s, histogram = self._counted if self.ahead else self._counters()
            self._reading = Reading(
                at=self.now, tokens=tokens, itl_sum_s=itl_sum_s, running=running, waiting=waiting,
                mixed_tokens=mixed, mixed_sum_s=mixed_sum_s, histogram=() if polled else histogram,
                updated=None if polled else self.updated, source="metrics" if polled else "state")
        return self._reading

    def _counters(self) -> tuple[int, float, int, float, tuple[int, ...]]:
        return self.tokens, self.itl_sum_s, self.mixed, self.mixed_sum_s, tuple(self.histogram)

    def close(self) -> None:
        pass

    def drain(self) -> None:
        """A layer that was queued runs when it is waited for."""
        queued, self._queued_s = self._queued_s, 0.0
        self.advance(queued, training=True)

    bound = drain

    def advance(self, seconds: float, *, training: bool) -> None:
        end = self.now + seconds
        while self.now < end - 1e-12:
            running, _ = self.traffic.load(self.t)
            token_s = self.alone(max(1, running)) * self._work * (1 + self._slowdown() * training)
            step = min(TICK_S, end - self.now, max(1e-9, (1.0 - self._progress) * token_s))
            self.now += step
            if running == 0:
                if self._last_token != self.now:
                    self.updated = max(self.updated, self._last_token)
                self._last_token, self._progress = self.now, 0.0
                if isinstance(self.traffic, Arrivals):
                    self._begin_step()
                continue
            if not self.traffic.decoding(self.t):
                self.updated = self._last_token = self.now
                continue
            self._progress += step / token_s
            if self._progress >= 1.0 - 1e-6:
                self._end_step(running)
        if training:
            self.active_log.append((self.t, seconds * self.share))

    def _end_step(self, running: int) -> None:
        latency = self.now - self._last_token
        made = self.traffic.end_step() if isinstance(self.traffic, Arrivals) else running
        self._counted = self._counters()  # the stat logger is told of a step when the next one ends
        self.tokens += made
        self.itl_sum_s += latency * made
        if self._reads and self.tells_prompts:
            self.mixed += made
            self.mixed_sum_s += latency * made
        else:
            self.histogram[bucket_of(latency)] += made
        self.emitted.append((self.t, made, latency))
        if not self._reads:
            self.decoded.append((self.t, made, latency))
        self._progress, self._last_token, self.updated = 0.0, self.now, self.now
        self._begin_step()

    def _begin_step(self) -> None:
        self._work = max(0.3, self.random.gauss(1.0, self.noise)) if self.noise else 1.0
        if isinstance(self.traffic, Arrivals):
            self._work += self.traffic.begin_step()
            self._reads = self.traffic.reading > 0
        else:
            self._reads = self.prompts > 0 and self.random.random() < self.prompts
            self._work += PROMPT_STEPS * self._reads

    @property
    def share(self) -> float:
        return self.parts.share if self.parts else 1.0

    def _slowdown(self) -> float:
        """On a part of the device training is in serving's way far less than on all of it for as much work."""
        return self.slowdown if self.share == 1.0 else self.part_slowdown * self.share

    def run(self, seconds: float) -> "Plant":
        end, layers = self.now + seconds, 0
        while self.now < end:
            if self.parts and layers % self.step_layers == 0:
                self.governor.begin_work()
                self.governor.yield_point()
            layers += 1
            layer_s = self.layer_s / self.share
            self.advance(0.3 * layer_s if self.ahead else layer_s, training=True)  # while the rest is being queued
            self._queued_s = 0.7 * layer_s if self.ahead else 0.0
            before = self.now
            self.governor.yield_point()
            self.longest_yield_s = max(self.longest_yield_s, self.now - before)
        return self

    def training_share(self, since: float, until: float) -> float:
        return sum(s for t, s in self.active_log if since < t <= until) / (until - since)

    def itl_s(self, since: float, until: float) -> float:
        return self._mean(self.emitted, since, until)

    def decoded_itl_s(self, since: float, until: float) -> float:
        return self._mean(self.decoded, since, until)

    @staticmethod
    def _mean(made: list[tuple[float, int, float]], since: float, until: float) -> float:
        tokens = [(n, latency) for t, n, latency in made if since < t <= until]
        return sum(n * latency for n, latency in tokens) / sum(n for n, _ in tokens)

    def windows_held(self, budget_s: float, since: float, until: float) -> float:
        """Share of the one-second windows with tokens whose median inter-token latency is within the budget."""
        held = total = 0
        for first in range(math.ceil(since), math.floor(until)):
            latencies = sorted(latency for t, _, latency in self.emitted if first < t <= first + 1)
            if len(latencies) >= 5:  # fewer have no median to speak of
                total += 1
                held += latencies[len(latencies) // 2] <= budget_s
        return held / total

    def seconds_held(self, budget_s: float, since: float, until: float) -> float:
        """Share of the seconds whose mean inter-token latency, of all tokens, is within a budget."""
        seconds = range(math.ceil(since), math.floor(until))
        return sum(self.itl_s(first, first + 1) <= budget_s for first in seconds) / len(seconds)
