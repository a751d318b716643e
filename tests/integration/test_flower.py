"""Flower shows what runs, by name and step, and nothing of what is trained on."""

import re
import time

import httpx
import pytest
from process_stack import ready

SECRET_IDS = [987, 654, 321]
pytestmark = pytest.mark.timeout(900)


def eventually(look, timeout_s=120):
    deadline = time.monotonic() + timeout_s
    while not (found := look()):
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.2)
    return found


def test_flower_shows_queued_and_running_jobs_with_their_step(stack):
    # Given a stack with Flower listening
    running = ready(stack(step_s=0.6), "worker", "api0", "flower")
    flower = httpx.Client(base_url=f"http://127.0.0.1:{running.flower_port}", timeout=60)

    def answers():
        try:
            return flower.get("/api/workers", params={"refresh": "true"}).json()
        except (httpx.HTTPError, ValueError):
            return None

    eventually(answers)
    eventually(lambda: running.client.exists("_kombu.binding.celeryev"))  # it listens: the API announces jobs to it
    # When one job runs and one waits
    api = f"http://127.0.0.1:{running.ports[0]}/train"
    body = {"context_ids": SECRET_IDS, "continuation_ids": SECRET_IDS}
    first, second = (httpx.post(api, json={**body, "steps": n}, timeout=60).json()["id"] for n in (100, 3))
    running.sent.update(dict.fromkeys((first, second), SECRET_IDS))

    def tasks():
        return {task["args"]: task for task in flower.get("/api/tasks").json().values()}

    def one_runs_and_one_waits():
        seen = tasks()
        one, other = (seen.get(f"('{job_id}',)") for job_id in (first, second))
        if one and other and one["state"] == "PROGRESS" and re.search(r"step \d+/100", one["result"] or ""):
            return other["state"] in ("PENDING", "RECEIVED") and one
        return None

    # Then Flower names the task, shows the step of the one and that the other waits
    one = eventually(one_runs_and_one_waits)
    assert one["name"] == "hogwild.train"
    assert one["uuid"].startswith(first)
    # And no token id is anywhere in it, nor in its metrics
    metrics = flower.get("/metrics").text
    assert "flower_events_total" in metrics and "task-progress" in metrics
    without_clock = re.sub(r'"clock": \d+', "", flower.get("/api/tasks").text)  # counts events: it may be any number
    for text in (without_clock, metrics):
        for secret in SECRET_IDS:  # by itself: the digits may well be in an id or a time
            assert not re.search(rf"(?<![\w.]){secret}(?![\w.])", text)
    # And it sees how they end
    httpx.post(f"{api}/{first}/cancel", timeout=60).raise_for_status()
    running.wait_ended([first, second])
    assert [running.ledger.get(job_id).state for job_id in (first, second)] == ["cancelled", "succeeded"]
    running.check([first, second], steps=0, ended="")
    flower.close()
