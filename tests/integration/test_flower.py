"""Flower shows what runs, by name and step, and nothing of what is trained on."""

import time

import httpx
from process_stack import ready

SECRET_IDS = [987, 654, 321]


def eventually(look, timeout_s=30):
    deadline = time.monotonic() + timeout_s
    while not (found := look()):
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.2)
    return found


def test_flower_shows_queued_and_running_jobs_with_their_step(stack):
    # Given a stack with Flower listening
    running = ready(stack(step_s=0.6), "worker", "api0", "flower")
    flower = httpx.Client(base_url=f"http://127.0.0.1:{running.flower_port}", timeout=10)

    def answers():
        try:
            return flower.get("/api/workers", params={"refresh": "true"}).json()
        except (httpx.HTTPError, ValueError):
            return None

    eventually(answers)
    time.sleep(6)  # the API asks every 5 s whether anybody listens
    # When one job runs and one waits
    api = f"http://127.0.0.1:{running.ports[0]}/train"
    body = {"context_ids": SECRET_IDS, "continuation_ids": SECRET_IDS, "steps": 12}
    first, second = (httpx.post(api, json=body).json()["id"] for _ in range(2))

    def tasks():
        return {task["args"]: task for task in flower.get("/api/tasks").json().values()}

    # Then Flower names the task, shows the step of the one and that the other waits
    shown = eventually(lambda: tasks().get(f"('{first}',)", {}).get("state") == "PROGRESS" and tasks())
    assert shown[f"('{first}',)"]["name"] == "hogwild.train"
    assert shown[f"('{first}',)"]["uuid"].startswith(first)
    assert "step" in shown[f"('{first}',)"]["result"] and "/12" in shown[f"('{first}',)"]["result"]
    assert shown[f"('{second}',)"]["state"] in ("PENDING", "RECEIVED")
    # And no token id is anywhere in it, nor in its metrics
    metrics = flower.get("/metrics").text
    assert "flower_events_total" in metrics and "task-progress" in metrics
    for text in (flower.get("/api/tasks").text, metrics):
        assert "987" not in text and "[987" not in text
    running.wait_ended([first, second])
    running.check([first, second], steps=12)
    flower.close()
