"""The routes on the port of a vLLM that is started before `hogwild up --no-vllm`."""

from pathlib import Path
from typing import Any, cast

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from pydantic import SecretStr

from hogwild.api.app import create_router
from hogwild.api.auth import digest
from hogwild.api.service import LateService, publish
from hogwild.config import Settings
from hogwild.errors import ServiceUnavailable


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    made = Settings(runtime_dir=tmp_path, served_model_name="tiny", redis_url=None)
    made.model_runtime_dir.mkdir()
    return made


def test_without_a_redis_the_answer_says_what_to_start(settings: Settings) -> None:
    app = FastAPI()
    app.include_router(create_router(settings, service=cast(Any, LateService(settings))))
    response = TestClient(app).get("/train/status")
    assert response.status_code == 503
    assert "hogwild up --no-vllm" in response.json()["detail"] and "HOGWILD_REDIS_URL" in response.json()["detail"]


def test_the_redis_of_a_later_stack_is_used_and_that_of_the_next_one_too(settings: Settings) -> None:
    late: Any = LateService(settings, ["vllm-key"])
    assert [key.name for key in late.keys] == ["vllm"]
    assert late.settings.queue_limit == settings.queue_limit
    for url in ("redis://:one@127.0.0.1:6401/0", "redis://:two@127.0.0.1:6402/0"):
        limit = int(url[-4:-2])
        publish(settings.model_copy(update={"redis_url": url, "api_key": SecretStr(url), "queue_limit": limit}))
        assert late.url == url
        assert [key.digest for key in late.keys] == [digest(url), digest("vllm-key")]
        assert late.settings.queue_limit == limit
        assert late.client.connection_pool.connection_kwargs["port"] == int(url[-6:-2])
        assert late.client is late.client
    settings.deployment_file.chmod(0o644)
    assert [key.name for key in late.keys] == ["vllm"]
    with pytest.raises(ServiceUnavailable):
        late.ledger  # noqa: B018 - a file that others could have written is not believed


def test_the_key_of_a_later_stack_guards_the_routes(settings: Settings) -> None:
    app = FastAPI()
    app.include_router(create_router(settings, service=cast(Any, LateService(settings))))
    client = TestClient(app)
    assert client.get("/train/status").status_code == 503
    redis_url = "redis://127.0.0.1:1/0"  # nothing is there: who is let in gets as far as that
    publish(settings.model_copy(update={"redis_url": redis_url, "api_key": SecretStr("sesame")}))
    assert client.get("/train/status").status_code == 401
    assert client.get("/train/status", headers={"Authorization": "Bearer sesame"}).status_code == 503
