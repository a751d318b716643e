"""Attached or not: one explicit state machine, advanced by `poll()`.

                     no manifest                 front end answers             every view verified
    ┌────────────► DETACHED ──────► WAITING ──────────────► ATTACHING ──────────────► VERIFIED
    │                 ▲   manifest of a living vLLM            │                          │ exporter gone, or its
    │                 │                                        │ ShareError               │ manifest replaced
    │                 └──────────── REFUSED ◄──────────────────┘                          ▼
    └───────────────────────────────────────────────────────────────────────────────── LOST
                                                           what the mapping holds was saved, then let go

WAITING: vLLM has exported its weights but does not serve yet; it measures its memory then, and a process that takes
some of the card would make it fail. REFUSED is left when the manifest changes, and tried again every RETRY_S: another
worker may have gone. Knows nothing of Celery; whoever polls also owns the weights while it does.
"""

import logging
import time
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Any

from hogwild.errors import ExporterGone, HogwildError, ManifestError
from hogwild.frontend import Frontend
from hogwild.gpu_worker.attach import Attachment, Verification, attach
from hogwild.manifest import Manifest, Refusal, manifest_path, refusal_path

logger = logging.getLogger(__name__)

RETRY_S = 10.0  # a lock of another worker may be released; contents of a manifest do not change


class State(StrEnum):
    """Where a worker stands with the weights."""

    DETACHED = "detached"
    WAITING = "waiting"
    ATTACHING = "attaching"
    VERIFIED = "verified"
    LOST = "lost"
    REFUSED = "refused"


class Lifecycle:
    """Follows the vLLM of one runtime directory.

    `on_attached(attachment)` is called with verified views and may raise an error of ours to refuse them after all.
    `on_lost(attachment)` is called while the memory is still mapped; it must close the attachment.
    `on_change()` is called at each change of state or reason, those within one `poll` included, and must not take long:
    what it may be told of is weights that have yet to be saved.
    """

    def __init__(
        self,
        runtime_dir: Path,
        *,
        on_attached: Callable[[Attachment], None],
        on_lost: Callable[[Attachment], None],
        on_change: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.runtime_dir = runtime_dir
        self.state = State.DETACHED
        self.reason = "no vLLM has exported its weights yet"
        self.attachment: Attachment | None = None
        self._verification: Verification | None = None
        self._on_attached = on_attached
        self._on_lost = on_lost
        self._on_change = on_change
        self._clock = clock
        self._since = time.time()
        self._refused: tuple[int, float] | None = None  # inode of the manifest, when to try again

    def poll(self) -> State:
        """Take at most one way through the drawing; returns the state it ends in."""
        if self.attachment is not None:
            if not self.attachment.alive():
                self._lose()
            return self.state
        try:
            inode = manifest_path(self.runtime_dir).stat().st_ino
        except OSError:
            self._go(State.DETACHED, self._why_no_manifest())
            return self.state
        if self._refused is not None and self._refused[0] == inode and self._clock() < self._refused[1]:
            return self.state
        try:
            self._try(inode)
        except Exception as error:
            self._refused = (inode, self._clock() + RETRY_S)
            if isinstance(error, HogwildError):
                self._go(State.REFUSED, error.message)
            else:
                logger.exception("attaching failed")
                self._go(State.REFUSED, f"attaching failed: {type(error).__name__}: {error}")
        return self.state

    def _try(self, inode: int) -> None:
        try:
            Manifest.load(manifest_path(self.runtime_dir)).check_alive()
        except ExporterGone as error:
            self._go(State.DETACHED, error.message)
            return
        if Frontend.load(self.runtime_dir) is None:
            self._go(State.WAITING, "vLLM has exported its weights and does not serve yet")
            return
        self._go(State.ATTACHING, "")
        attachment = attach(self.runtime_dir)
        try:
            self._verification = attachment.verify()
            self._on_attached(attachment)
        except BaseException:
            attachment.close()
            raise
        self.attachment = attachment
        self._refused = None
        self._go(State.VERIFIED, self._verification.against)

    def _lose(self) -> None:
        attachment, self.attachment = self.attachment, None
        if attachment is None:
            return
        self._go(State.LOST, "vLLM is gone or was restarted; saving what its memory holds")
        self._on_lost(attachment)
        self._go(State.DETACHED, "waiting for vLLM to come back")

    def close(self) -> None:
        """Let go of the weights, if attached, without calling `on_lost`."""
        attachment, self.attachment = self.attachment, None
        if attachment is not None:
            attachment.close()
        self._go(State.DETACHED, "closed")

    def _why_no_manifest(self) -> str:
        try:
            refusal = Refusal.load(refusal_path(self.runtime_dir))
        except ManifestError as error:
            return f"vLLM's weights can't be shared, and its report of that can't be read: {error.message}"
        if refusal is not None:
            return "vLLM's weights can't be shared: " + "; ".join(text for _, text in refusal.reasons)
        return f"no vLLM has exported its weights to {self.runtime_dir}"

    def _go(self, state: State, reason: str) -> None:
        if state is self.state and reason == self.reason:
            return
        if state is not self.state:
            self._since = time.time()
        level = logging.WARNING if state in (State.REFUSED, State.LOST) else logging.INFO
        logger.log(level, "weights: %s → %s%s", self.state, state, f" ({reason})" if reason else "")
        self.state, self.reason = state, reason
        self._on_change()

    def describe(self) -> dict[str, Any]:
        """For `GET /train/status`: seconds and bytes."""
        shown: dict[str, Any] = {"state": str(self.state), "reason": self.reason, "since": self._since}
        attachment, verification = self.attachment, self._verification
        if attachment is not None and verification is not None:
            shown.update(
                export_id=attachment.manifest.export_id,
                tensors=len(attachment.views),
                bytes=attachment.nbytes,
                attach_seconds=attachment.seconds,
                verified_against=verification.against,
                verify_seconds=verification.seconds,
            )
        return shown
