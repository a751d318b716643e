"""The router on an application of somebody else, as the plugin mounts it on vLLM's."""

import pytest
from fastapi import FastAPI, HTTPException
from fastapi.testclient import TestClient
from pydantic import BaseModel

from hogwild.api.app import create_router
from hogwild.tasks.registry import ModelInfo, Registry

BODY = {"context_ids": [1], "continuation_ids": [2, 3]}


class Theirs(BaseModel):
    n: int


@pytest.fixture
def foreign(settings, redis_client):
    Registry(redis_client, "tiny").publish_model(
        ModelInfo(served_model_name="tiny", model_path="/m", vocab_size=10, max_model_len=8))
    app = FastAPI()

    @app.post("/v1/completions")
    def completions(body: Theirs) -> dict[str, int]:
        return {"n": body.n}

    @app.get("/v1/broken")
    def broken() -> None:
        raise HTTPException(418, "theirs")

    app.include_router(create_router(settings, extra_keys=["vllm-key"]))
    return TestClient(app, raise_server_exceptions=False)


def test_errors_of_the_other_application_stay_as_they_are(foreign):
    assert foreign.post("/v1/completions", json={"n": 1}).json() == {"n": 1}
    assert foreign.post("/v1/completions", json={"n": "x"}).json()["detail"][0]["loc"] == ["body", "n"]
    assert foreign.get("/v1/broken").json() == {"detail": "theirs"}
    assert foreign.get("/nowhere").json() == {"detail": "Not Found"}


def test_our_routes_answer_problems_there_too(foreign):
    headers = {"Authorization": "Bearer vllm-key"}
    assert foreign.post("/train", json=BODY, headers=headers).status_code == 202
    response = foreign.post("/train", json={**BODY, "continuation_ids": [99]}, headers=headers)
    assert response.status_code == 422 and response.headers["content-type"] == "application/problem+json"
    assert response.headers["x-request-id"]


@pytest.mark.parametrize("path", ["/train", "/train/status", "/checkpoint"])
def test_our_routes_obey_the_key_of_the_server(foreign, path):
    assert foreign.get(path).status_code == 401
    assert foreign.get(path, headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert foreign.get(path, headers={"Authorization": "Bearer vllm-key"}).status_code == 200


def test_openapi_of_the_other_application_still_builds(foreign):
    assert "/train" in foreign.get("/openapi.json").json()["paths"]
