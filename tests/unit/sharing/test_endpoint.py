"""The routes on vLLM's own port, on an application like vLLM's."""

import asyncio
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from hogwild.frontend import TOKEN_HEADER, Frontend
from hogwild.preflight import Problem
from hogwild.vllm_plugin.endpoint import HogwildEndpoint, api_keys
from hogwild.vllm_plugin.hooks import same_name
from hogwild.weight_state import FILE_NAME, WeightState


class Engine:
    """As much of vLLM's engine client as is used."""

    vllm_config = "config"

    def __init__(self, answer: bool) -> None:
        self.answer, self.asked = answer, 0

    async def reset_prefix_cache(self) -> bool:
        self.asked += 1
        return self.answer


class NewEngine(Engine):
    """One that can compute running requests anew."""

    def __init__(self) -> None:
        super().__init__(False)

    async def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        await super().reset_prefix_cache()
        return reset_running_requests


def serving(runtime_dir: Path, engine: Engine | None = None, **options: Any) -> tuple[TestClient, Frontend | None]:
    """An application that went through both phases of vLLM's wiring."""
    fields = {"model": "/models/m", "served_model_name": ["m"], "host": None, "port": 8000, "api_key": None, **options}
    app, args = FastAPI(), Namespace(**fields)
    app.state.args = args
    app.get("/v1/models")(lambda: {})
    plugin = HogwildEndpoint(lambda config: runtime_dir if config == "config" else Path())
    plugin.attach_router(app)
    asyncio.run(plugin.init_state(engine, app.state, args))
    return TestClient(app), Frontend.load(runtime_dir)


@pytest.fixture
def runtime_dir(tmp_path: Path) -> Path:
    return tmp_path / "m"


@pytest.mark.parametrize("answer", [True, False])
def test_the_token_resets_the_prefix_cache_and_nothing_else_does(answer: bool, runtime_dir: Path) -> None:
    engine = Engine(answer)
    client, frontend = serving(runtime_dir, engine, api_key=["secret"])
    assert frontend is not None
    for headers in ({}, {TOKEN_HEADER: ""}, {TOKEN_HEADER: "wrong"}, {"Authorization": "Bearer secret"}):
        assert client.post("/hogwild/prefix_cache/reset", headers=headers).status_code == 403
    assert engine.asked == 0
    response = client.post("/hogwild/prefix_cache/reset", headers={TOKEN_HEADER: frontend.token})
    assert response.json() == {"reset": answer}
    assert engine.asked == 1
    assert (runtime_dir / "frontend.json").stat().st_mode & 0o777 == 0o600


def test_running_requests_are_computed_anew_where_the_engine_can_and_it_was_asked_for(runtime_dir: Path) -> None:
    for engine, query, reset in (
        (NewEngine(), "?running=true", True),
        (NewEngine(), "", False),
        (Engine(False), "?running=true", False),
        (Engine(True), "?running=true", True),
    ):
        client, frontend = serving(runtime_dir, engine)
        assert frontend is not None
        headers = {TOKEN_HEADER: frontend.token}
        assert client.post(f"/hogwild/prefix_cache/reset{query}", headers=headers).json() == {"reset": reset}
        assert engine.asked == 1


def test_two_api_servers_on_one_port_take_the_same_token(runtime_dir: Path) -> None:
    first, _ = serving(runtime_dir, Engine(True))
    second, frontend = serving(runtime_dir, Engine(True))
    assert frontend is not None
    for client in (first, second):
        assert client.post("/hogwild/prefix_cache/reset", headers={TOKEN_HEADER: frontend.token}).status_code == 200


def test_a_server_without_an_engine_publishes_nothing(runtime_dir: Path) -> None:
    client, frontend = serving(runtime_dir, None)
    assert frontend is None
    assert client.post("/hogwild/prefix_cache/reset", headers={TOKEN_HEADER: ""}).status_code == 403


