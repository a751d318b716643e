"""The routes on the port of a vLLM that is started before `hogwild up --no-vllm`."""

from pathlib import Path
from typing import Any, cast

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from hogwild.api.app import create_router
from hogwild.api.service import LateService
from hogwild.config import Settings
from hogwild.errors import ServiceUnavailable
from hogwild.runtime_files import write_private


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
    for url in ("redis://:one@127.0.0.1:6401/0", "redis://:two@127.0.0.1:6402/0"):
        write_private(settings.redis_url_file, url)
        assert late.url == url
        assert late.client.connection_pool.connection_kwargs["port"] == int(url[-6:-2])
        assert late.client is late.client
    settings.redis_url_file.chmod(0o644)
    with pytest.raises(ServiceUnavailable):
        late.ledger  # noqa: B018 - a file that others could have written is not believed
