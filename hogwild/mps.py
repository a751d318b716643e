"""NVIDIA MPS (multi-process service) for vLLM and the worker, started as an ordinary user, for this stack alone.

Without MPS the card's time is sliced between processes: while training's slice runs, no token is made. Under MPS
kernels of both run at the same time, and training can be kept to a part of the card's multiprocessors (partition.py).
What it costs serving is in docs/serving-first.md.

    off ──► nothing                         a daemon answers in $CUDA_MPS_PIPE_DIRECTORY, in this stack's directory
    auto ─► possible? ──► reuse or start        or in /tmp/nvidia-mps: it is reused, and never stopped by us
    on ───► reuse or start, else an error   none does: one is started here, and stopped with the stack

The daemon has its own pipe and log directories (`<model_runtime_dir>/mps/`), so other users of the card notice
nothing, and no setting of the card is touched (its compute mode stays what it is). A process must have these variables
before it first uses CUDA: `Mps.environment()` vLLM and the worker, `Mps.worker_environment()` the worker.

Reference: NVIDIA, "Multi-Process Service" (docs.nvidia.com/deploy/mps), tools and environment variables.
"""

import json
import logging
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, TypeVar

from hogwild.config import Settings
from hogwild.errors import ConfigError
from hogwild.runtime_files import private_dir, process_alive, process_start_time, write_private

T = TypeVar("T")
logger = logging.getLogger(__name__)

CONTROL = "nvidia-cuda-mps-control"
DEFAULT_PIPE_DIR = Path("/tmp/nvidia-mps")  # noqa: S108 - NVIDIA's own default, looked into only
DRIVER_BIN = Path("/usr/local/nvidia/bin")  # where container runtimes mount the driver's programs
# Sockets are made in the pipe directory; a Unix socket's path holds 107 characters, the longest name there takes 20.
MAX_PIPE_DIR = 107 - 20
ANSWER_S = 10.0  # a daemon that does not answer a question for this long is not usable
SERVER_START_S = 60.0  # the server makes a context on each card, slow where the driver is not persistent
CLIENTS_GONE_S = 20.0  # vLLM and the worker were stopped before: their contexts are closed within seconds


@dataclass(frozen=True)
class Finding:
    """One thing about this host, for people. `status`: ok, info, or problem (MPS can't be used)."""

    status: Literal["ok", "info", "problem"]
    message: str
    advice: str = ""


@dataclass(frozen=True, kw_only=True)
class Card:
    """One line of nvidia-smi."""

    name: str
    uuid: str
    compute_mode: str
    compute_capability: float
    mig: bool


class MpsError(ConfigError):
    """MPS can't be used here."""


class Control:
    """Talks to one control daemon through NVIDIA's program."""

    def __init__(self, program: str, pipe_dir: Path, log_dir: Path, environ: Mapping[str, str] | None = None) -> None:
        self.pipe_dir, self.log_dir = pipe_dir, log_dir
        self._program = program
        self._environ = dict(os.environ if environ is None else environ)

    def ask(self, command: str) -> str | None:
        """The daemon's answer, or None when no daemon is there to answer."""
        try:
            done = subprocess.run([self._program], input=f"{command}\n", env=self._env(), capture_output=True,
                                  text=True, timeout=ANSWER_S, check=False)
        except subprocess.TimeoutExpired:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    def start(self) -> int:
        """Start a daemon; returns its process id. Raises MpsError with what the daemon said."""
        env = self._env()
        visible = daemon_devices(env.get("CUDA_VISIBLE_DEVICES"))
        env.pop("CUDA_VISIBLE_DEVICES", None)
        if visible is not None:
            env["CUDA_VISIBLE_DEVICES"] = visible
        try:
            done = subprocess.run([self._program, "-d"], env=env, capture_output=True, text=True, timeout=ANSWER_S,
                                  check=False, start_new_session=True)
        except subprocess.TimeoutExpired as error:
            raise MpsError(f"{CONTROL} -d did not return within {ANSWER_S:.0f} s") from error
        if done.returncode:
            raise MpsError(f"{CONTROL} -d failed: {(done.stderr or done.stdout).strip() or self._log_tail()}")
        pid = _wait_for(self._pid, ANSWER_S)
        if pid is None or self.ask("get_server_list") is None:
            raise MpsError(f"the MPS daemon does not answer: {self._log_tail()}")
        return pid

    def start_server(self) -> None:
        """Have the server ready before the first client. Raises MpsError when it does not come up."""
        self.ask(f"start_server -uid {os.getuid()}")
        server = _wait_for(lambda: self.servers() or None, SERVER_START_S)
        if server is None:
            raise MpsError(f"the MPS server does not start: {self._log_tail()}")

    def servers(self) -> list[int]:
        """Process ids of the servers."""
        return _pids(self.ask("get_server_list"))

    def clients(self) -> list[int]:
        """Process ids of everybody that uses CUDA through this daemon now."""
        return [pid for server in self.servers() for pid in _pids(self.ask(f"get_client_list {server}"))]

    def _pid(self) -> int | None:
        try:
            return int((self.pipe_dir / f"{CONTROL}.pid").read_text())
        except (OSError, ValueError):
            return None

    def _env(self) -> dict[str, str]:
        return {**self._environ, "CUDA_MPS_PIPE_DIRECTORY": str(self.pipe_dir),
                "CUDA_MPS_LOG_DIRECTORY": str(self.log_dir)}

    def _log_tail(self) -> str:
        lines: list[str] = []
        for name in ("control.log", "server.log"):
            try:
                lines += (self.log_dir / name).read_text(errors="replace").splitlines()[-3:]
            except OSError:
                continue
        return " | ".join(line.strip() for line in lines) or f"nothing in {self.log_dir}"


