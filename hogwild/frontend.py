"""vLLM's own port, as the plugin's endpoint part published it: what the worker asks of vLLM goes through here.

`frontend.json` (0600) names the URL and a token. Whoever can read the file is the user that runs vLLM, so the token
needs no other protection; it keeps everybody else out of the plugin's own routes, whether vLLM has an API key or not.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import httpx

from hogwild.errors import ManifestError, ServiceUnavailable
from hogwild.manifest import asdict_shallow
from hogwild.runtime_files import process_alive, read_private, write_private

FILE_NAME = "frontend.json"
TOKEN_HEADER = "X-Hogwild-Token"  # noqa: S105 - the header's name


@dataclass(frozen=True, kw_only=True)
class Frontend:
    """Where vLLM's HTTP server is. `uds`: path of its Unix socket when it listens on one."""

    url: str
    pid: int
    process_start_time: float
    token: str
    uds: str | None = None

    @classmethod
    def load(cls, runtime_dir: Path, url: str | None = None) -> Self | None:
        """The front end of a vLLM that is running now, or None when there is none.

        `url`: where it is for this process, if that is another address than the published one.

        Raises:
            ManifestError: the file is there but can't be trusted or read.
        """
        path = runtime_dir / FILE_NAME
        if not path.exists():
            return None
        try:
            data = json.loads(read_private(path))
            frontend = cls(**data)
        except (ValueError, TypeError, RecursionError) as error:
            raise ManifestError(f"{path} is damaged: {error}") from error
        texts, numbers = (frontend.url, frontend.token), (frontend.pid, frontend.process_start_time)
        if not all(isinstance(text, str) for text in texts) or not all(isinstance(n, int | float) for n in numbers):
            raise ManifestError(f"{path} is damaged: a field has the wrong type")
        if not process_alive(frontend.pid, frontend.process_start_time):
            return None
        return replace(frontend, url=url, uds=None) if url else frontend

    def write(self, runtime_dir: Path) -> None:
        """Publish, atomically and for this user only."""
        write_private(runtime_dir / FILE_NAME, json.dumps(asdict_shallow(self)))

    def reset_prefix_cache(self, timeout: float = 10.0, *, running: bool = False) -> bool:
        """Make vLLM forget the prefixes it cached under older weights; False while requests hold some of them.

        `running`: compute what running requests hold anew, in a vLLM that can; another one takes it for False.

        Raises:
            ServiceUnavailable: vLLM did not answer within `timeout` seconds, or refused.
        """
        query = "?running=true" if running else ""
        answer = self._request("POST", f"/hogwild/prefix_cache/reset{query}", timeout).json()
        return bool(answer["reset"])

    def metrics(self, timeout: float = 5.0) -> str:
        """Text of vLLM's `/metrics`.

        Raises:
            ServiceUnavailable: vLLM did not answer within `timeout` seconds, or refused.
        """
        return self._request("GET", "/metrics", timeout).text

    def _request(self, method: str, path: str, timeout: float) -> httpx.Response:
        transport = httpx.HTTPTransport(uds=self.uds) if self.uds else None
        # vLLM's certificate is for its public name; here the connection never leaves this machine.
        verify = not self.url.startswith("https:")
        try:
            with httpx.Client(
                base_url=self.url, timeout=timeout, transport=transport, verify=verify, trust_env=False
            ) as client:
                response = client.request(method, path, headers={TOKEN_HEADER: self.token})
                response.raise_for_status()
        except httpx.HTTPError as error:
            raise ServiceUnavailable(f"vLLM at {self.url} did not answer {path}: {error}", retry_after=5) from error
        return response
