"""`tiny_exporter.py` many times over without its imports: a process forked for each line on stdin.

A line is `MODEL_DIR RUNTIME_DIR`; the answer is `PID`, then `exported`. All of them end with this one's stdin.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))


class ExporterServer:
    """The server as a process of the caller's; `start` returns the new exporter's process id when it has exported."""

    def __init__(self, env: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answer()

    def _answer(self) -> str:
        answer = self._process.stdout.readline().strip()
        assert answer, "the exporters' server ended"
        return answer

    def start(self, model_dir: Path, runtime_dir: Path) -> int:
        self._process.stdin.write(f"{model_dir} {runtime_dir}\n")
        self._process.stdin.flush()
        pid = int(self._answer())
        assert self._answer() == "exported"
        return pid

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()


def serve() -> None:
    """Fork an exporter for each line."""
    import tiny_exporter
    from transformers import LlamaForCausalLM  # noqa: F401 - what the first exporter would import

    children: list[int] = []
    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            sys.argv[1:] = line.split()
            print(os.getpid(), flush=True)
            tiny_exporter.main()
        children.append(child)
        for ended in [pid for pid in children if os.waitpid(pid, os.WNOHANG)[0]]:
            children.remove(ended)
    for child in children:
        os.kill(child, signal.SIGKILL)


if __name__ == "__main__":
    serve()
