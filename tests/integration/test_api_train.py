"""POST /train and the control of jobs over HTTP, on a real ledger."""

import json
import math
import time
from dataclasses import replace
from unittest.mock import AsyncMock

import pytest
from fastapi import APIRouter
from fastapi.testclient import TestClient

from hogwild.api.app import create_app
from hogwild.api.problems import route_class
from hogwild.tasks.ledger import Ledger
from hogwild.tasks.operations import MOST_PENDING
from hogwild.tasks.registry import ModelInfo, Registry

MODEL = ModelInfo(served_model_name="tiny", model_path="/models/tiny", vocab_size=100, max_model_len=32)
BODY = {"context_ids": [1, 2, 3], "continuation_ids": [4, 5]}


@pytest.fixture
def ledger(redis_client, settings):
    return Ledger(redis_client, settings)


@pytest.fixture
def attached(redis_client, settings):
    Registry(redis_client, settings.model_name).publish_model(MODEL)


@pytest.fixture
def client(settings, attached):
    with TestClient(create_app(settings), raise_server_exceptions=False) as http:
        yield http


def assert_problem(response, status, slug=None):
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    document = response.json()
    assert document["status"] == status and document["request_id"] == response.headers["x-request-id"]
    if slug:
        assert document["type"] == f"urn:hogwild:problem:{slug}"
    return document


def test_job_is_accepted_and_can_be_polled(client, ledger):
    options = {"steps": 3, "learning_rate": 1e-3, "scale": 1.5}
    response = client.post("/train", json={**BODY, **options, "metadata": {"a": "b"}})
    assert response.status_code == 202
    assert response.headers["location"] == f"/train/{response.json()['id']}"
    job = client.get(response.headers["location"])
    assert job.headers["retry-after"] == "1"
    shown = job.json()
    assert (shown["state"], shown["samples"], shown["tokens"], shown["metadata"]) == ("queued", 1, 5, {"a": "b"})
    assert shown["config"] == {"optimizer": "apollo", **options}
    assert shown["plan"] is None
    lease = ledger.claim(shown["id"], "w")
    [sample] = ledger.samples(lease)
    assert (list(sample.context_ids), list(sample.continuation_ids)) == ([1, 2, 3], [4, 5])
    # When the worker has planned it, the memory it takes is shown
    memory = {"optimizer": 5, "gradients": 0, "activations": 7, "working": 3, "head": 2, "embedding": 1, "cache": 0,
              "total": 20, "free": 100}
    plan = {"pack_tokens": 64, "asked_pack_tokens": 128, "asked_steps": 3, "layers": 4, "kept_layers": 2,
            "optimizer_state": 9, "memory": memory}
    ledger.planned(lease, 6, 64, plan)
    shown = client.get(f"/train/{shown['id']}").json()
    assert (shown["plan"], shown["steps"]["total"]) == (plan, 6)


def test_null_means_the_workers_default(client, ledger, redis_client, settings):
    Registry(redis_client, settings.model_name).publish_model(replace(MODEL, optimizer="sgd", learning_rate=0.123))
    options = dict.fromkeys(("optimizer", "learning_rate", "replay", "seed", "epochs", "trainable"))
    job_id = client.post("/train", json={**BODY, **options, "steps": 2}).json()["id"]
    assert ledger.get(job_id).config == {"optimizer": "sgd", "learning_rate": 0.123, "steps": 2}


