"""Model and worker in Redis; and whether that Redis can lose jobs."""

import pytest
import redis

from hogwild.errors import AlreadyAttached, ServiceUnavailable
from hogwild.tasks.persistence import check
from hogwild.tasks.registry import ModelInfo, Registry


@pytest.fixture
def registry(redis_client):
    return Registry(redis_client, "tiny")


def test_model_that_never_came_is_said(registry):
    with pytest.raises(ServiceUnavailable, match="tiny") as caught:
        registry.model()
    assert caught.value.details["retry_after"] > 0


def test_model_stays_known_when_its_worker_is_gone(registry):
    info = ModelInfo(served_model_name="tiny", model_path="/m", vocab_size=7, max_model_len=9)
    registry.publish_model(info)
    registry.register_worker("w", "h")
    registry.unregister_worker("w")
    assert registry.model() == info
    assert registry.worker()["alive"] is False


def test_model_of_a_newer_worker_is_read_without_what_is_unknown(redis_client, registry):
    redis_client.set(registry.keys("model"), '{"served_model_name": "tiny", "model_path": "/m", "vocab_size": 7, '
                     '"max_model_len": 9, "colour": "green"}')
    assert registry.model().vocab_size == 7


def test_second_host_is_refused_and_same_host_takes_over(registry):
    registry.register_worker("w1", "host-a")
    with pytest.raises(AlreadyAttached, match="host-a"):
        registry.register_worker("w2", "host-b")
    registry.register_worker("w3", "host-a")
    assert registry.worker()["worker_id"] == "w3"
    registry.unregister_worker("w3")
    registry.register_worker("w2", "host-b")


def levels(client):
    return {finding.subject: finding.level for finding in check(client)}


def test_redis_that_can_lose_jobs_is_named(own_redis):
    server = own_redis(options=("--enable-debug-command", "no"))
    with redis.Redis.from_url(server.url) as client:
        assert set(levels(client).values()) == {"ok"}
        client.config_set("appendfsync", "everysec")
        assert levels(client)["appendfsync"] == "warning"
        client.config_set("appendonly", "no")
        assert levels(client)["appendonly"] == "error"
        client.config_set("maxmemory-policy", "allkeys-lru")
        assert levels(client)["maxmemory-policy"] == "ok"  # without a limit nothing is evicted
        client.config_set("maxmemory", "100mb")
        assert levels(client)["maxmemory-policy"] == "error"
