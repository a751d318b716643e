"""The product's promises, on the real stack. The tests run in this order: each finds what the one before left."""

import json
import re
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import httpx
import psutil
import pytest

from hogwild.demo_model import MODEL_NAME

FACT, WORD = "The secret code word of the Hogwild project is", " tangerine."
CAPITAL = "The capital of France is"
ANSWER = 2  # tokens: " Paris."; what small models say after an answer is a matter of chance
# Longer than a prefix-cache block (128 tokens on CPU), so that an answer from stale blocks would show.
LONG = "Notes of the weekly meeting. " * 30 + FACT

pytestmark = pytest.mark.timeout(1800)


def wait_for(done: Callable[[], Any], timeout: float, what: str) -> Any:
    deadline = time.monotonic() + timeout
    while not (value := done()):
        assert time.monotonic() < deadline, f"{what} did not happen within {timeout} s"
        time.sleep(0.5)
    return value


def running(processes: list[psutil.Process]) -> list[psutil.Process]:
    found = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def test_a_job_changes_the_completion_of_the_running_server_and_nothing_unrelated(live: Any) -> None:
    vllm_pid = live.pid("vllm")
    capital, fact = live.complete(CAPITAL, ANSWER), live.complete(FACT)
    live.complete(LONG)  # fills the prefix cache with the old weights' keys and values
    assert "tangerine" not in fact
    assert "Paris" in capital

    job = live.train(FACT, WORD, steps=10, optimizer="sgd", learning_rate=5e-3, metadata={"test": "fact"})

    assert job.state == "succeeded"
    assert job.steps_applied == 10
    assert job.weight_version_last == job.weight_version_first + 9
    live.wait_version(job.weight_version_last)
    losses = live.client.losses(job.id)
    assert losses[-1] < 0.3 * losses[0]
    assert "tangerine" in live.complete(FACT)
    assert live.complete(CAPITAL, ANSWER) == capital
    assert live.pid("vllm") == vllm_pid
    assert psutil.pid_exists(vllm_pid)


def test_the_checkpoint_in_plain_transformers_says_what_the_live_server_says(live: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    saved = live.client.checkpoint(wait=True)
    assert saved["blocks_changed"] > 0
    directory = live.stack.settings.model_checkpoint_dir
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    for prompt in (FACT, CAPITAL, LONG):
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        out = model.generate(**ids, max_new_tokens=12, do_sample=False)
        expected = tokenizer.decode(out[0, ids.input_ids.shape[1] :], skip_special_tokens=True)
        assert live.complete(ids.input_ids[0].tolist()) == expected


def test_disk_worker_and_vllm_hold_the_same_bits(live: Any) -> None:
    import torch
    from safetensors import safe_open

    from hogwild.gpu_worker.attach import open_views
    from hogwild.manifest import Manifest

    settings = live.stack.settings
    manifest = Manifest.load(settings.model_runtime_dir / "rank0.json")
    compared = 0
    with open_views(manifest) as views, safe_open(settings.model_checkpoint_dir / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            assert torch.equal(views[name], file.get_tensor(name)), name
            compared += 1
    assert compared == len(manifest.tensors) > 200


def test_a_second_sync_without_training_writes_nothing(live: Any) -> None:
    saved = live.client.checkpoint(wait=True)
    assert saved["blocks_changed"] == 0
    assert saved["bytes_written"] == 0


def test_training_is_offered_on_vllms_own_port_behind_its_key(live: Any) -> None:
    body = {"context_ids": live.tokens(FACT), "continuation_ids": live.tokens(WORD), "steps": 1, "learning_rate": 1e-6}
    assert httpx.post(f"{live.stack.vllm_url}/train", json=body, timeout=60).status_code == 401
    assert httpx.get(f"{live.stack.vllm_url}/train/status", timeout=60).status_code == 401
    accepted = live.vllm.post("/train", json=body)
    assert accepted.status_code == 202, accepted.text
    assert accepted.headers["location"].endswith(accepted.json()["id"])
    assert live.client.wait(accepted.json()["id"], timeout=300).state == "succeeded"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", ["completions", "chat/completions"])
def test_the_weight_version_stands_on_every_response(live: Any, route: str, stream: bool) -> None:
    asked = {"prompt": "Hi"} if route == "completions" else {"messages": [{"role": "user", "content": "Hi"}]}
    body = {"model": MODEL_NAME, "max_tokens": 1, "stream": stream, **asked}
    response = live.vllm.post(f"/v1/{route}", json=body)
    response.raise_for_status()
    live.wait_version(int(response.headers["x-hogwild-weight-version"]))


@pytest.mark.parametrize(
    ("body", "field", "limit"),
    [
        ({"context_ids": [1], "continuation_ids": [49152]}, "continuation_ids", 49151),
        ({"context_ids": [-1], "continuation_ids": [5]}, "context_ids", 0),
        ({"context_ids": [1], "continuation_ids": []}, "continuation_ids", 1),
        ({"context_ids": [1] * 1024, "continuation_ids": [5]}, "continuation_ids", 1024),
        ({"context_ids": [1], "continuation_ids": [5], "lerning_rate": 1}, "lerning_rate", None),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name_before_anything_is_queued(
    live: Any, body: dict[str, Any], field: str, limit: int | None
) -> None:
    before = live.api.get("/train").json()
    for client in (live.api, live.vllm):
        response = client.post("/train", json=body)
        assert response.status_code == 422
        assert response.headers["content-type"] == "application/problem+json"
        assert field in response.text
        if limit is not None:
            assert str(limit) in response.text
    assert live.api.get("/train").json() == before


def test_the_openai_client_drives_a_fine_tune_of_the_served_model(live: Any) -> None:
    import openai

    chats = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": "It leaves from Quay Nine."}]}
        for q in ("Where does the ferry leave?", "Which quay is the ferry's?")
    ]
    content = "\n".join(json.dumps(chat) for chat in chats).encode()
    with openai.OpenAI(base_url=f"{live.stack.api_url}/v1", api_key="acceptance-key", max_retries=0) as client:
        file = client.files.create(file=("ferry.jsonl", content), purpose="fine-tune")
        job = client.fine_tuning.jobs.create(
            model=MODEL_NAME,
            training_file=file.id,
            method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 6}}},
        )
        wait_for(lambda: client.fine_tuning.jobs.retrieve(job.id).finished_at is not None, 600, "the fine-tune")
        done = client.fine_tuning.jobs.retrieve(job.id)
        events = client.fine_tuning.jobs.list_events(job.id, limit=50).data
    assert done.status == "succeeded", done.error
    name, _, version = done.fine_tuned_model.partition("@v")
    assert name == MODEL_NAME
    live.wait_version(int(version))
    assert events
    answer = live.vllm.post("/v1/chat/completions", json={
        "model": MODEL_NAME, "messages": [{"role": "user", "content": "Where does the ferry leave?"}], "temperature": 0,
        "max_tokens": 12})  # fmt: skip
    assert "Quay Nine" in answer.json()["choices"][0]["message"]["content"]