@pytest.mark.parametrize(("change", "field", "pointer", "limit"), [
    ({"continuation_ids": []}, "continuation_ids", "/continuation_ids", 1),
    ({"continuation_ids": [4, 100]}, "continuation_ids", "/continuation_ids/1", 99),
    ({"context_ids": [-1]}, "context_ids", "/context_ids/0", 99),
    ({"context_ids": [10**30]}, "context_ids", "/context_ids/0", 99),
    ({"context_ids": [1] * 31}, "continuation_ids", "/continuation_ids", 32),
    ({"context_ids": [], "continuation_ids": [3]}, "context_ids", "/context_ids", 1),
    ({"weights": [1.0]}, "weights", "/weights", 2),
    ({"weights": [0, 0]}, "weights", "/weights", None),
    ({"weights": [1, -1]}, "weights", "/weights", 0),
    ({"weights": [1e-46, 1e-300]}, "weights", "/weights", None),
    ({"context_ids": [], "weights": [1, 1e-46]}, "weights", "/weights", None),
    ({"weights": [1, 1e39]}, "weights", "/weights", 1e6),
    ({"context_ids": [1.5]}, "context_ids", "/context_ids/0", None),
    ({"context_ids": ["7"]}, "context_ids", "/context_ids/0", None),
    ({"context_ids": [True]}, "context_ids", "/context_ids/0", None),
    ({"context_ids": "1,2"}, "context_ids", "/context_ids", None),
    ({"learnin_rate": 1}, "learnin_rate", "/learnin_rate", None),
    ({"learning_rate": -1}, "learning_rate", "/learning_rate", 0),
    ({"learning_rate": "1e-4"}, "learning_rate", "/learning_rate", None),
    ({"steps": 0}, "steps", "/steps", 1),
    ({"steps": 3, "epochs": 3}, "steps", "/steps", None),
    ({"steps": 1_000_001}, "steps", "/steps", 1_000_000),
    ({"steps": 1_000_000, "gradient_accumulation": 100_000}, "steps", "/steps", None),
    ({"optimizer": "adam"}, "optimizer", "/optimizer", None),
    ({"rank": 4, "optimizer": "sgd"}, "rank", "/rank", None),
    ({"scale": 1.0, "optimizer": "adamw"}, "scale", "/scale", None),
    ({"scale": 0}, "scale", "/scale", 0),
    ({"priority": 10}, "priority", "/priority", 9),
    ({"metadata": {"a": 1}}, "a", "/metadata/a", None),
    ({"metadata": {str(i): "" for i in range(17)}}, "metadata", "/metadata", 16),
    ({"samples": [BODY]}, "context_ids", "/context_ids", None),
    ({"trainable": []}, "trainable", "/trainable", 1),
])
def test_wrong_field_is_named_and_nothing_is_queued(client, ledger, change, field, pointer, limit):
    document = assert_problem(client.post("/train", json={**BODY, **change}), 422, "invalid-request")
    error = document["errors"][0]
    assert (error["field"], error["pointer"]) == (field, pointer)
    assert error["message"]
    if limit is not None:
        assert error["limit"] == limit
    assert ledger.counts()["queued"] == 0 and ledger.list().jobs == []


def test_more_epochs_than_a_plan_can_hold_are_refused(client, ledger):
    samples = {"samples": [BODY] * 101}
    document = assert_problem(client.post("/train", json={**samples, "epochs": 100_000}), 422, "invalid-request")
    assert "100,000 epochs of 101 samples" in document["detail"] and document["errors"][0]["pointer"] == "/epochs"
    assert ledger.list().jobs == []
    assert client.post("/train", json={**samples, "epochs": 99_000}).status_code == 202


def test_place_of_a_wrong_id_among_many_samples_is_named(client):
    samples = [BODY] * 5 + [{"context_ids": [1], "continuation_ids": [2, 3, 500]}]
    document = assert_problem(client.post("/train", json={"samples": samples}), 422)
    assert document["errors"][0]["pointer"] == "/samples/5/continuation_ids/2"
    assert "0 to 99" in document["detail"]


def test_a_thousand_wrong_ids_make_a_short_answer(client):
    response = client.post("/train", json={"samples": [{"continuation_ids": ["x"] * 30}] * 100})
    assert len(assert_problem(response, 422)["errors"]) <= 20
    assert len(response.content) < 10_000


@pytest.mark.parametrize("body", [{}, {"samples": []}, {"context_ids": [1]}, [], None, 7, "text"])
def test_body_without_samples_is_refused(client, body):
    assert_problem(client.post("/train", content=json.dumps(body), headers={"content-type": "application/json"}), 422)


@pytest.mark.parametrize(("content", "kind", "status"), [
    (b"{", "application/json", 422), (b'"\xff"', "application/json", 400), (b"{}", "text/plain", 415),
    (b"", "application/json", 422), (b"{}", None, 415), (b'{"continuation_ids": [NaN]}', "application/json", 422),
    (b"[" * 100_000, "application/json", 400), (b"1" * 5000, "application/json", 400),
    (b"a=b", "application/x-www-form-urlencoded", 415),
])
def test_unreadable_body_is_a_problem_document(client, content, kind, status):
    response = client.post("/train", content=content, headers={"content-type": kind} if kind else {})
    assert_problem(response, status)


