"""A whole fine-tune by the official `openai` client against our API.

vLLM is stood in for by a small server with the same /tokenize (words, a ChatML template): starting vLLM takes minutes,
and the acceptance tests do it.
"""

import asyncio
import io
import json
import time

import openai
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import SecretStr

from hogwild.api.app import create_app
from hogwild.api.finetune import CreateRequest, training_config
from hogwild.tasks.ledger import Ledger
from hogwild.tasks.payloads import Sample, pack
from hogwild.tasks.registry import ModelInfo, Registry

CHATS = [
    {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "secret word"},
                  {"role": "assistant", "content": "tangerine"}]},
    {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"},
                  {"role": "user", "content": "secret word"}, {"role": "assistant", "content": "tangerine"}]},
]


class Words:
    """A vocabulary that grows with what it sees."""

    def __init__(self):
        self.ids, self.requests, self.answered, self.pause = {}, 0, 0, 0.0

    def encode(self, text):
        words = text.replace("<|", " <|").replace("|>", "|> ").split()
        return [self.ids.setdefault(word, len(self.ids)) for word in words]

    def decode(self, ids):
        words = {i: word for word, i in self.ids.items()}
        return " ".join(words[i] for i in ids)


@pytest.fixture
def words():
    return Words()


@pytest.fixture
def tokenizer_url(serve, words):
    app = FastAPI()

    @app.post("/tokenize")
    async def tokenize(request: Request):
        words.requests += 1
        if request.headers.get("authorization") != "Bearer vllm-key":
            return JSONResponse({"error": {"message": "no key"}}, 401)
        await asyncio.sleep(words.pause)
        body = await request.json()
        if "prompt" in body:
            ids = words.encode(body["prompt"])
        else:
            if any("forbidden" in (m.get("content") or "") for m in body["messages"]):
                return JSONResponse({"error": {"message": "the template says no"}}, 400)
            text = "".join(f"<|{m['role']}|>{m['content']}<|end|>" for m in body["messages"])
            ids = words.encode(text + ("<|assistant|>" if body["add_generation_prompt"] else ""))
        words.answered += 1
        return {"count": len(ids), "max_model_len": 64, "tokens": ids}

    return serve(app)


@pytest.fixture
def ledger(redis_client, settings):
    return Ledger(redis_client, settings)


@pytest.fixture
def client(serve, settings, redis_client, tokenizer_url):
    Registry(redis_client, "tiny").publish_model(ModelInfo(
        served_model_name="tiny", model_path="/m", vocab_size=1000, max_model_len=64, vllm_url=tokenizer_url))
    url = serve(create_app(settings.model_copy(update={"vllm_api_key": SecretStr("vllm-key")})))
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as made:
        yield made


def upload(client, rows):
    content = "\n".join(json.dumps(row) for row in rows).encode()
    return client.files.create(file=("train.jsonl", io.BytesIO(content)), purpose="fine-tune")


def test_a_whole_fine_tune(client, ledger, words, run_job, redis_client):
    # Given an uploaded file of chats
    file = upload(client, CHATS)
    assert (file.purpose, file.filename, file.status) == ("fine-tune", "train.jsonl", "processed")
    # When a job is created from it
    job = client.fine_tuning.jobs.create(
        model="tiny", training_file=file.id, seed=7, metadata={"who": "test"}, suffix="mine",
        method={"type": "supervised", "supervised": {"hyperparameters": {
            "n_epochs": 3, "learning_rate_multiplier": 2.0}}},
        extra_body={"hogwild": {"optimizer": "sgd", "shuffle": False}})
    assert job.status == "queued" and job.object == "fine_tuning.job" and job.fine_tuned_model is None
    # Then its samples hold the loss on the assistant's words alone
    shown = ledger.get(job.id)
    assert shown.config == {"optimizer": "sgd", "shuffle": False, "epochs": 3, "seed": 7,
                            "learning_rate_multiplier": 2.0}
    lease = ledger.claim(job.id, "peek")
    one, two = ledger.samples(lease)
    assert words.decode(one.continuation_ids) == "tangerine <|end|>"
    learned = [i for i, weight in zip(two.continuation_ids, two.weights, strict=True) if weight]
    assert words.decode(learned) == "hi <|end|> tangerine <|end|>"
    assert words.decode([*two.context_ids, *two.continuation_ids]).startswith("<|user|> hello <|end|> <|assistant|> hi")
    # And when a worker has trained it, the client sees steps, tokens and the model's new version
    run_job(ledger, job.id, steps=4, version=10)
    done = client.fine_tuning.jobs.retrieve(job.id)
    assert (done.status, done.fine_tuned_model, done.trained_tokens) == ("succeeded", "tiny@v14", 28)
    assert done.hyperparameters.n_epochs == 3 and done.metadata == {"who": "test"} and done.finished_at
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=2))  # pages of two, all of them
    assert events[0].message == "The job has succeeded."
    assert [e.data["train_loss"] for e in events if e.type == "metrics"] == pytest.approx([0.5, 2 / 3, 1.0, 2.0])
    assert len({e.id for e in events}) == len(events)
    # And checkpoints are the generations that hold its steps
    Registry(redis_client, "tiny").publish_checkpoint({"head": 2, "generations": [
        {"generation": 2, "weight_version": 14, "created_at": 1.7e9, "jobs": [job.id]},
        {"generation": 1, "weight_version": 10, "created_at": 1.6e9, "jobs": []}]})
    [checkpoint] = client.fine_tuning.jobs.checkpoints.list(job.id)
    assert checkpoint.fine_tuned_model_checkpoint == "tiny@v14" and checkpoint.step_number == 4


