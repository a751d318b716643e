"""Supervisor's configuration and its XML-RPC over a Unix socket.

Restart policy: a service that ends is started again at once if it had been up for START_S, otherwise after a pause
that grows by one second with every try (Supervisor's BACKOFF); it never gives up, because a vLLM whose GPU is busy or
a Redis whose disk is full can come back at any time.
"""

import ctypes
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import xmlrpc.client
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from supervisor.xmlrpc import SupervisorTransport

from hogwild.runtime_files import write_private
from hogwild.stack.services import Service

START_S = 10  # a service that lives this long has started; one that dies earlier is restarted with growing pauses
RETRIES = 1_000_000  # supervisor has no "for ever"
LOG_BYTES = 20 << 20  # per service, with three older files kept
PR_SET_PDEATHSIG = 1  # linux/prctl.h

HEAD = """\
[supervisord]
nodaemon=true
{user}logfile={logs}/supervisord.log
logfile_maxbytes=1MB
logfile_backups=1
pidfile={run}/supervisord.pid
childlogdir={logs}
[unix_http_server]
file={socket}
chmod=0600
[rpcinterface:supervisor]
supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface
"""
PROGRAM = """\
[program:{name}]
command={command}
priority={priority}
autostart=false
autorestart=true
startsecs={start}
startretries={retries}
stopsignal=TERM
stopwaitsecs={stop_wait}
stopasgroup=false
killasgroup=true
redirect_stderr=true
stdout_logfile={logs}/{name}.log
stdout_logfile_maxbytes={log_bytes}
stdout_logfile_backups=3
"""


@dataclass(frozen=True)
class State:
    """What supervisor says of one service."""

    name: str
    state: str  # STOPPED STARTING RUNNING BACKOFF STOPPING EXITED FATAL
    pid: int
    exit_status: int
    spawn_error: str


class Supervisor:
    """One supervisord and its services; as long as it lives it holds `locks`."""

    def __init__(
        self, services: list[Service], *, directory: Path, env: dict[str, str], locks: Sequence[IO[str]] = ()
    ) -> None:
        self.services = services
        self.logs = directory / "logs"
        self._run = directory / "run"
        # Nobody else's, and short: a Unix socket's path holds 107 characters, and Supervisor appends its pid.
        self._socket = Path(tempfile.mkdtemp(prefix="hogwild-")) / "up.sock"
        self._env = env
        self._locks = locks
        self.process: subprocess.Popen[bytes] | None = None

    def log_file(self, name: str) -> Path:
        """Where the output of a service goes."""
        return self.logs / f"{name}.log"

    def start(self) -> None:
        """Start supervisord, with no service running yet.

        It gets a session of its own, so that Ctrl-C reaches this process alone and the services are stopped in order;
        should this process be killed, the kernel sends supervisord SIGTERM and it stops them.
        """
        for path in (self.logs, self._run):
            path.mkdir(parents=True, exist_ok=True)
        config = self._run / "supervisord.conf"
        text = HEAD.format(
            logs=_escape(self.logs),
            run=_escape(self._run),
            socket=_escape(self._socket),
            user="user=root\n" if os.geteuid() == 0 else "",  # it warns of root that nobody named
        )
        for s in self.services:
            # Not in the configuration: Supervisor takes ' ;' and ' #' there for the beginning of a comment.
            script = self._run / f"{s.name}.sh"
            exports = "".join(f"export {key}={shlex.quote(value)}\n" for key, value in s.env.items())
            write_private(script, f"{exports}exec {shlex.join(s.argv)}\n")
            text += PROGRAM.format(
                name=s.name,
                command=_escape(shlex.join(["/bin/sh", str(script)])),
                priority=s.priority,
                start=START_S,
                retries=RETRIES,
                stop_wait=s.stop_wait_s,
                logs=_escape(self.logs),
                log_bytes=LOG_BYTES,
            )
        config.write_text(text)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "supervisor.supervisord", "-c", str(config)],
            env=self._env,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=(self.logs / "supervisord.err").open("wb"),
            pass_fds=[lock.fileno() for lock in self._locks],
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )

    @property
    def alive(self) -> bool:
        """Whether supervisord itself runs."""
        return self.process is not None and self.process.poll() is None

    @property
    def stop_s(self) -> float:
        """Seconds in which it has stopped or killed all services."""
        return sum(s.stop_wait_s for s in self.services) + 10.0

    def call(self, method: str, *args: Any) -> Any:
        """One XML-RPC call. Raises OSError while supervisord is not listening yet, xmlrpc.client.Fault on refusal."""
        transport = SupervisorTransport(None, None, f"unix://{self._socket}")
        with xmlrpc.client.ServerProxy("http://127.0.0.1", transport=transport) as proxy:
            return getattr(proxy.supervisor, method)(*args)

    def start_service(self, name: str) -> None:
        """Start one service without waiting until it is up."""
        self.call("startProcess", name, False)

    def states(self) -> list[State]:
        """The present state of every service."""
        return [
            State(i["name"], i["statename"], i["pid"], i["exitstatus"], i["spawnerr"])
            for i in self.call("getAllProcessInfo")
        ]

    def stop(self, timeout: float) -> bool:
        """SIGTERM to supervisord, which stops the services in reverse order; False when that took too long."""
        try:
            if self.process is not None:
                if self.process.poll() is None:
                    self.process.send_signal(signal.SIGTERM)
                self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        finally:
            shutil.rmtree(self._socket.parent, ignore_errors=True)
        return True


def _escape(value: object) -> str:
    return str(value).replace("%", "%%")  # supervisor expands %(name)s


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