def test_a_server_beside_that_of_the_shared_weights_publishes_nothing(
    runtime_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, frontend = serving(runtime_dir, Engine(True))
    plugin = HogwildEndpoint(lambda _: runtime_dir, lambda _: Problem(check="same-name", message="another vLLM"))
    asyncio.run(plugin.init_state(Engine(True), None, Namespace(port=8001)))
    assert Frontend.load(runtime_dir) == frontend
    assert "another vLLM [same-name]" in caplog.text


@pytest.mark.parametrize(
    ("options", "url"),
    [
        ({}, "http://127.0.0.1:8000"),
        ({"host": "0.0.0.0"}, "http://127.0.0.1:8000"),
        ({"host": "::"}, "http://[::1]:8000"),
        ({"host": "10.0.0.7", "port": 81}, "http://10.0.0.7:81"),
        ({"host": "fe80::1"}, "http://[fe80::1]:8000"),
        ({"ssl_keyfile": "key.pem"}, "https://127.0.0.1:8000"),
        ({"root_path": "/llm/"}, "http://127.0.0.1:8000/llm"),
        ({"uds": "/run/vllm.sock"}, "http://localhost"),
    ],
)
def test_the_address_that_is_published(options: dict[str, Any], url: str, runtime_dir: Path) -> None:
    _, frontend = serving(runtime_dir, Engine(True), **options)
    assert frontend is not None
    assert frontend.url == url
    assert frontend.uds == options.get("uds")


def test_vllms_own_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert api_keys(Namespace(api_key=["a", "b", ""])) == ("a", "b")
    assert api_keys(Namespace(api_key=None)) == ()
    monkeypatch.setenv("VLLM_API_KEY", "c")
    assert api_keys(Namespace()) == ("c",)


def test_training_routes_obey_vllms_key(runtime_dir: Path) -> None:
    client, _ = serving(runtime_dir, Engine(True), api_key=["secret"])
    assert client.get("/train/status").status_code == 401
    assert client.post("/checkpoint").status_code == 401


@pytest.mark.parametrize("host", [None, "0.0.0.0", "10.0.0.7"])
def test_training_routes_are_not_open_to_the_network(
    host: str | None, runtime_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client, _ = serving(runtime_dir, Engine(True), host=host)
    assert client.post("/checkpoint").status_code == 404
    assert "Set HOGWILD_API_KEY or vLLM's --api-key" in caplog.text
    client, _ = serving(runtime_dir, Engine(True), host=host, api_key=["secret"])
    assert client.post("/checkpoint").status_code == 401


@pytest.mark.parametrize("options", [{"host": "127.0.0.1"}, {"uds": "/run/vllm.sock"}])
def test_training_routes_need_no_key_where_only_this_machine_reaches_them(
    options: dict[str, str], runtime_dir: Path
) -> None:
    client, _ = serving(runtime_dir, Engine(True), **options)
    assert client.get("/checkpoint/operations/x").headers["x-request-id"]


def test_large_json_is_for_hogwilds_own_port_files_are_not(runtime_dir: Path) -> None:
    client, _ = serving(runtime_dir, Engine(True), host="127.0.0.1", api_key=["k"])
    headers = {"Authorization": "Bearer k", "Content-Type": "application/json"}
    large = b" " * (1 << 20) + b"{}"
    for body in (large, iter([large])):  # with a length, and in chunks
        answer = client.post("/train", content=body, headers=headers)
        assert answer.status_code == 413
        detail = answer.json()["detail"]
        assert "Hogwild's own port" in detail and "HOGWILD_VLLM_MAX_JSON_BYTES" in detail
    upload = client.post("/v1/files", files={"file": ("a.jsonl", large)}, headers={"Authorization": "Bearer k"})
    assert upload.status_code != 413


def test_beside_another_vllm_of_the_name_the_routes_lead_nowhere(runtime_dir: Path) -> None:
    args = Namespace(model="/models/m", served_model_name=["m"], host="127.0.0.1", port=8001, api_key="k")
    app = FastAPI()
    app.state.args = args
    plugin = HogwildEndpoint(lambda config: runtime_dir, lambda config: same_name(4711))
    plugin.attach_router(app)
    asyncio.run(plugin.init_state(Engine(True), app.state, args))
    client = TestClient(app)
    for method, path in (("POST", "/train"), ("GET", "/train/status"), ("POST", "/checkpoint"), ("POST", "/v1/files")):
        assert client.request(method, path).status_code == 401
        answer = client.request(method, path, headers={"Authorization": "Bearer k"})
        assert answer.status_code == 409, path
        assert "pid 4711" in answer.json()["detail"] and "--served-model-name" in answer.json()["detail"]


def test_the_weight_version_is_on_every_answer_once_exported(runtime_dir: Path) -> None:
    client, _ = serving(runtime_dir, Engine(True))
    assert "x-hogwild-weight-version" not in client.get("/v1/models").headers
    client, _ = serving(runtime_dir, Engine(True))
    state = WeightState.create(runtime_dir / FILE_NAME, "0" * 32)
    state.set_version(41)
    assert client.get("/v1/models").headers["x-hogwild-weight-version"] == "41"


def test_an_application_that_breaks_every_route_is_left_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    plugin = HogwildEndpoint(lambda config: 1 / 0)
    plugin.attach_router(SimpleNamespace())  # type: ignore[arg-type]
    asyncio.run(plugin.init_state(Engine(True), None, Namespace()))
    assert "vLLM serves without" in caplog.text
