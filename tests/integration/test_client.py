"""The Python client and the command line, against the real API."""

import asyncio
import contextlib
import json
import os
import threading
import time

import pytest
import typer
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from typer.testing import CliRunner

from hogwild.api.app import create_app
from hogwild.cli import jobs as commands
from hogwild.client import AsyncClient, Client
from hogwild.config import load_settings
from hogwild.errors import CheckpointError, Conflict, InvalidRequest, NotFound, ServiceUnavailable, TooManyRequests
from hogwild.frontend import Frontend
from hogwild.runtime_files import private_dir, process_start_time
from hogwild.tasks.ledger import Ledger
from hogwild.tasks.operations import Operations
from hogwild.tasks.registry import ModelInfo, Registry

IDS = {"context_ids": [1, 2], "continuation_ids": [3, 4]}


@pytest.fixture
def ledger(redis_client, settings):
    return Ledger(redis_client, settings)


@pytest.fixture
def app(settings, redis_client):
    Registry(redis_client, "tiny").publish_model(
        ModelInfo(served_model_name="tiny", model_path="/m", vocab_size=100, max_model_len=32))
    return create_app(settings)


@pytest.fixture
def url(serve, app):
    return serve(app)


@pytest.fixture
def client(url):
    with Client(url, retries=2) as made:
        yield made


def in_background(function, *args, **options):
    thread = threading.Thread(target=function, args=args, kwargs=options)
    thread.start()
    return thread


def test_a_job_from_submit_to_end(client, ledger, run_job):
    job = client.train(samples=[IDS, ([5], [6, 7]), ([5], [6, 7], [0, 1])], steps=4, metadata={"a": "b"})
    assert (job.state, job.samples, job.tokens, job.final) == ("queued", 3, 10, False)
    worker = in_background(run_job, ledger, job.id)
    done = client.wait(job.id, timeout=60, poll=0.02, progress=True)
    worker.join()
    assert (done.state, done.steps, done.steps_applied, done.metadata) == ("succeeded", 4, 4, {"a": "b"})
    assert (done.weight_version_first, done.weight_version_last) == (11, 14)
    assert client.losses(job.id) == pytest.approx([2.0, 1.0, 2 / 3, 0.5], rel=1e-4)
    assert [event.type for event in client.events(job.id)] == ["queued", "running", "begun", *["step"] * 4, "succeeded"]


def test_events_arrive_while_the_job_runs(client, ledger, run_job):
    job = client.train(**IDS)
    stream = client.events(job.id)
    assert next(stream).type == "queued"
    worker = in_background(run_job, ledger, job.id, steps=2)
    rest = list(stream)
    worker.join()
    assert [event.type for event in rest] == ["running", "begun", "step", "step", "succeeded"]
    assert rest[2].data["loss"] == 2.0 and 0 <= time.time() - rest[2].time < 60
    assert [event.id for event in client.events(job.id, after=rest[2].id)] == [event.id for event in rest[3:]]


class EndsEarly:
    """Closes event streams after their first two events, as a server that restarts does."""

    def __init__(self, app, times):
        self.app, self.times = app, times

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http" or not scope["path"].endswith("/events") or self.times == 0:
            await self.app(scope, receive, send)
            return
        self.times -= 1
        count = 0

        async def some(message):
            nonlocal count
            if message["type"] == "http.response.body" and b"event:" in message.get("body", b""):
                count += 1
                if count > 2:
                    raise ConnectionResetError
            await send(message)

        with contextlib.suppress(Exception):
            await self.app(scope, receive, some)
        await send({"type": "http.response.body", "body": b""})


def test_events_go_on_after_streams_that_end_early(serve, app, ledger, run_job):
    with Client(serve(EndsEarly(app, 2)), retries=3) as client:
        job = client.train(**IDS)
        run_job(ledger, job.id, steps=3)
        seen = list(client.events(job.id))
        assert [event.type for event in seen] == ["queued", "running", "begun", *["step"] * 3, "succeeded"]
        assert list(client.events(job.id, after=seen[-1].id)) == []