def test_no_model_yet_is_said_with_a_time_to_wait(settings, redis_client):
    with TestClient(create_app(settings)) as http:
        response = http.post("/train", json=BODY)
        assert "worker" in assert_problem(response, 503, "unavailable")["detail"]
        assert int(response.headers["retry-after"]) > 0
        assert_problem(http.get("/readyz"), 503)
        assert http.get("/livez").text == "ok"
        assert http.get("/train/status").json()["model"] is None


def test_too_large_a_body_is_refused_with_or_without_a_length(settings, attached):
    small = settings.model_copy(update={"max_body_bytes": 2000})
    with TestClient(create_app(small)) as http:
        big = json.dumps({"continuation_ids": [1] * 2000}).encode()
        json_type = {"content-type": "application/json"}
        assert assert_problem(http.post("/train", content=big, headers=json_type), 413)["limit"] == 2000
        chunks = iter([big[:1500], big[1500:]])
        assert_problem(http.post("/train", content=chunks, headers=json_type), 413, "payload-too-large")


def test_too_large_an_upload_is_refused(settings, attached):
    with TestClient(create_app(settings.model_copy(update={"max_body_bytes": 2000}))) as http:
        content = b'{"prompt": "a", "completion": "b"}\n' * 200
        response = http.post("/v1/files", files={"file": ("a.jsonl", content)}, data={"purpose": "fine-tune"})
        assert_problem(response, 413, "payload-too-large")
        chunks = iter([b"--b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"a\"\r\n\r\n", content])
        response = http.post("/v1/files", content=chunks, headers={"content-type": "multipart/form-data; boundary=b"})
        assert_problem(response, 413, "payload-too-large")
        assert http.get("/v1/files").json()["data"] == []


@pytest.mark.parametrize("change", [
    '"metadata": {"\\ud800": "x"}', '"metadata": {"x": "\\udfff"}', '"\\ud800": 1', '"optimizer": "\\ud800"',
    '"trainable": ["\\ud800"]', '"metadata": {"a\\u0000b": "\\u0000"}'])
def test_half_characters_are_refused_or_taken_but_break_nothing(client, change):
    body = '{"context_ids": [1], "continuation_ids": [2], ' + change + "}"
    response = client.post("/train", content=body, headers={"content-type": "application/json"})
    assert response.status_code in (202, 422)
    for path in ("/train", "/train/status"):
        assert client.get(path).status_code == 200


def test_idempotency_key_gives_the_same_job(client, ledger):
    first = client.post("/train", json=BODY, headers={"Idempotency-Key": "k"})
    again = client.post("/train", json=BODY, headers={"Idempotency-Key": "k"})
    assert again.status_code == 202 and again.json()["id"] == first.json()["id"]
    assert again.headers["idempotency-replayed"] == "true" and "idempotency-replayed" not in first.headers
    other = client.post("/train", json={**BODY, "steps": 9}, headers={"Idempotency-Key": "k"})
    assert assert_problem(other, 422, "idempotency-conflict")["job_id"] == first.json()["id"]
    assert ledger.counts()["queued"] == 1


def test_full_queue_is_429(settings, attached):
    with TestClient(create_app(settings.model_copy(update={"queue_limit": 1}))) as http:
        assert http.post("/train", json=BODY).status_code == 202
        response = http.post("/train", json=BODY)
        assert_problem(response, 429, "too-many-requests")
        assert int(response.headers["retry-after"]) > 0


def test_control_of_jobs(client, ledger):
    job_id = client.post("/train", json=BODY).json()["id"]
    assert client.post(f"/train/{job_id}/pause").json()["paused"] is True
    assert client.post(f"/train/{job_id}/resume").json()["paused"] is False
    assert client.post(f"/train/{job_id}/cancel").json()["state"] == "cancelled"
    assert_problem(client.post(f"/train/{job_id}/pause"), 409, "conflict")
    for path in (f"/train/job-{'0' * 24}", "/train/x", "/train/job-..%2f"):
        assert_problem(client.get(path), 404)


def test_list_pages_and_filters(client):
    ids = [client.post("/train", json={**BODY, "metadata": {"n": str(n % 2)}}).json()["id"] for n in range(5)]
    client.post(f"/train/{ids[0]}/cancel")
    page = client.get("/train", params={"limit": 3}).json()
    assert [job["id"] for job in page["data"]] == ids[:1:-1] and page["has_more"]
    rest = client.get("/train", params={"limit": 3, "cursor": page["next_cursor"]}).json()
    assert [job["id"] for job in rest["data"]] == ids[1::-1] and not rest["has_more"]
    assert [job["id"] for job in client.get("/train?state=cancelled").json()["data"]] == ids[:1]
    assert [job["id"] for job in client.get("/train?metadata=n:1").json()["data"]] == [ids[3], ids[1]]
    for query in ("limit=0", "limit=101", "state=done", "cursor=x", "metadata=x"):
        assert_problem(client.get(f"/train?{query}"), 422)