def test_null_among_hogwilds_options_means_the_default(client, ledger, settings):
    options = {"optimizer": None, "learning_rate": None, "seed": None, "replay": None, "steps": 2}
    # Given a deployment with an optimizer and a rate of its own, a job that names none has these
    served = ModelInfo(served_model_name="tiny", model_path="/m", vocab_size=9, max_model_len=9, optimizer="sgd",
                       learning_rate=0.123)
    body = CreateRequest(model="tiny", training_file="file-x", hogwild=options)
    assert training_config(body, served) == {"optimizer": "sgd", "learning_rate": 0.123, "steps": 2}
    # And nulls are not kept with it
    file = upload(client, CHATS[:1])
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id, extra_body={"hogwild": options})
    assert job.seed == 0
    assert ledger.get(job.id).config == {"optimizer": "apollo", "steps": 2}
    # And a job that was stored with them can be read and controlled
    old, _ = ledger.submit(pack([Sample([1], [2])]), {"seed": None}, kind="fine_tuning")
    assert client.fine_tuning.jobs.list().data[0].id == old
    assert client.fine_tuning.jobs.cancel(old).seed == 0


def test_request_that_its_client_gave_up_queues_nothing(client, ledger, words):
    file = upload(client, CHATS[:1])
    words.pause = 1.0
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3, max_retries=1).fine_tuning.jobs.create(model="tiny", training_file=file.id)
    deadline = time.monotonic() + 30
    while words.answered < 4:  # two of each attempt
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)
    assert ledger.list().jobs == []
    words.pause = 0.0
    assert client.fine_tuning.jobs.create(model="tiny", training_file=file.id).status == "queued"


def test_priority_is_among_hogwilds_options(client, ledger):
    file = upload(client, CHATS[:1])
    for given, kept in ((9, 9), (0, 0), (None, 5)):
        job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id,
                                             extra_body={"hogwild": {"priority": given, "optimizer": "sgd"}})
        shown = ledger.get(job.id)
        assert (shown.priority, shown.config) == (kept, {"optimizer": "sgd"})
    with pytest.raises(openai.UnprocessableEntityError, match="priority"):
        client.fine_tuning.jobs.create(model="tiny", training_file=file.id, extra_body={"hogwild": {"priority": 10}})


@pytest.mark.parametrize("after", ["ftevent-\u0663", "ftevent-1-\u0663", "x"])
def test_place_among_events_that_is_none_is_refused(client, ledger, after):
    job_id, _ = ledger.submit(pack([Sample([1], [2])]), {}, kind="fine_tuning")
    with pytest.raises(openai.UnprocessableEntityError):
        client.fine_tuning.jobs.list_events(job_id, after=after)
    assert client.fine_tuning.jobs.list_events(job_id, after="ftevent-0-0").data == []


def test_jobs_are_listed_in_pages_and_controlled(client, ledger):
    file = upload(client, CHATS[:1])
    ids = [client.fine_tuning.jobs.create(model="tiny", training_file=file.id, metadata={"n": str(n)}).id
           for n in range(5)]
    assert [job.id for job in client.fine_tuning.jobs.list(limit=2)] == ids[::-1]
    assert [job.id for job in client.fine_tuning.jobs.list(extra_query={"metadata[n]": "3"})] == [ids[3]]
    assert client.fine_tuning.jobs.pause(ids[0]).status == "paused"
    assert client.fine_tuning.jobs.resume(ids[0]).status == "queued"
    assert client.fine_tuning.jobs.cancel(ids[0]).status == "cancelled"
    with pytest.raises(openai.ConflictError):
        client.fine_tuning.jobs.pause(ids[0])


