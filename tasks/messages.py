"""Celery messages that a Redis script can publish.

A job and its message must become durable together: between two commands the API can die, and with it an accepted job
that no worker ever hears of. So the message is written by the script that writes the job. Its form is not ours: kombu
makes one message of each task once, and only the fields that differ from job to job are filled in
(https://docs.celeryq.dev/en/stable/internals/protocol.html; the Redis transport stores one JSON document per list
item). A test compares the result with what `send_task` puts into Redis.
"""

import base64
import copy
import json
import secrets
import threading
from dataclasses import dataclass
from typing import Any

from celery import Celery
from kombu import Connection, Producer

from hogwild.errors import HogwildError

PRIORITY_SEPARATOR = "\x06\x16"  # kombu.transport.redis.Channel.sep
MOST_URGENT = 9


@dataclass(frozen=True)
class Message:
    """One message ready to be pushed: `LPUSH key body`."""

    id: str
    key: str
    body: str
    argsrepr: str = ""  # what Flower shows of the arguments


class Messages:
    """Builds messages for one queue. Thread-safe."""

    def __init__(self, app: Celery, queue: str) -> None:
        self.app = app
        self.queue = queue
        self._templates: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()

    def queue_keys(self) -> list[str]:
        """The lists of this queue, most urgent first."""
        return [self._key(priority) for priority in range(MOST_URGENT, -1, -1)]

    def build(self, task: str, args: tuple[Any, ...], *, subject: str, priority: int = 5) -> Message:
        """A message for `task(*args)`. `subject` (a job or operation id) begins the task id, so Flower shows it.

        `priority`: 0 to 9, 9 is the most urgent. Each message has an id of its own: Celery drops redelivered messages
        of ids that succeeded before, and a job that was paused and resumed must not be taken for one of those.
        """
        template = self._template(task)
        message = {**template, "headers": dict(template["headers"]), "properties": dict(template["properties"])}
        task_id = f"{subject}.{secrets.token_hex(4)}"
        shown = f"({', '.join(map(repr, args))}{',' if len(args) == 1 else ''})"
        message["headers"].update(id=task_id, root_id=task_id, argsrepr=shown)
        message["properties"].update(correlation_id=task_id, argsrepr=shown, priority=MOST_URGENT - priority,
                                     delivery_tag=secrets.token_hex(16))
        body = [list(args), *template["_rest"]]
        del message["_rest"]
        message["body"] = base64.b64encode(json.dumps(body).encode()).decode()
        return Message(task_id, self._key(priority), json.dumps(message), shown)

    def _key(self, priority: int) -> str:
        step = MOST_URGENT - priority
        return f"{self.queue}{PRIORITY_SEPARATOR}{step}" if step else self.queue

    def _template(self, task: str) -> dict[str, Any]:
        with self._lock:
            if task not in self._templates:
                self._templates[task] = self._capture(task)
            return self._templates[task]

    def _capture(self, task: str) -> dict[str, Any]:
        """What kombu would send for `task`, caught on its in-memory transport."""
        caught: list[dict[str, Any]] = []
        with Connection("memory://") as connection:
            channel = connection.default_channel
            channel._put = lambda _queue, message, **_: caught.append(message)
            # `Celery.send_task` would publish an event as well and declare the queue: only the message is wanted here.
            parts = self.app.amqp.create_task_message("0", task, args=(), argsrepr="()",
                                                      ignore_result=None)
            options: dict[str, Any] = {"exchange": "", "routing_key": self.queue, "delivery_mode": 2}
            Producer(channel).publish(parts.body, headers=parts.headers, serializer="json", priority=0,
                                      **options, **parts.properties)
        if len(caught) != 1:
            raise HogwildError(f"kombu built {len(caught)} messages for task {task!r} where one was expected")
        template = copy.deepcopy(caught[0])
        template["_rest"] = json.loads(base64.b64decode(template["body"]))[1:]
        return template