def test_control_and_lists(client):
    ids = [client.train(**IDS, metadata={"n": str(n)}).id for n in range(5)]
    assert client.pause(ids[0]).paused and not client.resume(ids[0]).paused
    assert client.cancel(ids[0]).state == "cancelled"
    assert [job.id for job in client.jobs(page_size=2)] == ids[::-1]
    assert [job.id for job in client.jobs(state="cancelled")] == ids[:1]
    assert [job.id for job in client.jobs(metadata={"n": "3"})] == [ids[3]]
    assert client.status()["queue_depth"] == 4


def test_errors_come_as_the_classes_that_the_server_raised(client):
    with pytest.raises(InvalidRequest, match="vocabulary") as caught:
        client.train(context_ids=[1], continuation_ids=[100])
    assert caught.value.details["errors"][0]["limit"] == 99
    with pytest.raises(NotFound):
        client.job(f"job-{'0' * 24}")
    job = client.train(**IDS)
    client.cancel(job.id)
    with pytest.raises(Conflict):
        client.pause(job.id)


def test_nobody_there_is_said(tmp_path):
    with Client("http://127.0.0.1:1", retries=1) as client, pytest.raises(ServiceUnavailable, match="hogwild up"):
        client.status()


async def test_no_proxy_is_asked_for_an_api_on_this_machine(url, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    for here in (url, url.replace("127.0.0.1", "localhost")):
        with Client(here, retries=0) as client:
            assert client.status()["queue_depth"] == 0
        async with AsyncClient(here, retries=0) as client:
            assert (await client.status())["queue_depth"] == 0


class Flaky:
    """Fails the first requests of each kind: 503 before anything happened, or after the job was accepted."""

    def __init__(self, app, failures):
        self.app, self.failures = app, list(failures)

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http" or not self.failures:
            await self.app(scope, receive, send)
            return
        kind = self.failures.pop(0)
        if kind == "lost answer":
            async def nowhere(_):
                return None
            await self.app(scope, receive, nowhere)
        answer = JSONResponse({"type": "urn:hogwild:problem:unavailable", "detail": "not now"}, 503,
                              {"Retry-After": "0"})
        await answer(scope, receive, send)


@pytest.mark.parametrize("failures", [["refused", "refused"], ["lost answer"], ["lost answer", "refused"]])
def test_submit_is_repeated_and_makes_one_job(serve, app, ledger, failures):
    with Client(serve(Flaky(app, failures)), retries=3) as client:
        job = client.train(**IDS)
    assert [found.id for found in ledger.list().jobs] == [job.id]


@pytest.mark.parametrize("ask", [lambda client: client.checkpoint(wait=False), lambda client: client.verify(wait=False),
                                 lambda client: client.rollback(0, wait=False)])
def test_operation_is_repeated_and_done_once(serve, app, ledger, redis_client, ask):
    operations = Operations(redis_client, ledger.messages, "tiny")
    with Client(serve(Flaky(app, ["lost answer", "refused"])), retries=3) as client:
        first, second = ask(client), ask(client)
    assert [op.id for op in operations.pending()] == [first["id"], second["id"]]


async def test_asynchronous_operation_is_repeated_and_done_once(serve, app, ledger, redis_client):
    async with AsyncClient(serve(Flaky(app, ["lost answer"])), retries=3) as client:
        asked = await client.rollback(0, wait=False)
    assert [op.id for op in Operations(redis_client, ledger.messages, "tiny").pending()] == [asked["id"]]


def test_full_queue_is_raised_after_the_retries(serve, settings, app):
    with Client(serve(create_app(settings.model_copy(update={"queue_limit": 1}))), retries=0) as client:
        client.train(**IDS)
        with pytest.raises(TooManyRequests) as caught:
            client.train(**IDS)
    assert caught.value.details["retry_after"] > 0


def serve_operations(operations, report, error=None):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for op in operations.pending():
            operations.finish(operations.start(op), report, error)
            return
        time.sleep(0.02)


def test_save_and_rollback_wait_for_the_worker(client, ledger, redis_client):
    operations = Operations(redis_client, ledger.messages, "tiny")
    worker = in_background(serve_operations, operations, {"generation": 7, "bytes_written": 4096})
    assert client.checkpoint() == {"generation": 7, "bytes_written": 4096}
    worker.join()
    worker = in_background(serve_operations, operations, {"ok": True})
    assert client.verify() == {"ok": True}
    worker.join()
    worker = in_background(serve_operations, operations, None, NotFound("no generation 3"))
    with pytest.raises(CheckpointError, match="no generation 3"):
        client.rollback(3)
    worker.join()
    assert client.checkpoint(wait=False)["state"] == "pending"


def test_waiting_for_a_worker_ends_after_a_timeout_and_names_what_stays_queued(client, ledger, redis_client):
    operations = Operations(redis_client, ledger.messages, "tiny")
    for ask in (client.checkpoint, client.verify, lambda **options: client.rollback(0, **options)):
        with pytest.raises(TimeoutError, match=r"op-[0-9a-f]{24} is pending after 0.1 s; it stays queued") as caught:
            ask(timeout=0.1)
        op_id = str(caught.value).split()[0]
        assert client.operation(op_id, wait=False)["state"] == "pending"
        worker = in_background(serve_operations, operations, {"generation": 1})
        assert client.operation(op_id, timeout=60) == {"generation": 1}
        worker.join()
        with pytest.raises(Conflict):
            client.cancel_operation(op_id)
    assert client.cancel_operation(client.checkpoint(wait=False)["id"])["error"]["type"] == "cancelled"
    with pytest.raises(NotFound):
        client.cancel_operation("op-1")


async def test_asynchronous_waiting_for_a_worker_ends_after_a_timeout(url):
    async with AsyncClient(url, retries=1) as client:
        for ask in (client.checkpoint(timeout=0.1), client.verify(timeout=0.1), client.rollback(0, timeout=0.1)):
            with pytest.raises(TimeoutError, match="stays queued") as caught:
                await ask
        op_id = str(caught.value).split()[0]
        assert (await client.operation(op_id, wait=False))["kind"] == "rollback"
        assert (await client.cancel_operation(op_id))["state"] == "failed"


async def test_asynchronous_client_does_the_same(url, ledger, run_job, redis_client):
    async with AsyncClient(url, retries=1) as client:
        job = await client.train(**IDS, steps=2)
        worker = asyncio.create_task(asyncio.to_thread(run_job, ledger, job.id, steps=2))
        kinds = [event.type async for event in client.events(job.id)]
        await worker
        assert kinds == ["queued", "running", "begun", "step", "step", "succeeded"]
        assert (await client.wait(job.id, timeout=60)).state == "succeeded"
        assert [found.id async for found in client.jobs()] == [job.id]
        assert await client.losses(job.id) == pytest.approx([2.0, 1.0])
        with pytest.raises(NotFound):
            await client.pause(f"job-{'0' * 24}")
        waiting = (await client.train(**IDS)).id
        assert (await client.pause(waiting)).paused and not (await client.resume(waiting)).paused
        assert (await client.cancel(waiting)).state == "cancelled"
        with pytest.raises(TimeoutError):
            await client.wait((await client.train(**IDS)).id, timeout=0.1, poll=0.05)
        operations = Operations(redis_client, ledger.messages, "tiny")
        for call in (client.checkpoint(), client.verify(), client.rollback(1)):
            worker = in_background(serve_operations, operations, {"generation": 1})
            assert (await call)["generation"] == 1
            worker.join()
        assert (await client.status())["model"]["vocab_size"] == 100
        assert (await client.generations())["unsaved_steps"] == 0


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture
def cli(url, monkeypatch):
    app = typer.Typer()
    commands.register(app)
    monkeypatch.setenv("HOGWILD_URL", url)

    def run(*arguments, **options):
        result = CliRunner().invoke(app, list(arguments), catch_exceptions=False, **options)
        assert result.exit_code == 0, result.output
        return result.stdout

    return run


@pytest.fixture
def tokenizer_url(serve):
    app = FastAPI()

    @app.post("/tokenize")
    async def tokenize(request: Request):
        body = await request.json()
        text = body.get("prompt")
        if text is None:
            text = "".join(f"<{m['role'][0]}>{m['content']}</>" for m in body["messages"])
            text += "<a>" if body["add_generation_prompt"] else ""
        return {"tokens": [ord(c) % 100 for c in text]}

    return serve(app)


def test_train_on_text_from_the_shell(cli, ledger, tokenizer_url):
    out = cli("train", "--prompt", "2+2=", "--completion", "4", "--vllm", tokenizer_url, "--detach", "--steps", "3",
              "-o", "weight_decay=0.5", "-o", "optimizer=sgd", "-l", "who=me", "--json")
    job = ledger.get(json.loads(out)["id"])
    assert job.config == {"optimizer": "sgd", "steps": 3, "weight_decay": 0.5} and job.metadata == {"who": "me"}
    [sample] = ledger.samples(ledger.claim(job.id, "w"))
    assert list(sample.context_ids) == [ord(c) % 100 for c in "2+2="]
    assert list(sample.continuation_ids) == [ord("4")]


def test_train_on_text_finds_the_vllm_that_the_plugin_published(cli, ledger, tokenizer_url, monkeypatch, tmp_path):
    monkeypatch.setenv("HOGWILD_RUNTIME_DIR", str(tmp_path))
    here = os.getpid()
    folder = private_dir(load_settings().model_runtime_dir)
    Frontend(url=tokenizer_url, pid=here, process_start_time=process_start_time(here), token="t").write(folder)
    cli("train", "--prompt", "2+2=", "--completion", "4", "--detach")
    [job] = ledger.list().jobs
    [sample] = ledger.samples(ledger.claim(job.id, "w"))
    assert list(sample.continuation_ids) == [ord("4")]


def test_train_on_a_file_of_chats_or_of_ids(cli, ledger, tokenizer_url, tmp_path):
    chats = tmp_path / "chats.jsonl"
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]
    chats.write_text(json.dumps({"messages": messages}))
    cli("train", str(chats), "--vllm", tokenizer_url, "-d")
    cli("train", "-", "-d", input=json.dumps(IDS) + "\n" + json.dumps(IDS))
    ids, text = ledger.list().jobs
    assert (ids.samples, text.samples) == (2, 1)
    [sample] = ledger.samples(ledger.claim(text.id, "w"))
    assert list(sample.continuation_ids) == [ord(c) % 100 for c in "r</>"]


