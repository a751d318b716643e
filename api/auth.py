"""API keys: who may ask for what.

`HOGWILD_API_KEY` is one read-write key. `HOGWILD_API_KEYS_FILE` holds several, one a line, hashed:

    # name : read-write | read-only : sha256 of the key
    alice : read-write : 9f86d081884c7d65…

`hogwild key alice` prints a new key and its line. Keys are long random strings, so a plain SHA-256 is as good as a slow
password hash. Without any key the API is open; `hogwild up` then listens on loopback only.
"""

import hashlib
import hmac
import re
import secrets
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from starlette.requests import Request

from hogwild.config import Settings
from hogwild.errors import ConfigError, Forbidden, Unauthorized

Scope = Literal["read-write", "read-only"]
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True)
class ApiKey:
    """One key, by its hash."""

    name: str
    scope: Scope
    digest: str  # SHA-256, hexadecimal


ANYONE = ApiKey("anonymous", "read-write", "")


def digest(key: str) -> str:
    """SHA-256 of a key, hexadecimal."""
    return hashlib.sha256(key.encode()).hexdigest()


def new_key(name: str, scope: Scope) -> tuple[str, str]:
    """A new random key and its line for the keys file."""
    if not _NAME.fullmatch(name):
        raise ConfigError(f"A key's name has 1 to 64 letters, digits, '.', '_' and '-'; {name!r} does not.")
    key = f"hw-{secrets.token_urlsafe(32)}"
    return key, f"{name} : {scope} : {digest(key)}"


def read_keys(path: Path) -> list[ApiKey]:
    """Keys of a keys file. Raises ConfigError with the line that is wrong."""
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise ConfigError(f"HOGWILD_API_KEYS_FILE: {path} can't be read: {error.strerror}.") from error
    keys: dict[str, ApiKey] = {}
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        parts = [part.strip() for part in text.split(":")]
        if len(parts) != 3 or not _NAME.fullmatch(parts[0]) or not re.fullmatch(r"[0-9a-f]{64}", parts[2]):
            raise ConfigError(f"{path}, line {number}: expected 'name : read-write | read-only : <sha256 of the key>'.")
        name, scope, hashed = parts
        if name in keys:
            raise ConfigError(f"{path}, line {number}: the name {name!r} is there twice.")
        if scope == "read-write":
            keys[name] = ApiKey(name, "read-write", hashed)
        elif scope == "read-only":
            keys[name] = ApiKey(name, "read-only", hashed)
        else:
            raise ConfigError(f"{path}, line {number}: {scope!r} is neither read-write nor read-only.")
    return list(keys.values())


def keys_of(settings: Settings, extra: Iterable[str] = ()) -> list[ApiKey]:
    """All keys of a deployment. `extra`: plain keys that are valid as well (vLLM's `--api-key` on its own port)."""
    keys = []
    if settings.api_key is not None:
        keys.append(ApiKey("default", "read-write", digest(settings.api_key.get_secret_value())))
    if settings.api_keys_file is not None:
        keys += read_keys(settings.api_keys_file)
    keys += [ApiKey("vllm", "read-write", digest(key)) for key in extra]
    return keys


def authenticator(keys_now: Callable[[], list[ApiKey]]) -> Callable[[Request], Awaitable[ApiKey]]:
    """A FastAPI dependency that returns the key of a request. Raises Unauthorized, Forbidden."""

    async def authenticate(request: Request) -> ApiKey:
        if not (keys := keys_now()):
            return ANYONE
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        hashed = digest(token.strip()) if kind.lower() == "bearer" else ""
        found = None
        for key in keys:  # all of them, each in constant time: the answer's time tells nothing about which one matched
            if hmac.compare_digest(key.digest, hashed):
                found = key
        if found is None:
            raise Unauthorized()
        if found.scope == "read-only" and request.method not in ("GET", "HEAD"):
            raise Forbidden(f"The key {found.name!r} may only read.")
        return found

    return authenticate