class Mps:
    """A running daemon, ours or somebody's. Use `start`; `stop` ends it only if this stack started it."""

    RECORD = "daemon.json"  # which daemon this stack started, for the next start after a stack was killed

    def __init__(self, settings: Settings, control: Control, *, ours: bool) -> None:
        self._settings = settings
        self._control = control
        self.ours = ours

    @classmethod
    def start(cls, settings: Settings) -> Self | None:
        """Reuse or start a daemon as `settings.mps` says; None when it is off, or auto and not possible (logged).

        Raises:
            MpsError: `settings.mps` is "on" and it is not possible.
        """
        if settings.mps == "off":
            return None
        problems = [f for f in probe(settings) if f.status == "problem"]
        try:
            if problems:
                raise MpsError(" ".join(f"{f.message} {f.advice}".strip() for f in problems))
            return cls._reuse(settings) or cls._start(settings)
        except MpsError as error:
            if settings.mps == "on":
                raise MpsError(f"HOGWILD_MPS is on, but {error.message}") from error
            logger.info("no MPS: %s", error.message)
            return None

    @classmethod
    def _reuse(cls, settings: Settings) -> Self | None:
        home = _home(settings)
        for control in _candidates(settings):
            if control.ask("get_server_list") is None:
                continue
            ours = control.pipe_dir == home / "pipe" and _recorded(home) is not None
            logger.info("MPS: using the daemon in %s%s", control.pipe_dir, ", left by an earlier stack" if ours else "")
            return cls(settings, control, ours=ours)
        return None

    @classmethod
    def _start(cls, settings: Settings) -> Self:
        home = private_dir(_home(settings))
        control = Control(_program() or CONTROL, private_dir(home / "pipe"), private_dir(home / "log"))
        pid = control.start()
        write_private(home / cls.RECORD, json.dumps({"pid": pid, "process_start_time": process_start_time(pid)}))
        mps = cls(settings, control, ours=True)
        try:
            control.start_server()
        except MpsError:
            mps.stop()
            raise
        logger.info("MPS: started a daemon in %s", control.pipe_dir)
        return mps

    def environment(self) -> dict[str, str]:
        """For every process that uses the card: vLLM and the worker."""
        return {"CUDA_MPS_PIPE_DIRECTORY": str(self._control.pipe_dir),
                "CUDA_MPS_LOG_DIRECTORY": str(self._control.log_dir)}

    def worker_environment(self) -> dict[str, str]:
        """For the worker alone: `environment()` and what keeps training back."""
        return {**self.environment(), **worker_limits(self._settings)}

    def clients(self) -> list[int]:
        """Process ids of everybody that uses CUDA through this daemon now."""
        return self._control.clients()

    def stop(self) -> None:
        """Stop the daemon if this stack started it and nobody uses it any more."""
        home = _home(self._settings)
        record = _recorded(home)
        if not self.ours or record is None:
            return
        deadline = time.monotonic() + CLIENTS_GONE_S
        while (clients := self._control.clients()) and time.monotonic() < deadline:
            time.sleep(0.2)
        if clients:
            logger.warning("the MPS daemon in %s stays: processes %s still use it", self._control.pipe_dir, clients)
            return
        self._control.ask("quit")
        if _wait_for(lambda: not process_alive(*record) or None, ANSWER_S) is None:
            os.kill(record[0], signal.SIGTERM)
        (home / self.RECORD).unlink(missing_ok=True)
        self.ours = False


