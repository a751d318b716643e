"""Tells clients which weights answered: `X-Hogwild-Weight-Version` on every successful `/v1` response of vLLM.

The weights change while vLLM generates, so one answer can come from several versions. Two numbers bound them:

- `X-Hogwild-Weight-Version`: the version in memory when the response's headers were sent. For a plain response that is
  when the answer was complete (the newest weights it can contain); for a stream it is when the stream started (a stream
  may go on under newer ones: `GET /train/status` and the next response tell).
- `X-Hogwild-Weight-Version-At-Request`: the version when the request arrived (the oldest weights it can contain).

Equal numbers mean that exactly these weights answered. A pure ASGI middleware: nothing is buffered, streams stay
streams, and the cost is one read of an mmap. Whatever goes wrong here, the response goes out.
"""

import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any, Protocol

from hogwild.weight_state import FILE_NAME, WeightState

HEADER = "X-Hogwild-Weight-Version"
REQUEST_HEADER = "X-Hogwild-Weight-Version-At-Request"
RETRY_S = 1.0  # the export may come after the first requests; a missing file is looked for this often at most

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

logger = logging.getLogger(__name__)


class Versions(Protocol):
    """Where the middleware reads the version."""

    def read(self) -> int | None:
        """The present version, or None while nothing is exported."""
        ...  # pragma: no cover


class VersionSource:
    """The weight version from `<runtime_dir>/weights.state`, mapped when it first appears."""

    def __init__(self, runtime_dir: Path) -> None:
        self._path = runtime_dir / FILE_NAME
        self._state: WeightState | None = None
        self._next_try = 0.0
        self._warned = False

    def read(self) -> int | None:
        """The present version, or None while nothing is exported."""
        if self._state is None and time.monotonic() >= self._next_try:
            self._next_try = time.monotonic() + RETRY_S
            if self._path.exists():
                self._open()
        return None if self._state is None else self._state.version

    def _open(self) -> None:
        try:
            self._state = WeightState.open(self._path)
        except Exception as error:
            if not self._warned:
                self._warned = True
                logger.warning("%s can't be read (%s): responses carry no weight version", self._path, error)


class WeightVersionHeader:
    """ASGI middleware (`app.add_middleware(WeightVersionHeader, source=…)`); see the module's docstring."""

    def __init__(self, app: ASGIApp, source: Versions) -> None:
        self.app = app
        self.source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on; add the headers to a 2xx answer below /v1/."""
        if scope["type"] != "http" or not _is_v1(scope):
            await self.app(scope, receive, send)
            return
        at_request = self.source.read()

        async def send_with_version(message: Message) -> None:
            if message["type"] == "http.response.start" and 200 <= message["status"] < 300:
                version = self.source.read()
                if version is not None:
                    before = version if at_request is None else at_request
                    message["headers"] = [*message.get("headers", ()),
                                          (HEADER.lower().encode(), str(version).encode()),
                                          (REQUEST_HEADER.lower().encode(), str(before).encode())]
            await send(message)

        await self.app(scope, receive, send_with_version)


def _is_v1(scope: Scope) -> bool:
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path.removeprefix(root).startswith("/v1/")
