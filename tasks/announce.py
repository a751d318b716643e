"""`task-sent` events for messages that scripts publish, so that Flower shows queued jobs and not only running ones.

Celery sends this event itself when it publishes a task; ours are published by Redis scripts. Events are for looking at,
not for working with: they are sent from a thread of their own, only while somebody listens, and dropped rather than
waited for.
"""

import logging
import queue
import threading
import time
from typing import Any

from celery import Celery

from hogwild.tasks.messages import Message

log = logging.getLogger("hogwild.tasks")

BACKLOG = 1000  # more than this waits only when Redis stalls or thousands of jobs a second come in
LISTENERS_S = 5.0  # how long the answer to "does anybody listen?" is believed


class Announcer:
    """Sends `task-sent` events from a daemon thread, which starts with the first one."""

    def __init__(self, app: Celery, queue_name: str) -> None:
        self.app = app
        self.queue_name = queue_name
        self._waiting: queue.Queue[tuple[str, Message]] = queue.Queue(BACKLOG)
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def announce(self, task: str, message: Message) -> None:
        """Tell listeners that `message`, a call of `task`, was published. Never blocks, never raises."""
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="hogwild-announce", daemon=True)
                self._thread.start()
        try:
            self._waiting.put_nowait((task, message))
        except queue.Full:
            log.debug("an event was dropped: %d wait", BACKLOG)

    def _run(self) -> None:
        asked_at, listening = -LISTENERS_S, False
        while True:
            task, message = self._waiting.get()
            try:
                with self.app.connection_for_write() as connection:
                    channel = connection.default_channel
                    while True:
                        if time.monotonic() - asked_at >= LISTENERS_S:
                            asked_at = time.monotonic()
                            listening = bool(channel.client.exists("_kombu.binding.celeryev"))
                        if listening:
                            self._send(connection, task, message)
                        task, message = self._waiting.get()
            except Exception as error:  # Redis away or restarted: events are not worth more than a line in the log
                log.debug("an event could not be sent: %s", error)

    def _send(self, connection: Any, task: str, message: Message) -> None:
        with self.app.events.Dispatcher(connection) as dispatcher:
            dispatcher.publish(
                "task-sent",
                {"uuid": message.id, "root_id": message.id, "parent_id": None, "name": task, "args": message.argsrepr,
                 "kwargs": "{}", "retries": 0, "eta": None, "expires": None, "queue": self.queue_name,
                 "exchange": "", "routing_key": self.queue_name},
                dispatcher.producer, retry=False)