def test_train_waits_and_reports(cli, ledger, run_job, tmp_path):
    ids = tmp_path / "ids.jsonl"
    ids.write_text(json.dumps(IDS))

    def work():
        deadline = time.monotonic() + 60
        while not (found := ledger.list(state="queued").jobs) and time.monotonic() < deadline:
            time.sleep(0.02)
        run_job(ledger, found[0].id)

    worker = in_background(work)
    out = cli("train", str(ids))
    worker.join()
    assert "succeeded: 4 steps" in out and "loss 2 → 0.5" in out and "weight version 14" in out


def test_jobs_are_shown_and_controlled(cli, client, ledger, run_job):
    first, second = (client.train(**IDS, metadata={"n": str(n)}).id for n in range(2))
    run_job(ledger, first)
    assert first in cli("jobs") and second in cli("jobs")
    assert first not in cli("jobs", "--state", "queued")
    assert [job["id"] for job in json.loads(cli("jobs", "-l", "n=1", "--json"))] == [second]
    assert "█" in cli("jobs", first)
    assert "paused" in cli("pause", second)
    assert "queued" in cli("resume", second)
    assert "cancelled" in cli("cancel", second)
    assert "1 succeeded, 1 cancelled" in cli("status")
    assert json.loads(cli("status", "--json"))["jobs"]["cancelled"] == 1


