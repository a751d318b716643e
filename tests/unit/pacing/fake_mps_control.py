#!/usr/bin/env python3
"""Stands in for nvidia-cuda-mps-control: the same command line, files and answers, with a sleeping process as daemon.

Faults by environment: FAKE_MPS=refuse (the daemon does not start), no-server (the server never comes up).
"""

import os
import subprocess
import sys
import time
from pathlib import Path

pipe = Path(os.environ["CUDA_MPS_PIPE_DIRECTORY"])
pid_file = pipe / "nvidia-cuda-mps-control.pid"
server_file, clients_file = pipe / "server", pipe / "clients"
fault = os.environ.get("FAKE_MPS", "")


def daemon() -> int | None:
    try:
        pid = int(pid_file.read_text())
        os.kill(pid, 0)
    except (OSError, ValueError):
        return None
    state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    return None if state == "Z" else pid


if "-d" in sys.argv:
    if fault == "refuse":
        (Path(os.environ["CUDA_MPS_LOG_DIRECTORY"]) / "control.log").write_text("Failed to initialize: no device\n")
        sys.exit(1)
    if daemon():
        sys.exit("An instance of this daemon is already running")
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"], start_new_session=True,
                             stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    pid_file.write_text(str(child.pid))
    (pipe / "devices").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "unset"))
    sys.exit(0)

command = sys.stdin.readline().split()
if daemon() is None:
    print("Cannot find MPS control daemon process", file=sys.stderr)
    sys.exit(1)
if command[0] == "start_server" and fault != "no-server":
    server_file.write_text("4242")
elif command[0] == "get_server_list" and server_file.exists():
    print(server_file.read_text())
elif command[0] == "get_client_list" and clients_file.exists():
    print(clients_file.read_text())
elif command[0] == "quit":
    pid = daemon()
    os.kill(pid, 15)
    while daemon():
        time.sleep(0.01)
    for path in (pid_file, server_file, clients_file):
        path.unlink(missing_ok=True)
