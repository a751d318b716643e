"""What several of the GPU tests look at."""

import subprocess
from collections.abc import Callable

import psutil
import pytest


def _query(what: str) -> list[list[str]]:
    command = ["nvidia-smi", f"--query-{what}", "--format=csv,noheader,nounits"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return [line.split(", ") for line in lines]


@pytest.fixture(scope="session")
def memory_of() -> Callable[[int], int]:
    """MiB of the GPU that a process and its children hold; where the driver knows no such process, all that is used.

    In a container the driver may list other process ids than ours, or none. Then nobody else may use the card.
    """

    def memory_of(pid: int) -> int:
        parent = psutil.Process(pid)
        family = {parent.pid, *(child.pid for child in parent.children(recursive=True))}
        mine = [int(used) for found, used in _query("compute-apps=pid,used_memory") if int(found) in family]
        return sum(mine) if mine else sum(int(used) for (used,) in _query("gpu=memory.used"))

    return memory_of