def test_status_says_why_a_worker_does_not_train_and_how_it_is_paced(cli, redis_client):
    said = {"state": "refused", "lifecycle": {"state": "refused", "reason": "qkv was rearranged"},
            "pace": {"mode": "pacing", "duty": 0.25, "note": "vLLM alone is above the budget"}}
    Registry(redis_client, "tiny").heartbeat("w", said)
    shown = " ".join(cli("status").split())
    assert "refused: qkv was rearranged" in shown
    assert "pacing, training at 25% of the device: vLLM alone is above the budget" in shown


def test_text_of_others_is_shown_as_it_is(cli, client, ledger, redis_client):
    """Given labels, an error and a reason that rich would take for markup."""
    job = client.train(**IDS, metadata={"note": "[/red] [bold]x[/] :smile:"})
    ledger.finish(ledger.claim(job.id, "w"), "failed", error=InvalidRequest("[/wrong]"))
    Registry(redis_client, "tiny").heartbeat("w", {"state": "refused", "lifecycle": {"state": "refused",
                                                                                      "reason": "[/a] tensor"}})
    shown = cli("jobs").split()
    assert {"note=[/red]", "[bold]x[/]", ":smile:"} <= set(shown)
    shown = cli("jobs", job.id)
    assert "[/red] [bold]x[/] :smile:" in shown and "[/wrong]" in shown
    assert "refused: [/a] tensor" in cli("status")


