"""Clients of vLLM learn which weights answered, in plain responses and in streams."""

import asyncio

import httpx
import pytest
from fastapi import FastAPI, HTTPException
from fastapi.responses import StreamingResponse

from hogwild.vllm_plugin.version_header import HEADER, REQUEST_HEADER, RETRY_S, VersionSource, WeightVersionHeader
from hogwild.weight_state import WeightState


@pytest.fixture
def state(tmp_path):
    state = WeightState.create(tmp_path / "weights.state", "ab" * 16)
    state.set_version(7)
    return state


def make_app(tmp_path, state=None) -> FastAPI:
    app = FastAPI()

    @app.post("/v1/completions")
    async def completions(steps: int = 0) -> dict[str, str]:
        for _ in range(steps):  # training goes on while this answer is generated
            state.begin()
            state.applied()
        return {"text": "Paris"}

    @app.post("/v1/chat/completions")
    async def chat() -> StreamingResponse:
        async def tokens():
            for i in range(3):
                yield f"data: {i}\n\n"
                state.begin()
                state.applied()
                await asyncio.sleep(0)

        return StreamingResponse(tokens(), media_type="text/event-stream")

    @app.get("/v1/models/{name}")
    async def model(name: str) -> None:
        raise HTTPException(404, f"no {name}")

    @app.get("/train/status")
    async def status() -> dict[str, int]:
        return {}

    app.add_middleware(WeightVersionHeader, source=VersionSource(tmp_path))
    return app


def client(app: FastAPI, root_path: str = "") -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app, root_path=root_path), base_url="http://vllm")


async def test_an_answer_carries_the_version_that_gave_it(tmp_path, state):
    async with client(make_app(tmp_path, state)) as http:
        response = await http.post("/v1/completions")

    assert response.json() == {"text": "Paris"}
    assert response.headers[HEADER] == response.headers[REQUEST_HEADER] == "7"


async def test_steps_during_an_answer_show_as_a_range(tmp_path, state):
    async with client(make_app(tmp_path, state)) as http:
        response = await http.post("/v1/completions", params={"steps": 3})

    assert (response.headers[REQUEST_HEADER], response.headers[HEADER]) == ("7", "10")


async def test_a_stream_carries_the_version_it_started_with_and_stays_a_stream(tmp_path, state):
    app, sent = make_app(tmp_path, state), []

    received = [{"type": "http.request", "body": b"", "more_body": False}]

    async def receive():
        return received.pop() if received else await asyncio.Event().wait()  # the client stays

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": [], "query_string": b"",
             "root_path": "", "scheme": "http", "server": ("vllm", 80), "asgi": {"version": "3.0"}}
    await app(scope, receive, send)

    headers = dict(sent[0]["headers"])
    assert headers[HEADER.lower().encode()] == b"7"
    assert [m["body"] for m in sent[1:4]] == [b"data: 0\n\n", b"data: 1\n\n", b"data: 2\n\n"]  # not gathered into one
    assert state.version == 10


async def test_other_routes_and_errors_carry_none(tmp_path, state):
    async with client(make_app(tmp_path, state)) as http:
        status, missing = await http.get("/train/status"), await http.get("/v1/models/x")

    assert missing.status_code == 404
    assert HEADER not in status.headers and HEADER not in missing.headers


async def test_behind_a_root_path(tmp_path, state):
    async with client(make_app(tmp_path, state), root_path="/proxy") as http:
        response = await http.post("/proxy/v1/completions")

    assert response.headers[HEADER] == "7"


async def test_weights_exported_after_the_first_request(tmp_path, monkeypatch):
    app = make_app(tmp_path)
    async with client(app) as http:
        assert HEADER not in (await http.post("/v1/completions")).headers
        state = WeightState.create(tmp_path / "weights.state", "cd" * 16)
        monkeypatch.setattr("hogwild.vllm_plugin.version_header.time.monotonic", lambda: 1e12)
        response = await http.post("/v1/completions")

    assert response.headers[HEADER] == "0"
    state.close()


def test_a_broken_state_file_never_breaks_serving_and_is_said_once(tmp_path, caplog, monkeypatch):
    (tmp_path / "weights.state").write_bytes(b"junk")
    clock = [0.0]
    monkeypatch.setattr("hogwild.vllm_plugin.version_header.time.monotonic", lambda: clock[0])
    source = VersionSource(tmp_path)

    for _ in range(3):
        assert source.read() is None
        clock[0] += RETRY_S

    assert len(caplog.messages) == 1 and "responses carry no weight version" in caplog.messages[0]


async def test_websockets_and_lifespan_pass_through(tmp_path, state):
    seen = []

    async def inner(scope, receive, send):
        seen.append(scope["type"])

    middleware = WeightVersionHeader(inner, VersionSource(tmp_path))
    for kind in ("websocket", "lifespan"):
        await middleware({"type": kind, "path": "/v1/realtime"}, None, None)

    assert seen == ["websocket", "lifespan"]
