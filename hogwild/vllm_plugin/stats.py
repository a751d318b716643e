"""vLLM's stat logger that publishes inter-token latencies to the worker's pacing governor.

vLLM finds it through the entry-point group `vllm.stat_logger_plugins` (0.26 to 0.33) and makes one per engine in the
API-server process, after the engine is ready. `record` is called once for every engine step from the loop that also
hands tokens to the clients, and an exception there would end serving: so nothing may come out of it, and after the
first failure the logger is silent.

A step's latencies are written with the next step, because what that one does decides what they say: with asynchronous
scheduling vLLM launches a step before it takes the time of the one before, and to launch one that reads prompts takes
long. The tokens before it are late then, with training or without, and count as those of a step that reads prompts.
The last step before silence has no next one and is written at once.

It replaces nothing in vLLM, so it is none of the hooks that `hooks.install` looks for: a statistic of another shape
costs the pulse and nothing else.

A side effect of vLLM's own: with a stat logger plugin installed, `--disable-log-stats` keeps the per-step statistics on
(without the log lines).
"""

import logging
import os
import stat
from pathlib import Path
from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase

from hogwild.config import load_settings
from hogwild.pulse_state import FILE_NAME, PulseWriter
from hogwild.vllm_plugin.hooks import model_runtime_dir, withheld

logger = logging.getLogger(__name__)

NOTHING: tuple[list[float], bool] = [], False  # a step's latencies (s), and whether it read prompts


class PulseStatLogger(StatLoggerBase):  # type: ignore[misc]  # vLLM is not there when types are checked
    """Writes `pulse.state` into the runtime directory of the served model; silent where its weights are not shared."""

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        self._writer: PulseWriter | None = None
        self._held = NOTHING  # the last step
        try:
            if load_settings().disable:
                return
            directory = model_runtime_dir(vllm_config)
            if _is_private_dir(directory) and withheld(vllm_config) is None:
                self._writer = PulseWriter(directory / FILE_NAME, engine_index)
        except Exception:
            logger.exception("hogwild: no pulse for the pacing governor; it will read /metrics instead")

    def record(self, scheduler_stats: Any, iteration_stats: Any, *args: Any, **kwargs: Any) -> None:
        """Called by vLLM after every engine step; either of the two may be None."""
        if self._writer is None:
            return
        try:
            latencies, prompts = self._last_step(iteration_stats) if iteration_stats is not None else NOTHING
            running = waiting = None
            if scheduler_stats is not None:
                running = scheduler_stats.num_running_reqs
                waiting = scheduler_stats.num_waiting_reqs + getattr(scheduler_stats, "num_skipped_waiting_reqs", 0)
            if running == waiting == 0:
                self._writer.record(latencies, prompts=prompts)
                (latencies, prompts), self._held = self._held, NOTHING
            self._writer.record(latencies, running, waiting, prompts=prompts)
        except Exception:
            self._writer = None
            logger.exception("hogwild: the pulse stopped; the pacing governor will read /metrics instead")

    def _last_step(self, stats: Any) -> tuple[list[float], bool]:
        """The latencies of the step before this one, and whether either read prompts."""
        # A step that makes some request's first token has read its prompt, or the last chunk of it.
        step = list(stats.inter_token_latencies_iter), bool(stats.time_to_first_tokens_iter)
        if not any(step):  # none at all: nothing came out
            return NOTHING
        (latencies, prompts), self._held = self._held, step
        return latencies, prompts or step[1]

    def log_engine_initialized(self) -> None:
        """Nothing to say: required by the interface."""


def _is_private_dir(path: Path) -> bool:
    """Made by our export: a real directory of this user that nobody else can write to."""
    try:
        info = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(info.st_mode) and info.st_uid == os.getuid() and not info.st_mode & 0o022
