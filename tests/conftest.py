"""Fixtures for every level of tests: a real Redis-compatible server, one per test session, one database per test."""

import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import redis

from hogwild.config import Settings
from hogwild.stack.embedded_redis import server_binary

# A busy machine is no reason to fail an example.
hypothesis.settings.register_profile(
    "patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("patient")


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def free_tcp_port() -> Callable[[], int]:
    """Finds ports: `port = free_tcp_port()`."""
    return free_port


class RedisServer:
    """The server that `hogwild up` embeds, with the same durability, on a port and in a directory of its own."""

    def __init__(self, directory: Path, *, options: tuple[str, ...] = (),
                 ignore_file_size_signal: bool = False) -> None:
        self.directory = directory
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.options = options
        # Python ignores SIGXFSZ; a server that inherits this sees a failing write instead of being killed by it.
        self.restore_signals = not ignore_file_size_signal
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> "RedisServer":
        """Start (again, with the data that is in the directory) and wait until it answers."""
        with (self.directory / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [server_binary(), "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.directory),
                 "--appendonly", "yes", "--appendfsync", "always", "--save", "",
                 "--maxmemory-policy", "noeviction", *self.options],
                stdout=log, stderr=log, restore_signals=self.restore_signals)
        deadline = time.monotonic() + 60
        with redis.Redis.from_url(self.url, socket_timeout=1) as client:
            while True:
                try:
                    client.ping()
                except (redis.ConnectionError, redis.TimeoutError, redis.exceptions.BusyLoadingError):
                    if self.process.poll() is not None or time.monotonic() > deadline:
                        raise RuntimeError((self.directory / "server.log").read_text()[-2000:]) from None
                    time.sleep(0.02)
                else:
                    return self

    def signal(self, number: int) -> None:
        """Send a signal: SIGSTOP and SIGCONT make a stalled server."""
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """kill -9: what is not on disk is gone."""
        self.signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        """End it for good."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            self.process.wait(timeout=60)


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a server for this test session (append-only file, fsync always)."""
    with tempfile.TemporaryDirectory(prefix="hw-redis-") as directory:
        server = RedisServer(Path(directory)).start()
        yield server.url
        server.stop()


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[Callable[..., RedisServer]]:
    """Makes servers that a test may kill, stall or fill: `server = own_redis()`."""
    servers: list[RedisServer] = []

    def make(**options: object) -> RedisServer:
        directory = tmp_path / f"redis-{len(servers)}"
        directory.mkdir()
        servers.append(RedisServer(directory, **options).start())
        return servers[-1]

    yield make
    for server in servers:
        server.stop()


@pytest.fixture
def redis_client(redis_server: str) -> Iterator[redis.Redis]:
    """A client on an empty database; it is emptied after the test."""
    with redis.Redis.from_url(redis_server) as client:
        client.flushdb()
        yield client
        client.flushdb()


@pytest.fixture
def settings(redis_server: str, redis_client: redis.Redis, tmp_path: Path,
             monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings of one test: its Redis, its directories, nothing from the environment."""
    for name in list(os.environ):
        if name.startswith("HOGWILD_") or name == "VLLM_API_KEY":
            monkeypatch.delenv(name)
    return Settings(redis_url=redis_server, served_model_name="tiny", runtime_dir=tmp_path / "run",
                    data_dir=tmp_path / "data")
