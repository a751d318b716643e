"""What the worker asks of vLLM goes to the address at which it reaches it."""

import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from hogwild.config import Settings
from hogwild.frontend import TOKEN_HEADER, Frontend
from hogwild.tasks.runtime import Runtime


@pytest.fixture
def vllm() -> Iterator[tuple[str, list[tuple[str, str | None]]]]:
    """The URL of a vLLM, and what it was asked with which token."""
    asked: list[tuple[str, str | None]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers[TOKEN_HEADER]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"reset": true}')

        do_POST = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,)).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


@pytest.mark.parametrize("published", [{"url": "http://127.0.0.1:1"}, {"url": "http://localhost", "uds": "/gone.sock"}])
def test_vllm_url_counts_for_the_prefix_cache_and_the_metrics(vllm, published: dict[str, Any], tmp_path: Path) -> None:
    url, asked = vllm
    settings = Settings(
        served_model_name="m", runtime_dir=tmp_path, redis_url="redis://127.0.0.1:1", vllm_url=url, data_dir=tmp_path
    )
    settings.model_runtime_dir.mkdir(mode=0o700, parents=True)
    started = psutil.Process().create_time()
    Frontend(pid=os.getpid(), process_start_time=started, token="t", **published).write(settings.model_runtime_dir)
    runtime = Runtime(settings, stop_file=tmp_path / "stop")
    assert runtime.prefix_cache.reset(patience_s=0)
    assert runtime._vllm_metrics()
    assert asked == [("/hogwild/prefix_cache/reset", "t"), ("/metrics", "t")]
