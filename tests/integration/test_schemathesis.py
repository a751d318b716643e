"""Thousands of generated requests, valid and not: no 5xx, and every answer is one that the OpenAPI document names.

More cases: HOGWILD_SCHEMATHESIS_EXAMPLES=1000.
"""

import os

import pytest
import schemathesis
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from schemathesis import GenerationMode, checks

from hogwild.api.app import create_app
from hogwild.config import Settings
from hogwild.tasks.registry import ModelInfo, Registry

EXAMPLES = int(os.environ.get("HOGWILD_SCHEMATHESIS_EXAMPLES", "50"))
CHECKS = [checks.status_code_conformance, checks.content_type_conformance, checks.response_headers_conformance,
          checks.response_schema_conformance, checks.unsupported_method, checks.negative_data_rejection]
# Streams of jobs that wait never end; they have tests of their own.
ENDLESS = "GET /train/{job_id}/events"


def operations(app):
    """The API's operations by name. Nothing is connected: the document needs no Redis."""
    schema = schemathesis.openapi.from_dict(app.openapi())
    schema.app = app
    return {found.ok().label: found.ok() for found in schema.get_all_operations()}


def can_be_invalid(definition):
    """Whether anything but the path can be wrong: a body, or parameters of the query or headers."""
    return "requestBody" in definition or any(p["in"] != "path" for p in definition.get("parameters", ()))


BARE = create_app(Settings(redis_url="redis://127.0.0.1:1/0"))
NAMES = sorted(set(operations(BARE)) - {ENDLESS})


@pytest.fixture
def app(settings, redis_client):
    Registry(redis_client, "tiny").publish_model(
        ModelInfo(served_model_name="tiny", model_path="/m", vocab_size=2**31 - 1, max_model_len=10**6,
                  vllm_url="http://127.0.0.1:1"))
    return create_app(settings)


def test_every_operation_is_tested():
    assert len(NAMES) >= 25 and {"POST /train", "POST /v1/files", "POST /v1/fine_tuning/jobs"} <= set(NAMES)


CASES = [(name, mode) for name in NAMES for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
         if mode is GenerationMode.POSITIVE or can_be_invalid(operations(BARE)[name].definition.raw)]


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_no_request_makes_a_server_error(app, name, mode):
    operation = operations(app)[name]

    @given(case=operation.as_strategy(generation_mode=mode))
    @hypothesis_settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
                         suppress_health_check=list(HealthCheck))
    def check(case):
        if "wait" in (case.query or {}):
            case.query["wait"] = 0  # there is no worker to wait for
        response = case.call()
        # 503 is an answer that is promised: fine-tuning needs a vLLM, and there is none here.
        assert response.status_code < 500 or response.status_code == 503, (response.status_code, response.text)
        case.validate_response(response, checks=CHECKS)

    check()
