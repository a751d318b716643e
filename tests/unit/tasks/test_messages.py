"""Our messages are what Celery itself would have sent."""

import base64
import json

from celery import Celery

from hogwild.tasks.app import TRAIN, make_app
from hogwild.tasks.messages import Messages


def sent_by_celery(app: Celery, client, queue: str, priority: int) -> tuple[str, dict]:
    app.send_task(TRAIN, ("job-1",), task_id="job-1.abc", queue=queue, priority=priority, argsrepr="('job-1',)")
    keys = [k for k in client.keys("train.*") if client.type(k) == b"list"]
    assert len(keys) == 1
    return keys[0].decode(), json.loads(client.lrange(keys[0], 0, -1)[0])


def test_message_equals_the_one_celery_sends(settings, redis_client):
    # Given the message that send_task puts into Redis, at kombu's priority 2
    app = make_app(settings)
    key, theirs = sent_by_celery(app, redis_client, settings.queue, priority=2)
    # When we build the message of the same call (our 7 is their 2: 9 is the most urgent)
    message = Messages(app, settings.queue).build(TRAIN, ("job-1",), subject="job-1", priority=7)
    ours = json.loads(message.body)
    # Then it lies in the same list, with the same fields, and only the ids and the reply queue differ
    assert message.key == key
    assert json.loads(base64.b64decode(ours.pop("body"))) == json.loads(base64.b64decode(theirs.pop("body")))
    for name in ("id", "root_id", "origin"):
        assert ours["headers"].pop(name) and theirs["headers"].pop(name)
    for name in ("correlation_id", "delivery_tag"):
        assert ours["properties"].pop(name) and theirs["properties"].pop(name)
    theirs["properties"].pop("reply_to", None)
    ours["properties"].pop("reply_to", None)
    assert ours == theirs


def test_each_message_has_an_id_of_its_own(settings):
    messages = Messages(make_app(settings), settings.queue)
    a, b = (messages.build(TRAIN, ("job-1",), subject="job-1") for _ in range(2))
    assert a.id != b.id
    assert json.loads(a.body)["properties"]["delivery_tag"] != json.loads(b.body)["properties"]["delivery_tag"]
    assert a.id.startswith("job-1.")
