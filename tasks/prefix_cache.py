"""vLLM's prefix cache after the weights changed: it is asked to forget until it has.

Keys and values that were computed with older weights are stale, after a rollback those of weights that were undone.
vLLM drops none of them while any request holds blocks, so on a busy server one attempt comes to nothing: what is owed
is remembered and tried again beside training, until it succeeds or that vLLM is gone.
"""

import logging
import threading
import time
from pathlib import Path
from typing import Any, Literal

from hogwild.errors import HogwildError
from hogwild.frontend import Frontend

logger = logging.getLogger(__name__)

RETRY_S = 1.0  # an attempt costs vLLM nothing; a moment without requests may be short
TIMEOUT_S = 5.0

Outcome = Literal["reset", "held", "unanswered"]


class PrefixCache:
    """What is owed to the vLLM of one runtime directory, at `url` or where that says. Safe to use from many threads."""

    def __init__(self, runtime_dir: Path, url: str | None = None) -> None:
        self._runtime_dir = runtime_dir
        self._url = url
        self._asking = threading.Lock()  # one request at a time
        self._changes = 0  # of the weights so far: one that comes during an attempt is still owed after it
        self._owed_since: float | None = None
        self._reset_at: float | None = None
        self._reason = ""
        self._running = False
        self._tried_at = 0.0

    def owe(self, *, running: bool = False) -> None:
        """The weights changed. `running`: running requests are to be computed anew too, where vLLM can do that."""
        self._changes += 1
        self._running = self._running or running
        self._owed_since = self._owed_since or time.time()

    def forget(self) -> None:
        """That vLLM is gone; the next one has an empty cache."""
        self._changes += 1
        self._owed_since, self._running, self._reason = None, False, ""

    def reset(self, *, patience_s: float, running: bool = False) -> bool:
        """`owe`, and try for `patience_s` as long as requests hold prefixes; False: it is owed from now on."""
        known = self._owed_since is not None
        self.owe(running=running)
        deadline = time.monotonic() + patience_s
        while (outcome := self._attempt()) == "held" and time.monotonic() < deadline:
            time.sleep(0.1)
        if outcome != "reset" and not known:
            logger.warning("vLLM's prefix cache was not reset, it is tried again: %s", self._reason)
        return outcome == "reset"

    def retry(self) -> None:
        """One attempt, if a reset is owed and the last attempt is some time ago."""
        if self._owed_since is not None and time.monotonic() - self._tried_at >= RETRY_S:
            since = self._owed_since
            if self._attempt() == "reset":
                logger.info("vLLM's prefix cache is reset, %.0f s after the weights changed", time.time() - since)

    def _attempt(self) -> Outcome:
        with self._asking:
            changes, running = self._changes, self._running
            self._tried_at = time.monotonic()
            try:
                frontend = Frontend.load(self._runtime_dir, self._url)
                if frontend is None:
                    self._reason = "vLLM's plugin has not published its address"
                    return "unanswered"
                if not frontend.reset_prefix_cache(TIMEOUT_S, running=running):
                    self._reason = "running requests hold prefixes"
                    return "held"
            except (HogwildError, OSError, ValueError, KeyError) as error:
                self._reason = f"{error}"
                self._running = False  # or running requests would begin anew with each attempt
                return "unanswered"
            self._reset_at = time.time()
            if self._changes == changes:
                self._owed_since, self._running, self._reason = None, False, ""
            return "reset"

    def status(self) -> dict[str, Any]:
        """For `GET /train/status`; times in seconds since the epoch."""
        owed = self._owed_since
        return {"reset_owed": owed is not None, "owed_since": owed, "reason": self._reason, "reset_at": self._reset_at}
