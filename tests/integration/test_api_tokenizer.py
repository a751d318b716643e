"""Asking a vLLM on this machine for token ids, whatever the environment says about proxies and certificates."""

import json
import shutil
import ssl
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from fastapi import FastAPI

from hogwild.api.jsonl import Completion
from hogwild.api.tokenizer import Tokenizer


async def assert_tokenises(url):
    async with Tokenizer(url) as vllm:
        [(line, sample)] = await vllm.samples([Completion(1, "a", "b")])
    assert (line, list(sample.context_ids) + list(sample.continuation_ids)) == (1, [7, 8])


async def test_no_proxy_is_asked_on_this_machine(serve, monkeypatch):
    app = FastAPI()

    @app.post("/tokenize")
    def tokenize(body: dict[str, str]) -> dict[str, list[int]]:
        return {"tokens": [7, 8][:len(body["prompt"])]}

    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    await assert_tokenises(serve(app))


class Answer(BaseHTTPRequestHandler):
    def do_POST(self):
        prompt = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["prompt"]
        content = json.dumps({"tokens": [7, 8][:len(prompt)]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
async def test_certificate_of_a_vllm_on_this_machine_is_not_checked(tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
                    "/CN=vllm.example.org", "-keyout", str(key), "-out", str(certificate)], check=True,
                   capture_output=True)
    server = HTTPServer(("127.0.0.1", 0), Answer)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        await assert_tokenises(f"https://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()
