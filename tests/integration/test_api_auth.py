"""API keys and rate limits."""

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr

from hogwild.api.app import create_app
from hogwild.api.auth import new_key
from hogwild.errors import ConfigError
from hogwild.tasks.registry import ModelInfo, Registry

BODY = {"context_ids": [1], "continuation_ids": [2, 3]}


@pytest.fixture
def guarded(settings, redis_client, tmp_path):
    Registry(redis_client, "tiny").publish_model(
        ModelInfo(served_model_name="tiny", model_path="/m", vocab_size=10, max_model_len=8))
    reader, reader_line = new_key("reader", "read-only")
    writer, writer_line = new_key("writer", "read-write")
    path = tmp_path / "keys"
    path.write_text(f"# keys\n{reader_line}\n\n{writer_line}  # Alice\n")
    made = settings.model_copy(update={"api_key": SecretStr("main-key"), "api_keys_file": path})
    with TestClient(create_app(made)) as http:
        yield http, {"reader": reader, "writer": writer, "main": "main-key"}


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize("header", [{}, bearer("wrong"), bearer(""), {"Authorization": "main-key"},
                                    {"Authorization": "Basic main-key"}, {"Authorization": "Bearer"}])
@pytest.mark.parametrize(("method", "path"), [
    ("GET", "/train"), ("POST", "/train"), ("GET", "/train/status"), ("POST", "/checkpoint"), ("GET", "/metrics"),
    ("GET", "/readyz"), ("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "/v1/files"),
    ("GET", "/v1/fine_tuning/jobs")])
def test_without_a_valid_key_every_route_but_livez_is_closed(guarded, method, path, header):
    http, _ = guarded
    response = http.request(method, path, headers=header)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.headers["content-type"] == "application/problem+json"
    assert http.get("/livez").status_code == 200


def test_each_key_may_do_what_its_line_says(guarded):
    http, keys = guarded
    for name in ("main", "writer"):
        assert http.post("/train", json=BODY, headers=bearer(keys[name])).status_code == 202
    assert http.get("/train", headers=bearer(keys["reader"])).status_code == 200
    for path in ("/train", "/checkpoint", "/checkpoint/rollback"):
        assert http.post(path, json=BODY, headers=bearer(keys["reader"])).status_code == 403


def test_idempotency_keys_of_two_owners_do_not_meet(guarded):
    http, keys = guarded
    ids = {http.post("/train", json=BODY, headers={**bearer(keys[name]), "Idempotency-Key": "k"}).json()["id"]
           for name in ("main", "writer")}
    assert len(ids) == 2


@pytest.mark.parametrize("line", ["alice", "alice : all : " + "0" * 64, "alice : read-only : abc", " : read-only : x",
                                  "a : read-only : " + "0" * 64 + "\na : read-only : " + "1" * 64])
def test_wrong_keys_file_stops_the_start_and_names_the_line(settings, tmp_path, line):
    path = tmp_path / "keys"
    path.write_text("# comment\n" + line)
    with pytest.raises(ConfigError, match=r"line \d"):
        create_app(settings.model_copy(update={"api_keys_file": path}))


def test_keys_are_not_stored_in_the_clear():
    key, line = new_key("a", "read-write")
    assert key not in line


def test_too_many_requests_of_one_key_are_429_and_others_go_on(settings, redis_client, tmp_path):
    a, line_a = new_key("a", "read-only")
    b, line_b = new_key("b", "read-only")
    (tmp_path / "keys").write_text(f"{line_a}\n{line_b}\n")
    limited = settings.model_copy(update={"api_keys_file": tmp_path / "keys", "rate_limit": 60})
    with TestClient(create_app(limited)) as http:
        answers = [http.get("/train", headers=bearer(a)) for _ in range(6)]
        assert [answer.status_code for answer in answers] == [200] * 6
        while answers[-1].status_code == 200:
            assert len(answers) < 200
            answers.append(http.get("/train", headers=bearer(a)))
        assert answers[-1].status_code == 429 and int(answers[-1].headers["retry-after"]) >= 1
        assert http.get("/train", headers=bearer(b)).status_code == 200


def test_browsers_of_other_origins_are_not_let_in_unless_named(settings, redis_client):
    origin = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    with TestClient(create_app(settings)) as http:
        assert "access-control-allow-origin" not in http.options("/train", headers=origin).headers
    with TestClient(create_app(settings.model_copy(update={"cors_origins": ["https://example.org"]}))) as http:
        assert http.options("/train", headers=origin).headers["access-control-allow-origin"] == "https://example.org"


LOCAL = "http://localhost:8100"


@pytest.mark.parametrize(("headers", "status"), [
    ({}, 202), ({"Origin": LOCAL}, 202), ({"Host": "127.0.0.1:8100"}, 202), ({"Host": "[::1]:8100"}, 202),
    ({"Host": "api:8100"}, 202), ({"Host": "gpu.localhost"}, 202),
    ({"Origin": "https://ui.example.org"}, 202), ({"Host": "ui.example.org"}, 202),
    ({"Origin": "https://example.org"}, 403), ({"Origin": "null"}, 403), ({"Origin": "http://localhost:3000"}, 403),
    ({"Origin": "http://[bad"}, 403), ({"Host": "[bad"}, 403),
    ({"Host": "rebound.example.org:8100"}, 403), ({"Host": "rebound.example.org."}, 403),
    ({"Host": "rebound.example.org", "Origin": "http://rebound.example.org"}, 403)])
def test_without_keys_no_page_of_another_site_is_obeyed(settings, redis_client, headers, status):
    Registry(redis_client, "tiny").publish_model(
        ModelInfo(served_model_name="tiny", model_path="/m", vocab_size=10, max_model_len=8))
    # A page can send these without asking the server first: no body, or a form
    named = settings.model_copy(update={"cors_origins": ["https://ui.example.org"]})
    with TestClient(create_app(named), base_url=LOCAL) as http:
        response = http.post("/checkpoint", headers=headers)
        assert response.status_code == status and response.headers["x-request-id"]
        upload = http.post("/v1/files", headers=headers, data={"purpose": "fine-tune"},
                           files={"file": ("a.jsonl", b'{"prompt": "a", "completion": "b"}')})
        assert upload.status_code == (200 if status == 202 else 403)
        # And by such a name nothing is read either
        assert http.get("/metrics", headers=headers).status_code == (200 if status == 202 else 403)
        assert http.get("/livez", headers=headers).status_code == 200


def test_with_a_key_pages_may_be_of_any_site(guarded):
    http, keys = guarded
    headers = {**bearer(keys["main"]), "Origin": "https://example.org", "Host": "gpu.example.org"}
    assert http.post("/train", json=BODY, headers=headers).status_code == 202
