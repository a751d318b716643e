"""Processes for the tests of sharing, forked from a server that has imported torch and transformers already."""

import contextlib
import io
import multiprocessing
import os
import runpy
import sys
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

EXPORTER = next(Path(__file__).parents[1].rglob("tiny_exporter.py"))
HEAD = """
import os, signal, torch
from pathlib import Path
from hogwild.gpu_worker.attach import attach
from hogwild.gpu_worker.model import build_model
"""

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["torch", "transformers.models.llama.modeling_llama", "hogwild.gpu_worker.model"])


def _export(checkpoint: str, runtime_dir: str) -> None:
    sys.argv = [str(EXPORTER), checkpoint, runtime_dir]
    runpy.run_path(str(EXPORTER), run_name="__main__")


def _run(code: str, names: dict[str, Any], pipe: Connection) -> None:
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            exec(HEAD + code, dict(names))
        pipe.send((out.getvalue(), ""))
    except Exception:
        pipe.send((out.getvalue(), traceback.format_exc()))


class Exporter:
    """A process that exports as vLLM does; ready when this returns."""

    def __init__(self, checkpoint: Path, runtime_dir: Path) -> None:
        front = runtime_dir / "frontend.json"
        before = front.stat().st_ino if front.exists() else 0
        self.process = context.Process(target=_export, args=(str(checkpoint), str(runtime_dir)), daemon=True)
        self.process.start()
        deadline = time.monotonic() + 180
        while not front.exists() or front.stat().st_ino == before:
            if not self.process.is_alive() or time.monotonic() > deadline:
                raise RuntimeError("the exporter did not come up")
            time.sleep(0.01)

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.join()


def elsewhere(code: str, **names: Any) -> tuple[str, str]:
    """Run code in another process: (what it printed, its traceback); both empty when it was killed."""
    ours, theirs = context.Pipe()
    process = context.Process(target=_run, args=(code, names, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        result: tuple[str, str] = ours.recv()
    except EOFError:
        result = ("", "")
    process.join()
    return result


def own_files() -> int:
    """Open file descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))