@pytest.mark.parametrize(("name", "value", "query"), [
    ("a", "x\ny", {"metadata": "a:x\ny"}), ("a", "b:c", {"metadata": "a:b:c"}), ("a:b", "c", {"metadata[a:b]": "c"}),
    (":", "", {"metadata[:]": ""}), ("]", "\n", {"metadata[]]": "\n"})])
def test_every_label_that_is_taken_can_be_filtered_by(client, name, value, query):
    client.post("/train", json={**BODY, "metadata": {"other": "x"}})
    job_id = client.post("/train", json={**BODY, "metadata": {name: value}}).json()["id"]
    assert [job["id"] for job in client.get("/train", params=query).json()["data"]] == [job_id]


def test_status_shows_the_running_job_and_the_worker(client, ledger, redis_client):
    job_id = client.post("/train", json=BODY).json()["id"]
    client.post("/train", json=BODY)
    registry = Registry(redis_client, "tiny")
    registry.register_worker("w", "host")
    registry.heartbeat("w", {"host": "host", "state": "training", "weight_version": 4})
    ledger.claim(job_id, "w")
    registry.heartbeat("w", {"host": "host", "state": "training", "weight_version": 4, "loss": math.nan})
    status = client.get("/train/status").json()
    assert status["worker"]["loss"] is None
    assert status["running"]["id"] == job_id and status["queue_depth"] == 1 and status["weight_version"] == 4
    assert status["worker"]["alive"] is True and status["model"]["vocab_size"] == 100
    assert "/models" not in json.dumps(status)


def test_events_of_a_job_and_resumption_after_one(client, ledger):
    job_id = client.post("/train", json=BODY).json()["id"]
    lease = ledger.claim(job_id, "w")
    ledger.begin_step(lease, 0)
    ledger.applied(lease, 0, 1, loss=0.5, tokens=2)
    ledger.finish(lease, "succeeded")
    with client.stream("GET", f"/train/{job_id}/events") as response:
        text = "".join(response.iter_text())
    events = [dict(line.split(": ", 1) for line in block.splitlines()) for block in text.strip().split("\r\n\r\n")]
    assert [event["event"] for event in events] == ["queued", "running", "begun", "step", "succeeded"]
    assert json.loads(events[3]["data"])["loss"] == 0.5
    with client.stream("GET", f"/train/{job_id}/events", headers={"Last-Event-ID": events[3]["id"]}) as response:
        rest = "".join(response.iter_text())
    assert "succeeded" in rest and "queued" not in rest
    assert_problem(client.get(f"/train/{job_id}/events", headers={"Last-Event-ID": "x"}), 422)


def test_request_id_of_the_client_is_kept_if_it_is_sane(client):
    assert client.get("/train", headers={"X-Request-ID": "abc-1"}).headers["x-request-id"] == "abc-1"
    assert client.get("/train", headers={"X-Request-ID": "a b\t<"}).headers["x-request-id"] != "a b\t<"
    assert_problem(client.get("/nowhere"), 404)
    assert_problem(client.delete("/train"), 405)


def test_checkpoint_operations(client, redis_client):
    generations = [{"generation": 3}, {"generation": 2}]
    Registry(redis_client, "tiny").publish_checkpoint({"head": 3, "generations": generations})
    response = client.post("/checkpoint")
    assert response.status_code == 202 and response.json()["state"] == "pending"
    assert client.get(response.headers["location"]).json()["kind"] == "sync"
    assert client.post("/checkpoint/rollback", json={"generation": 2}).json()["params"] == {"generation": 2}
    assert_problem(client.post("/checkpoint/rollback", json={"generation": 9}), 422)
    assert_problem(client.post("/checkpoint/rollback", json={"generation": "2"}), 422)
    response = client.post("/checkpoint/verify")
    assert (response.status_code, response.json()["kind"]) == (202, "verify")
    assert client.get(response.headers["location"]).json()["kind"] == "verify"
    assert client.get("/checkpoint").json()["head"] == 3
    assert_problem(client.get("/checkpoint/operations/op-1"), 404)


