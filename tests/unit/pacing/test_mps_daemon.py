"""The MPS daemon's life: started for one stack, reused, stopped by whoever started it; what can be said of a host.

NVIDIA's two programs are stood in for by scripts of the same command line; the real ones are tested in tests/gpu.
"""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from hogwild import mps as mps_module
from hogwild.config import Settings
from hogwild.errors import ConfigError
from hogwild.mps import CONTROL, Control, Mps, daemon_devices, probe, worker_limits

H100 = "NVIDIA H100 80GB HBM3, GPU-5c1b, Default, 9.0, Disabled"
FAKE = Path(__file__).with_name("fake_mps_control.py")


def install(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A host with one H100 and MPS installed, and no daemon; every daemon that was started is ended."""
    programs = tmp_path / "bin"
    install(programs, "nvidia-smi", f"#!/bin/sh\necho '{H100}'\n")
    install(programs, CONTROL, f"#!/bin/sh\nexec {sys.executable} {FAKE} \"$@\"\n")
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}/usr/bin{os.pathsep}/bin")
    for name in ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY", "CUDA_VISIBLE_DEVICES", "FAKE_MPS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(mps_module, "DEFAULT_PIPE_DIR", tmp_path / "default")
    monkeypatch.setattr(mps_module, "DRIVER_BIN", tmp_path / "driver")
    monkeypatch.setattr(mps_module, "SERVER_START_S", 1.0)
    monkeypatch.setattr(mps_module, "CLIENTS_GONE_S", 0.5)
    monkeypatch.setattr(mps_module, "MAX_PIPE_DIR", 150)  # no sockets are made here, and temporary paths are long
    yield programs
    for pid_file in tmp_path.rglob(f"{CONTROL}.pid"):
        try:
            os.kill(int(pid_file.read_text()), signal.SIGKILL)
        except ProcessLookupError:
            continue


def settings(tmp_path: Path, **more) -> Settings:
    return Settings(served_model_name="m", runtime_dir=tmp_path / "run", **more)


def daemon_pid(mps: Mps) -> int:
    return int((Path(mps.environment()["CUDA_MPS_PIPE_DIRECTORY"]) / f"{CONTROL}.pid").read_text())


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_stack_starts_its_own_daemon_and_stops_it(host, tmp_path):
    mps = Mps.start(settings(tmp_path))

    assert mps is not None and mps.ours
    env, pid = mps.environment(), daemon_pid(mps)
    assert env["CUDA_MPS_PIPE_DIRECTORY"].startswith(str(tmp_path / "run" / "m"))
    assert Path(env["CUDA_MPS_PIPE_DIRECTORY"]).stat().st_mode & 0o777 == 0o700
    assert alive(pid)
    mps.stop()
    assert not alive(pid)
    mps.stop()  # twice is as good as once


def test_a_daemon_that_was_running_is_used_and_left_alone(host, tmp_path, monkeypatch):
    pipe = tmp_path / "theirs"
    pipe.mkdir()
    control = Control(str(host / CONTROL), pipe, tmp_path)
    pid = control.start()
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(pipe))

    mps = Mps.start(settings(tmp_path))

    assert mps is not None and not mps.ours
    assert mps.environment()["CUDA_MPS_PIPE_DIRECTORY"] == str(pipe)
    mps.stop()
    assert alive(pid)


def test_a_system_wide_daemon_is_used(host, tmp_path):
    (tmp_path / "default").mkdir()
    Control(str(host / CONTROL), tmp_path / "default", tmp_path).start()

    mps = Mps.start(settings(tmp_path))

    assert mps is not None and not mps.ours
    assert mps.environment()["CUDA_MPS_PIPE_DIRECTORY"] == str(tmp_path / "default")


def test_stack_killed_before_it_could_stop_its_daemon(host, tmp_path):
    """Given a daemon left by a killed stack, when the next stack starts, then it takes it over and stops it."""
    left = Mps.start(settings(tmp_path))
    assert left is not None
    pid = daemon_pid(left)

    mps = Mps.start(settings(tmp_path))

    assert mps is not None and mps.ours and daemon_pid(mps) == pid
    mps.stop()
    assert not alive(pid)


def test_daemon_killed_leaves_files_that_do_not_confuse(host, tmp_path):
    first = Mps.start(settings(tmp_path))
    assert first is not None
    pid = daemon_pid(first)
    os.kill(pid, signal.SIGKILL)
    while alive(pid):
        time.sleep(0.01)

    second = Mps.start(settings(tmp_path))

    assert second is not None and second.ours and daemon_pid(second) != pid
    second.stop()


def test_a_daemon_that_is_still_used_stays(host, tmp_path, caplog):
    mps = Mps.start(settings(tmp_path))
    assert mps is not None
    pid, clients = daemon_pid(mps), Path(mps.environment()["CUDA_MPS_PIPE_DIRECTORY"]) / "clients"
    clients.write_text("777\n778")

    mps.stop()

    assert alive(pid)
    assert "processes [777, 778] still use it" in caplog.text
    clients.unlink()
    mps.stop()
    assert not alive(pid)


def test_off_starts_nothing(host, tmp_path):
    assert Mps.start(settings(tmp_path, mps="off")) is None
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("fault", "message"), [("refuse", "no device"), ("no-server", "server does not start")])
def test_mps_that_does_not_start(host, tmp_path, monkeypatch, fault, message):
    """Given MPS that fails, then auto goes on without it and on is an error that says why; nothing is left running."""
    monkeypatch.setenv("FAKE_MPS", fault)

    assert Mps.start(settings(tmp_path, mps="auto")) is None
    with pytest.raises(ConfigError, match=rf"HOGWILD_MPS is on, but .*{message}"):
        Mps.start(settings(tmp_path, mps="on"))

    assert not [p for p in tmp_path.rglob(f"{CONTROL}.pid") if alive(int(p.read_text()))]


def test_no_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(mps_module, "DRIVER_BIN", tmp_path)

    assert Mps.start(settings(tmp_path)) is None
    with pytest.raises(ConfigError, match="no NVIDIA GPU"):
        Mps.start(settings(tmp_path, mps="on"))


def test_mps_not_installed(host, tmp_path):
    (host / CONTROL).unlink()

    (finding,) = probe(settings(tmp_path))

    assert finding.status == "problem" and "not installed" in finding.message
    assert "nvidia-compute-utils" in finding.advice
    assert Mps.start(settings(tmp_path)) is None


def test_a_runtime_directory_too_long_for_sockets(host, tmp_path):
    (finding,) = probe(settings(tmp_path / ("x" * 150)))

    assert finding.status == "problem" and "HOGWILD_RUNTIME_DIR" in finding.advice


@pytest.mark.parametrize(
    ("card", "status", "words"),
    [
        ("Tesla P100, GPU-1, Default, 6.0, [N/A]", "problem", "older than Volta"),
        ("NVIDIA A100, GPU-1, Prohibited, 8.0, Disabled", "problem", "nvidia-smi -c DEFAULT"),
        ("NVIDIA A100, GPU-1, Exclusive_Process, 8.0, Disabled", "info", "only through MPS"),
        ("NVIDIA A100, GPU-1, Default, 8.0, Enabled", "info", "same instance"),
    ],
)
def test_what_a_card_allows(host, tmp_path, card, status, words):
    install(host, "nvidia-smi", f"#!/bin/sh\necho '{card}'\n")

    found = probe(settings(tmp_path))

    assert found[0].status == status and words in f"{found[0].message} {found[0].advice}"
    assert found[-1].status == "ok"


def test_probe_starts_nothing_and_sees_what_runs(host, tmp_path):
    before = probe(settings(tmp_path))
    assert [f.status for f in before] == ["ok"] and "can be started" in before[0].message
    assert not (tmp_path / "run").exists()

    mps = Mps.start(settings(tmp_path))

    assert mps is not None
    assert "is running" in probe(settings(tmp_path))[0].message
    mps.stop()


@pytest.mark.parametrize(
    ("clients", "daemon"),
    [(None, None), ("0", "0"), ("0,1", "0,1"), ("1", None), ("2,0", None), ("GPU-5c1b", "GPU-5c1b"),
     ("MIG-1,MIG-2", "MIG-1,MIG-2")],
)
def test_cards_mean_the_same_to_daemon_and_clients(clients, daemon):
    assert daemon_devices(clients) == daemon


def test_the_daemon_is_started_with_those_cards(host, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    mps = Mps.start(settings(tmp_path))
    assert mps is not None

    assert (Path(mps.environment()["CUDA_MPS_PIPE_DIRECTORY"]) / "devices").read_text() == "unset"
    mps.stop()


def test_what_limits_the_worker(host, tmp_path):
    assert worker_limits(settings(tmp_path)) == {"CUDA_MPS_CLIENT_PRIORITY": "1"}
    limited = settings(tmp_path, mps_threads=40, mps_priority="normal")
    assert worker_limits(limited) == {"CUDA_MPS_CLIENT_PRIORITY": "0", "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "40"}
    mps = Mps.start(limited)
    assert mps is not None
    assert mps.worker_environment() == {**mps.environment(), **worker_limits(limited)}
    mps.stop()