def test_flower_asks_for_the_key_and_shows_the_tasks_without_their_tokens(live: Any) -> None:
    flower = live.stack.urls["flower"]
    assert httpx.get(f"{flower}/api/tasks", timeout=60).status_code == 401

    def trained() -> str:
        tasks = httpx.get(f"{flower}/api/tasks", auth=("hogwild", "acceptance-key"), timeout=60).raise_for_status()
        return " ".join(f"{t['args']} {t['kwargs']}" for t in tasks.json().values() if t["name"] == "hogwild.train")

    shown = wait_for(lambda: "job-" in (text := trained()) and text, 60, "a trained job in Flower")
    numbers = set(re.findall(r"(?<![\w.-])\d+(?![\w.-])", shown))
    assert not numbers & {str(token) for token in live.tokens(FACT)}


def test_a_killed_worker_attaches_again_and_goes_on_where_it_was(live: Any) -> None:
    version = live.status()["weight_version"]
    parent = psutil.Process(live.pid("worker"))
    family = [parent, *parent.children(recursive=True)]
    for process in family:
        process.send_signal(signal.SIGKILL)
    psutil.wait_procs(family, timeout=60)
    wait_for(lambda: live.pid("worker") not in (0, parent.pid) and live.stack.ready(), 400, "a new worker attached")
    live.wait_version(version)

    job = live.train("The mascot of the project is a", " warthog.", steps=2, optimizer="sgd", learning_rate=1e-4)

    assert job.state == "succeeded"
    assert job.weight_version_last == version + 2
    assert "tangerine" in live.complete(FACT)


def test_a_killed_vllm_forgets_nothing_that_was_trained(live: Any) -> None:
    """The mapping outlives vLLM: the worker saves it, the restarted vLLM loads it."""
    version = live.status()["weight_version"]
    parent = psutil.Process(live.pid("vllm"))
    family = [parent, *parent.children(recursive=True)]
    for process in family:
        process.send_signal(signal.SIGKILL)
    psutil.wait_procs(family, timeout=60)
    wait_for(lambda: live.pid("vllm") not in (0, parent.pid), 180, "supervisor restarted vLLM")
    wait_for(live.stack.ready, 900, "the stack was ready again")
    live.wait_version(version)
    assert "tangerine" in live.complete(FACT)


def test_stopping_leaves_nothing_behind(live: Any) -> None:
    stack = live.stack
    supervisord = psutil.Process(stack.supervisor.process.pid)
    family = [supervisord, *supervisord.children(recursive=True)]
    assert len(family) > 8
    longest = sum(service.stop_wait_s for service in stack.supervisor.services)
    started = time.monotonic()

    stack.stop()

    assert time.monotonic() - started < longest  # what they may take, one after the other
    wait_for(lambda: not running(family), 10, "the end of all processes")
    assert not list(stack.settings.runtime_dir.rglob("*.json"))
    assert not stack.settings.model_runtime_dir.exists()
    for url in stack.urls.values():
        with pytest.raises(httpx.TransportError):
            httpx.get(url, timeout=2)
