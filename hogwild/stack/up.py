"""Bring the stack up, watch it, take it down with nothing left behind.

checks (ports, model, one stack per data directory)
  → redis → vllm, worker, api, beat, flower → ready
  ⟲ a service died: its last lines are shown, supervisor restarts it with back-off
Ctrl-C / SIGTERM → flower, beat, api, worker (last sync), vllm, redis → manifest and sockets removed
"""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import xmlrpc.client
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import httpx
import psutil
import redis as redis_client

from hogwild.api.service import publish
from hogwild.config import Settings, url_host
from hogwild.errors import ConfigError, HogwildError, ManifestError
from hogwild.manifest import Refusal, living_exports, refusal_path
from hogwild.mps import Mps
from hogwild.runtime_files import boot_id, private_dir, process_alive
from hogwild.stack import embedded_redis, services
from hogwild.stack.logs import LogFollower, tail
from hogwild.stack.supervise import State, Supervisor
from hogwild.tasks.registry import Registry

POLL_S = 0.5
LOCK = "up.lock"  # in the data directory and in the model's runtime directory
LAST_LINES = 15  # of a dead service's log
ENDS_ITSELF = {"worker"}  # its child sees that its parent was killed, saves what it trained and ends
# A worker that still refuses the weights after this long will not take them; another one, that a killed stack left
# behind, may hold them for as long as its last sync takes.
REFUSED_FOR_S = 120.0
KILLED_S = 5.0  # a process is gone this soon after SIGKILL, unless the kernel itself hangs
# Files that vLLM and the worker leave in the runtime directory; worthless once both are gone.
RUNTIME_FILES = ("rank*.json", "frontend.json", "weights.state", "pulse.state", "worker.lock", "*.stop")

Notice = Callable[[str], None]
LogLine = Callable[[str, str], None]


class StackError(HogwildError):
    """The stack could not be brought up."""