def worker_limits(settings: Settings) -> dict[str, str]:
    """Environment that limits the worker under MPS; without MPS it means nothing."""
    limits = {"CUDA_MPS_CLIENT_PRIORITY": "1" if settings.mps_priority == "low" else "0"}  # 1: below normal
    if settings.mps_threads is not None:
        limits["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] = str(settings.mps_threads)
    return limits


def probe(settings: Settings) -> list[Finding]:
    """What is possible on this host. Starts and changes nothing."""
    cards = _cards()
    if not cards:
        return [
            Finding(
                "problem",
                "There is no NVIDIA GPU here: MPS does not apply.",
                "On CPU the pacing governor shares the cores; nothing is to be done.",
            )
        ]
    findings = [finding for card in cards for finding in _card_findings(card)]
    if _program() is None:
        findings.append(
            Finding(
                "problem",
                f"{CONTROL} is not installed.",
                "It is part of the driver (Debian, Ubuntu: nvidia-compute-utils); in a container, mount it, or start "
                "MPS on the host and share its pipe directory and IPC namespace.",
            )
        )
        return findings
    running = next((c for c in _candidates(settings) if c.ask("get_server_list") is not None), None)
    pipe_dir = _home(settings) / "pipe"
    if running is not None:
        findings.append(Finding("ok", f"An MPS daemon is running in {running.pipe_dir}: it would be used."))
    elif len(str(pipe_dir)) > MAX_PIPE_DIR:
        findings.append(
            Finding(
                "problem",
                f"{pipe_dir} is too long for MPS's sockets ({MAX_PIPE_DIR} characters are possible).",
                "Set HOGWILD_RUNTIME_DIR to a shorter path.",
            )
        )
    else:
        findings.append(Finding("ok", f"An MPS daemon can be started in {pipe_dir}."))
    return findings


def _card_findings(card: Card) -> list[Finding]:
    findings = []
    if card.compute_capability < 7.0:
        findings.append(
            Finding(
                "problem",
                f"{card.name} is older than Volta: MPS would not keep vLLM's memory apart from the worker's.",
                "Training and serving take turns; HOGWILD_MPS=off says so.",
            )
        )
    mode = card.compute_mode.lower()
    if mode == "prohibited":
        findings.append(
            Finding(
                "problem",
                f"{card.name} is in compute mode Prohibited: nobody may use it.",
                "An administrator changes it: nvidia-smi -c DEFAULT.",
            )
        )
    elif mode == "exclusive_process":
        findings.append(
            Finding(
                "info",
                f"{card.name} is in compute mode Exclusive_Process: vLLM and the worker can share it only through MPS.",
                "HOGWILD_MPS=on makes its absence an error.",
            )
        )
    if card.mig:
        findings.append(
            Finding(
                "info",
                f"{card.name} is in MIG mode: vLLM and the worker have to be on the same instance.",
                "Set CUDA_VISIBLE_DEVICES to that instance's MIG-… identifier.",
            )
        )
    return findings


def daemon_devices(visible: str | None) -> str | None:
    """CUDA_VISIBLE_DEVICES for the daemon, given its clients'.

    The server numbers the cards it sees anew, and clients' indices then mean those numbers. Identifiers are not
    affected; indices 0, 1, … stay what they are; others would name a wrong card, so then the server sees all of them.
    """
    if visible is None:
        return None
    names = [name.strip() for name in visible.split(",")]
    stable = all(name.startswith(("GPU-", "MIG-")) for name in names) or names == [str(i) for i in range(len(names))]
    return visible if stable else None


def _home(settings: Settings) -> Path:
    return settings.model_runtime_dir / "mps"


def _program() -> str | None:
    return shutil.which(CONTROL) or shutil.which(CONTROL, path=str(DRIVER_BIN))


def _candidates(settings: Settings) -> list[Control]:
    """Where a daemon may be running already, the user's own choice first."""
    program, home = _program(), _home(settings)
    if program is None:
        return []
    named = os.environ.get("CUDA_MPS_PIPE_DIRECTORY")
    log_dir = Path(os.environ.get("CUDA_MPS_LOG_DIRECTORY", "/var/log/nvidia-mps"))
    found = [Control(program, Path(named), log_dir)] if named else []
    found.append(Control(program, home / "pipe", home / "log"))
    if not named:
        found.append(Control(program, DEFAULT_PIPE_DIR, log_dir))
    return [control for control in found if control.pipe_dir.is_dir()]


def _recorded(home: Path) -> tuple[int, float] | None:
    """(pid, start time) of the daemon this stack started, if it still runs."""
    try:
        record = json.loads((home / Mps.RECORD).read_text())
        pid, started = int(record["pid"]), float(record["process_start_time"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None
    return (pid, started) if process_alive(pid, started) else None


def _cards() -> list[Card]:
    """The cards as nvidia-smi lists them; none without it or without cards."""
    program = shutil.which("nvidia-smi") or shutil.which("nvidia-smi", path=str(DRIVER_BIN))
    if program is None:
        return []
    query = "--query-gpu=name,uuid,compute_mode,compute_cap,mig.mode.current"
    try:
        done = subprocess.run([program, query, "--format=csv,noheader"], capture_output=True, text=True,
                              timeout=ANSWER_S, check=False)
    except subprocess.TimeoutExpired:
        return []
    cards = []
    for line in done.stdout.splitlines() if done.returncode == 0 else ():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == 5:
            cards.append(Card(name=fields[0], uuid=fields[1], compute_mode=fields[2],
                              compute_capability=float(fields[3]), mig=fields[4] == "Enabled"))
    return cards


def _pids(answer: str | None) -> list[int]:
    return [int(word) for word in (answer or "").split() if word.isdigit()]


def _wait_for(look: Callable[[], T | None], seconds: float) -> T | None:
    """What `look` returns once it is something, or None after `seconds`."""
    deadline = time.monotonic() + seconds
    while (found := look()) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    return found