def test_idempotency_key_gives_the_same_operation(client, redis_client):
    registry = Registry(redis_client, "tiny")
    registry.publish_checkpoint({"head": 3, "generations": [{"generation": 3}, {"generation": 2}]})

    def post(path, body=None):
        return client.post(path, json=body, headers={"Idempotency-Key": "k"})

    first = post("/checkpoint/rollback", {"generation": 2})
    registry.publish_checkpoint({"head": 4, "generations": [{"generation": 4}, {"generation": 3}]})
    again = post("/checkpoint/rollback", {"generation": 2})  # though it has made that generation leave
    assert again.status_code == 202 and again.json()["id"] == first.json()["id"]
    assert again.headers["idempotency-replayed"] == "true" and "idempotency-replayed" not in first.headers
    other = post("/checkpoint/rollback", {"generation": 3})
    assert assert_problem(other, 422, "idempotency-conflict")["operation"] == first.json()["id"]
    others = {post(path).json()["id"] for path in ("/checkpoint", "/checkpoint/verify") * 2}
    assert len(others) == 2 and first.json()["id"] not in others


def test_operations_that_nobody_does_have_a_limit(client):
    ids = [client.post("/checkpoint", headers={"Idempotency-Key": str(n)}).json()["id"] for n in range(MOST_PENDING)]
    for path in ("/checkpoint", "/checkpoint/verify"):
        response = client.post(path)
        assert_problem(response, 429, "too-many-requests")
        assert int(response.headers["retry-after"]) > 0
    assert client.post("/checkpoint", headers={"Idempotency-Key": "0"}).json()["id"] == ids[0]


def test_metrics_have_no_job_ids(client, ledger):
    job_id = client.post("/train", json=BODY).json()["id"]
    lease = ledger.claim(job_id, "w")
    ledger.begin_step(lease, 0)
    ledger.applied(lease, 0, 8, loss=0.5, tokens=2, seconds=0.3)
    text = client.get("/metrics").text
    assert 'hogwild_jobs{state="running"} 1.0' in text
    assert "hogwild_steps_applied_total 1.0" in text and "hogwild_tokens_trained_total 2.0" in text
    assert 'hogwild_step_seconds_bucket{le="0.25"} 0.0' in text and 'hogwild_step_seconds_bucket{le="0.5"} 1.0' in text
    assert "hogwild_weight_version 8.0" in text
    assert job_id not in text


def test_paused_jobs_do_not_wait_and_the_age_is_that_of_the_longest_wait(client, ledger):
    first, second, third = [client.post("/train", json=BODY).json()["id"] for _ in range(3)]
    for job_id, seconds in ((first, 3000), (second, 100), (third, 500)):  # the second was put back later
        ledger.client.hset(ledger.keys("job", job_id), "queued_at", time.time() - seconds)
    client.post(f"/train/{first}/pause")
    gauges = dict(line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if line[0] != "#")
    assert float(gauges["hogwild_queue_depth"]) == 2 and float(gauges["hogwild_queue_paused"]) == 1
    assert 500 <= float(gauges["hogwild_queue_age_seconds"]) < 600


def test_redis_away_is_503_and_not_500(settings):
    gone = settings.model_copy(update={"redis_url": "redis://127.0.0.1:1/0"})
    with TestClient(create_app(gone), raise_server_exceptions=False) as http:
        assert_problem(http.post("/train", json=BODY), 503, "unavailable")
        assert_problem(http.get("/train"), 503)
        assert http.get("/livez").status_code == 200


@pytest.mark.parametrize(("ask", "status", "slug"), [
    (lambda redis: redis.execute_command("XRANGE", "x", "no-id", "+"), 500, "internal"),
    (lambda redis: redis.eval("return redis.error_reply('MISCONF Errors writing to the AOF file')", 0), 503,
     "unavailable"),
    (lambda redis: redis.eval("return redis.error_reply('OOM command not allowed')", 0), 503, "unavailable")])
def test_question_that_redis_does_not_understand_is_a_defect(settings, redis_client, ask, status, slug):
    app = create_app(settings)
    router = APIRouter(route_class=route_class(1024, AsyncMock()))
    router.add_api_route("/asks", lambda: ask(redis_client))
    app.include_router(router)
    with TestClient(app, raise_server_exceptions=False) as http:
        assert_problem(http.get("/asks"), status, slug)