def test_prompt_completion_pairs_split_where_the_tokens_do(client, ledger, words):
    file = upload(client, [{"prompt": "The secret word is", "completion": " tangerine"}])
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file.id)
    [sample] = ledger.samples(ledger.claim(job.id, "w"))
    assert words.decode(sample.context_ids) == "The secret word is"
    assert words.decode(sample.continuation_ids) == "tangerine"


def test_files_can_be_listed_read_and_deleted(client):
    files = [upload(client, CHATS) for _ in range(3)]
    assert [file.id for file in client.files.list(limit=2)] == [file.id for file in files[::-1]]
    assert [file.id for file in client.files.list(order="asc")] == [file.id for file in files]
    assert client.files.retrieve(files[0].id).bytes == files[0].bytes
    assert [json.loads(line) for line in client.files.content(files[0].id).text.splitlines()] == CHATS
    assert client.files.delete(files[0].id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(files[0].id)


def test_files_can_be_deleted_while_they_are_listed(client):
    ids = [upload(client, CHATS).id for _ in range(5)]
    assert [client.files.delete(file.id).id for file in client.files.list(limit=2)] == ids[::-1]
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(ids[0])
    with pytest.raises(openai.NotFoundError):
        client.files.list(after="file-" + "0" * 24)


def test_wrong_file_is_refused_with_its_line(client):
    with pytest.raises(openai.UnprocessableEntityError, match="line 2") as caught:
        upload(client, [CHATS[0], {"messages": []}])
    assert caught.value.body["message"].count("line 2") == 1
    with pytest.raises(openai.UnprocessableEntityError, match="purpose"):
        client.files.create(file=("a", b"{}"), purpose="batch")


def test_what_vllm_refuses_names_the_line_and_queues_nothing(client, ledger):
    file = upload(client, [CHATS[0], {"messages": [{"role": "user", "content": "forbidden"},
                                                   {"role": "assistant", "content": "x"}]}])
    with pytest.raises(openai.UnprocessableEntityError, match=r"line 2.*template says no"):
        client.fine_tuning.jobs.create(model="tiny", training_file=file.id)
    long = upload(client, [CHATS[0], {"messages": [{"role": "user", "content": "x " * 100},
                                                   {"role": "assistant", "content": "y"}]}])
    with pytest.raises(openai.UnprocessableEntityError, match=r"line 2.*64 is the limit"):
        client.fine_tuning.jobs.create(model="tiny", training_file=long.id)
    assert ledger.list().jobs == []


@pytest.mark.parametrize(("change", "error"), [
    ({"model": "gpt-4o-mini"}, openai.NotFoundError), ({"training_file": "file-x"}, openai.NotFoundError),
    ({"validation_file": "file-x"}, openai.UnprocessableEntityError),
    ({"method": {"type": "dpo"}}, openai.UnprocessableEntityError),
    ({"hyperparameters": {"batch_size": 4}}, openai.UnprocessableEntityError),
    ({"hyperparameters": {"n_epochs": 0}}, openai.UnprocessableEntityError),
    ({"extra_body": {"hogwild": {"optimiser": "sgd"}}}, openai.UnprocessableEntityError),
    ({"extra_body": {"hogwild": {"optimizer": "adam"}}}, openai.UnprocessableEntityError),
    ({"extra_body": {"hogwild": {"learning_rate": 10**400}}}, openai.UnprocessableEntityError),
    ({"extra_body": {"hogwild": {"steps": 2**62 - 1}}}, openai.UnprocessableEntityError),
    ({"extra_body": {"hogwild": {"steps": 101, "gradient_accumulation": 10**5}}}, openai.UnprocessableEntityError)])
def test_what_is_not_supported_is_refused_and_not_ignored(client, ledger, change, error):
    file = upload(client, CHATS[:1])
    with pytest.raises(error):
        client.fine_tuning.jobs.create(**{"model": "tiny", "training_file": file.id, **change})
    assert ledger.list().jobs == []


def test_vllm_away_is_a_503_that_says_so(serve, settings, redis_client):
    Registry(redis_client, "tiny").publish_model(ModelInfo(
        served_model_name="tiny", model_path="/m", vocab_size=1000, max_model_len=64, vllm_url="http://127.0.0.1:1"))
    with openai.OpenAI(base_url=f"{serve(create_app(settings))}/v1", api_key="x", max_retries=0) as away:
        file = upload(away, CHATS[:1])
        with pytest.raises(openai.InternalServerError, match="vLLM") as caught:
            away.fine_tuning.jobs.create(model="tiny", training_file=file.id)
    assert caught.value.status_code == 503 and int(caught.value.response.headers["retry-after"]) > 0