class Stack:
    """All services of one served model; a context manager that starts on enter and stops on exit."""

    def __init__(
        self, settings: Settings, *, vllm: bool = True, notice: Notice = print, log_line: LogLine | None = None
    ) -> None:
        self._vllm = vllm
        self._notice = notice
        self._log_line = log_line
        self._follower: LogFollower | None = None
        self._locks: list[IO[str]] = []
        self._mps: Mps | None = None
        self._states: dict[str, State] = {}
        self._families: dict[str, set[psutil.Process]] = {}  # service → its processes; psutil knows a recycled pid
        if vllm and settings.model is None:
            raise ConfigError(
                "Which model should vLLM serve? Name its directory: hogwild up --model DIR "
                "(or HOGWILD_MODEL). To join a vLLM that is already running: --no-vllm."
            )
        if not vllm and settings.served_model_name is None and settings.model is None:
            settings = settings.model_copy(update={"served_model_name": only_exported_model(settings.runtime_dir)})
        # The same names for every process, wherever it was started: all paths absolute, the model's name written out.
        self.settings = settings.model_copy(
            update={
                "served_model_name": settings.model_name,
                "data_dir": settings.data_dir.resolve(),
                "runtime_dir": settings.runtime_dir.resolve(),
                "checkpoint_dir": settings.model_checkpoint_dir.resolve(),
            }
        )
        self.embedded = settings.redis_url is None

    # --- up -------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start every service; returns when supervisor has launched them, not when they are ready."""
        s = self.settings
        services.check_access(s, vllm=self._vllm)
        if self._vllm:
            services.check_vllm(s)
        s.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        s.runtime_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        private_dir(s.model_runtime_dir)
        try:
            self._take_locks()
            for folder in ("redis", "beat", "flower"):
                private_dir(s.data_dir / folder)  # training text is in Redis' files
            if self._vllm:
                self._check_model()
            starts_on_card = self._vllm and services.has_gpu()
            if s.mps == "on" and not starts_on_card and not os.environ.get("CUDA_MPS_PIPE_DIRECTORY"):
                why = "vLLM starts on a CPU here" if self._vllm else "a vLLM that runs already can't be moved under it"
                raise ConfigError(
                    f"HOGWILD_MPS is on, but hogwild up can't start MPS: {why}. Start the daemon before vLLM and name "
                    "its directory to both in CUDA_MPS_PIPE_DIRECTORY, or leave HOGWILD_MPS at auto."
                )
            check_ports(services.build(s, vllm=self._vllm))  # before the model is cloned, which can take minutes
            if self._vllm:
                self._check_alone()
                self._prepare_checkpoint()
            if starts_on_card:
                self._mps = Mps.start(s)
            plan = services.build(s, vllm=self._vllm, mps=self._mps)
            redis_url = s.redis_url or embedded_redis.url(s.data_dir / "redis", s.redis_port)
            self.settings = s = s.model_copy(update={"redis_url": redis_url})
            self.supervisor = Supervisor(plan, directory=s.data_dir, env=services.environment(s), locks=self._locks)
            if self._log_line:
                self._follower = LogFollower([(p.name, self.supervisor.log_file(p.name)) for p in plan], self._log_line)
                self._follower.start()
            self.supervisor.start()
            for lock in self._locks:
                _note_heir(lock, self.supervisor)
            self._wait(lambda: bool(self.supervisor.states()), 20, "supervisord")
            if self.embedded:
                self.supervisor.start_service("redis")
            self._wait(self._redis_answers, 60, f"Redis at {_without_password(redis_url)}")
            publish(s)
            for service in plan:
                if service.name != "redis":
                    self.supervisor.start_service(service.name)
        except BaseException:
            self.stop()
            raise

    def _take_locks(self) -> None:
        s = self.settings
        self._locks.append(take_lock(
            s.data_dir / LOCK, f"A stack is already up on {s.data_dir}: stop it, or give this one a data directory of "
            "its own with --data-dir.", self._notice))  # fmt: skip
        # The manifest and the weight version are there: a second vLLM would not be trained.
        self._locks.append(take_lock(
            s.model_runtime_dir / LOCK, f"A stack already serves {s.model_name} by way of {s.runtime_dir}: stop it, or "
            "set --runtime-dir to another directory for this one.", self._notice))  # fmt: skip

    def _check_model(self) -> None:
        source = Path(self.settings.model or "")
        if not (source / "config.json").is_file():
            raise ConfigError(
                f"{source} is not a Hugging Face model directory (no config.json there). Hogwild updates "
                "the checkpoint on disk, so it needs the model's files: download it first and name the "
                "directory."
            )

    def _check_alone(self) -> None:
        """A vLLM that shares its weights under this name keeps it: training would go there, not to the one started."""
        deadline = time.monotonic() + KILLED_S
        while (other := next(living_exports(self.settings.model_runtime_dir), None)) is not None:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"Another vLLM (pid {other[1]}) shares its weights as {self.settings.model_name}: join it with "
                    "--no-vllm, stop it, or give this stack another --served-model-name."
                )
            time.sleep(0.1)

    def _prepare_checkpoint(self) -> None:
        """vLLM serves the checkpoint directory itself, so that a restarted vLLM has all that was saved."""
        source = Path(self.settings.model or "")
        target = self.settings.model_checkpoint_dir
        if not target.exists():
            self._notice(f"cloning {source} to {target}, where checkpoints will be kept")
        # In a process of its own, so that torch stays out of this one; also ends a sync that a crash cut short.
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "hogwild.stack.prepare",
                str(source.resolve()),
                str(target),
                str(self.settings.keep_last),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise ConfigError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "clone failed")

    def _redis_answers(self) -> bool:
        try:
            with redis_client.Redis.from_url(self.settings.redis_url or "", socket_timeout=2) as client:
                return bool(client.ping())
        except (redis_client.RedisError, OSError):
            return False

    def _wait(self, done: Callable[[], bool], timeout: float, what: str) -> None:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            with suppress(OSError, xmlrpc.client.Error):
                if done():
                    return
            if self.supervisor.process is not None and not self.supervisor.alive:
                raise StackError("supervisord ended: " + " ".join(tail(self.supervisor.logs / "supervisord.err", 3)))
            self._report_changes()
            time.sleep(0.1)
        raise StackError(f"{what} did not come up within {timeout:.0f} s: see {self.supervisor.logs}")

    # --- watching -------------------------------------------------------------------------------------------------

    def ready(self) -> bool:
        """Whether every service answers and the worker is attached to vLLM's weights."""
        for service in self.supervisor.services:
            if service.ready_url and not _answers(service.ready_url):
                return False
        return self._worker_attached()

    def wait_ready(self, timeout: float = 900.0, tick: Callable[[dict[str, bool]], None] | None = None) -> None:
        """Wait for `ready`, reporting deaths meanwhile; `tick` gets which services answer, once a round.

        Raises StackError after `timeout` seconds, and when vLLM's weights are refused: it would never be ready.
        """
        deadline = time.monotonic() + timeout
        refused_at = None
        while not self.ready():
            self.watch()
            refusal = None
            with suppress(ManifestError):  # damaged: what an earlier vLLM left is taken away by the one that starts
                refusal = Refusal.load(refusal_path(self.settings.model_runtime_dir))
            if refusal is not None:
                reasons = "; ".join(text for _, text in refusal.reasons)
                raise StackError(f"vLLM's weights can't be trained: {reasons}")
            weights = self._worker().get("lifecycle") or {}
            if weights.get("state") == "refused":  # it tries again meanwhile
                refused_at = refused_at or time.monotonic()
                if time.monotonic() - refused_at > REFUSED_FOR_S:
                    raise StackError(f"The worker can't train vLLM's weights: {weights.get('reason')}")
            elif weights.get("state") != "attaching":
                refused_at = None
            if tick:
                tick(self.answering())
            if time.monotonic() > deadline:
                raise StackError(f"The stack was not ready after {timeout:.0f} s: see {self.supervisor.logs}")
            time.sleep(POLL_S)

    def answering(self) -> dict[str, bool]:
        """Service name → whether it answers (or runs, for those without a port)."""
        result = {
            p.name: _answers(p.ready_url) if p.ready_url else self._running(p.name) for p in self.supervisor.services
        }
        result["worker"] = self._worker_attached()
        return result

    def _worker(self) -> dict[str, Any]:
        """What the worker that runs now says; the last words of one that was killed don't count."""
        try:
            # Not by way of the API: of a keys file only hashes are known here.
            with redis_client.Redis.from_url(self.settings.redis_url or "", socket_timeout=2) as client:
                worker = Registry(client, self.settings.model_name).worker() or {}
        except (redis_client.RedisError, OSError):
            return {}
        return worker if worker.get("alive") and psutil.pid_exists(worker.get("pid", -1)) else {}

    def _worker_attached(self) -> bool:
        return bool(self._worker().get("attached"))

    def _running(self, name: str) -> bool:
        state = self._states.get(name)
        return state is not None and state.state in {"STARTING", "RUNNING"}

    def watch(self) -> None:
        """One look at the services: reports what died. Raises StackError when supervisord itself is gone."""
        if not self.supervisor.alive:
            raise StackError("supervisord was killed; the services it left behind are being stopped.")
        self._report_changes()

    def _report_changes(self) -> None:
        try:
            states = self.supervisor.states()
        except (OSError, xmlrpc.client.Error):
            return
        for now in states:
            before = self._states.get(now.name)
            self._states[now.name] = now
            if before is not None and before.pid != now.pid and now.name not in ENDS_ITSELF:
                _kill(self._families.pop(now.name, set()))  # vLLM's engine would keep the memory from the next vLLM
            died = before is not None and before.pid and before.pid != now.pid and now.state != "STOPPING"
            if died or (now.state == "BACKOFF" and (before is None or before.state != "BACKOFF")):
                self._notice(
                    f"{now.name} ended with status {now.exit_status} {now.spawn_error}".rstrip()
                    + "; supervisor restarts it. The end of its log:"
                )
                for line in tail(self.supervisor.log_file(now.name), LAST_LINES):
                    self._notice(f"    {line}")
        self._note_families()

    def _note_families(self) -> None:
        """Remember each service's processes: once its first one was killed, nobody can tell whose the rest are."""
        names = {state.pid: name for name, state in self._states.items() if state.pid}
        below: dict[int, psutil.Process] = {}
        if self.supervisor.process is not None:
            with suppress(psutil.Error):
                supervisord = psutil.Process(self.supervisor.process.pid)
                below = {p.pid: p for p in supervisord.children(recursive=True)}
        self._families = {name: set(filter(_alive, family)) for name, family in self._families.items()}
        for process in below.values():
            with suppress(psutil.Error):
                first = process
                while first.pid not in names and (parent := below.get(first.ppid())):
                    first = parent
                # Python's resource tracker ends by itself, after it has removed the shared memory of those who died.
                if first.pid in names and not any("resource_tracker" in word for word in process.cmdline()):
                    self._families.setdefault(names[first.pid], set()).add(process)

    # --- addresses ------------------------------------------------------------------------------------------------

    @property
    def api_url(self) -> str:
        """Base URL of the API."""
        return f"http://{url_host(self.settings.api_host)}:{self.settings.api_port}"

    @property
    def vllm_url(self) -> str:
        """Base URL of vLLM as `up` starts it."""
        return f"http://{url_host(self.settings.vllm_host)}:{self.settings.vllm_port}"

    @property
    def urls(self) -> dict[str, str]:
        """Service → URL, for those with one."""
        return {p.name: p.url for p in self.supervisor.services if p.url}

    # --- down -----------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Stop every service in order and remove what only made sense while they ran. Safe to call twice.

        A second Ctrl-C or SIGTERM does not cut this short: the last checkpoint would be lost with it.
        """
        with _signals_ignored():
            self._stop()

    def _stop(self) -> None:
        supervisor = getattr(self, "supervisor", None)
        if supervisor is not None:
            self._report_changes()
            if not supervisor.stop(supervisor.stop_s):
                self._notice("supervisord does not end: killing what is left")
                supervisor.process.kill()
            self._end_leftovers()
        if self._mps:
            self._mps.stop()
            self._mps = None
        if self._follower:
            self._follower.stop()
            self._follower = None
        if len(self._locks) == 2:  # both were taken: what is there is ours
            for path in (self.settings.deployment_file, self.settings.model_runtime_dir / LOCK):
                path.unlink(missing_ok=True)
        if self._vllm and supervisor is not None:
            for pattern in RUNTIME_FILES:
                for path in self.settings.model_runtime_dir.glob(pattern):
                    path.unlink(missing_ok=True)
            with suppress(OSError):
                self.settings.model_runtime_dir.rmdir()
        for lock in self._locks:
            lock.close()
        self._locks.clear()

    def _end_leftovers(self) -> None:
        """Nothing is left when supervisord stopped the services. When it was killed, they are stopped here, in the same
        order: the worker's last sync needs what vLLM and Redis hold."""
        for service in sorted(self.supervisor.services, key=lambda service: -service.priority):
            family = {p for p in self._families.pop(service.name, set()) if _alive(p)}
            state = self._states.get(service.name)
            main = {p for p in family if state is not None and p.pid == state.pid}
            for process in list(main or family):
                with suppress(psutil.Error):
                    family.update(process.children(recursive=True))
                    process.terminate()
            _wait_gone(family, service.stop_wait_s)
            _kill(family)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _alive(process: psutil.Process) -> bool:
    """Whether that very process runs; not one that nobody collects, nor another one with its pid."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _wait_gone(processes: Collection[psutil.Process], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while any(map(_alive, processes)) and time.monotonic() < deadline:
        time.sleep(0.1)


def _kill(processes: Collection[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.Error):
            process.kill()
    _wait_gone(processes, KILLED_S)


@contextmanager
def _signals_ignored() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def take_lock(path: Path, refusal: str, notice: Notice = print) -> IO[str]:
    """Hold a lock file until it is closed, here and in the supervisord that got it.

    The supervisord of a killed `hogwild up` holds it until it has stopped the services: that is waited for.
    Raises ConfigError: another process holds it.
    """
    deadline = None
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            words = file.read().split()
            file.close()
            holder = words[0] if words else "?"
            if len(words) == 3 and _killed(up=int(words[0]), supervisord=int(words[1])):
                holder, seconds = words[1], float(words[2])
                if deadline is None:
                    deadline = time.monotonic() + seconds
                    notice(f"supervisord (process {holder}) of a hogwild up that was killed still stops its services, "
                           f"with a last checkpoint: waiting for it, for {seconds:.0f} s at most")  # fmt: skip
                if time.monotonic() < deadline:
                    time.sleep(POLL_S)
                    continue
            raise ConfigError(f"{refusal} (It is process {holder}.)") from None
        if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
            break
        file.close()  # its last holder removed it
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def _note_heir(lock: IO[str], supervisor: Supervisor) -> None:
    """Write down which supervisord holds the lock too, and for how long when this process is killed."""
    if supervisor.process is not None:
        lock.write(f" {supervisor.process.pid} {supervisor.stop_s}")
        lock.flush()


def _killed(*, up: int, supervisord: int) -> bool:
    try:
        return psutil.Process(supervisord).ppid() != up
    except psutil.Error:
        return not psutil.pid_exists(up)


def check_ports(plan: list[services.Service]) -> None:
    """Raise ConfigError naming every port that is taken and the setting that changes it."""
    taken = []
    for service in plan:
        if service.port is None:
            continue
        family = socket.AF_INET6 if ":" in service.host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((service.host, service.port))
            except OSError as error:
                option = service.port_setting.removeprefix("HOGWILD_").lower().replace("_", "-")
                taken.append(
                    f"{service.name} needs {service.host}:{service.port} ({error.strerror}): free it or choose "
                    f"another with --{option} or {service.port_setting}"
                )
    if taken:
        raise ConfigError("; ".join(taken))


def only_exported_model(runtime_dir: Path) -> str:
    """The model whose weights a running vLLM exported, when there is exactly one.

    Raises ConfigError otherwise, with what is there.
    """
    names = set()
    for path in runtime_dir.glob("*/rank0.json"):
        with suppress(OSError, ValueError, KeyError, TypeError, OverflowError):
            meta = json.loads(path.read_text())["__metadata__"]
            # What a killed vLLM left is not served.
            if meta["boot_id"] == boot_id() and process_alive(int(meta["pid"]), float(meta["process_start_time"])):
                names.add(str(meta["served_model_name"]))
    if len(names) == 1:
        return names.pop()
    if not names:
        raise ConfigError(
            f"No vLLM with the Hogwild plugin has exported weights to {runtime_dir}: start vLLM in an "
            "environment where hogwild is installed, with the same HOGWILD_RUNTIME_DIR, and wait until it "
            "serves. `hogwild doctor` shows what is wrong."
        )
    raise ConfigError(f"Several models are being served: {', '.join(sorted(names))}. Choose with --served-model-name.")


def _answers(url: str) -> bool:
    try:  # never by a proxy: these are services of this machine
        return httpx.get(url, timeout=3.0, trust_env=False).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False


def _without_password(url: str) -> str:
    head, at, tail_ = url.rpartition("@")
    return f"{head.split('://', 1)[0]}://…@{tail_}" if at else url