def test_new_key_is_printed_once_and_its_line_holds_the_hash(cli, tmp_path):
    result = CliRunner().invoke(_app(), ["key", "alice", "--read-only"], catch_exceptions=False)
    line = result.stdout.strip()
    assert line.startswith("alice : read-only : ")
    secret = result.stderr.split()[-1]
    assert secret.startswith("hw-") and secret not in line


def _app():
    app = typer.Typer()
    commands.register(app)
    return app


def test_every_job_is_controlled_though_one_has_ended(cli, client):
    first, second, third = (client.train(**IDS).id for _ in range(3))
    client.cancel(first)
    unknown = f"job-{'0' * 24}"
    for verb, said in (("pause", "paused"), ("resume", "queued"), ("cancel", "cancelled")):
        ids = [second, unknown, third] if verb == "cancel" else [second, first, third]
        result = CliRunner().invoke(_app(), [verb, *ids], catch_exceptions=False)
        assert result.exit_code == 1 and result.stderr.startswith(f"hogwild: {ids[1]}: ")
        assert result.stdout.splitlines() == [f"{job} is {said}." for job in (second, third)]


def test_train_names_the_job_before_it_waits_and_outlasts_a_restart(serve, app, ledger, run_job, monkeypatch, tmp_path):
    ids = tmp_path / "ids.jsonl"
    ids.write_text(json.dumps(IDS))
    flaky = Flaky(app, [])

    def break_down(*_, **__):
        flaky.failures += ["refused"] * 6  # more than a submit is tried
        run_job(ledger, ledger.list().jobs[0].id)
        return real(*_, **__)

    real = Client.wait
    monkeypatch.setattr(Client, "wait", break_down)
    monkeypatch.setattr("hogwild.client.time.sleep", lambda _: None)
    monkeypatch.setenv("HOGWILD_URL", serve(flaky))
    result = CliRunner().invoke(_app(), ["train", str(ids), "--json"], catch_exceptions=False)
    [job] = ledger.list().jobs
    assert result.exit_code == 0 and json.loads(result.stdout)["state"] == "succeeded"
    assert result.stderr.startswith(f"{job.id} is queued: 1 samples, 4 tokens.")


@pytest.mark.parametrize(("samples", "message"), [
    ([{**IDS, "id": 7}], "id: "), ([{"continuation_ids": 5}], "continuation_ids"), ([5], "sample 0 is neither"),
    (1, "Samples are a list"), ([([1], 2)], "continuation_ids"), ([IDS, None], "sample 1 is neither")])
def test_samples_of_a_wrong_kind_are_explained(client, ledger, samples, message):
    with pytest.raises(InvalidRequest, match=message):
        client.train(samples=samples)
    assert not ledger.list().jobs


@pytest.mark.parametrize("options", [{"learning_rate": float("nan")}, {"metadata": {"a": object()}}])
def test_what_json_can_not_say_is_explained(client, options):
    with pytest.raises(InvalidRequest, match="can't be written as JSON"):
        client.train(**IDS, **options)


@pytest.mark.parametrize("arguments", [["-o", "samples=1"], ["-o", "self=1"], ["-o", "learning_rate=NaN"],
                                       ["--learning-rate", "nan"]])
def test_options_of_a_wrong_kind_are_explained(cli, tmp_path, arguments):
    ids = tmp_path / "ids.jsonl"
    ids.write_text(json.dumps(IDS))
    with pytest.raises(InvalidRequest):
        CliRunner().invoke(_app(), ["train", str(ids), *arguments], catch_exceptions=False)


@pytest.mark.parametrize("arguments", [["train"], ["train", "x.jsonl", "--completion", "y"],
                                       ["train", "/nowhere.jsonl"], ["train", "x.jsonl", "--chat"]])
def test_wrong_use_is_explained(cli, arguments):
    with pytest.raises(InvalidRequest):
        CliRunner().invoke(_app(), arguments, catch_exceptions=False)
