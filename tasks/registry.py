"""What the worker tells the others through Redis: which model is served, and how the worker is.

The API never talks to vLLM or the GPU to validate a job: the worker publishes the vocabulary and the lengths when it
attaches, and they stay (an API may accept jobs while the worker restarts). The status document is refreshed while the
worker lives; the key `alive:<worker id>` expires when it does not.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from hogwild.errors import AlreadyAttached, ServiceUnavailable
from hogwild.tasks.connections import Client
from hogwild.tasks.jobs import load_json
from hogwild.tasks.keys import Keys

HEARTBEAT_S = 5.0  # how often a worker says that it lives
ALIVE_S = 20  # three beats may be lost before it counts as dead


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What must be known about the served model to accept a job for it."""

    served_model_name: str
    model_path: str
    vocab_size: int  # ids are 0 … vocab_size - 1
    max_model_len: int  # tokens of context + continuation that vLLM serves
    dtype: str = ""
    parameters: int = 0
    optimizer: str = "apollo"  # of jobs that name none
    learning_rate: float | None = None  # of jobs that name none
    vllm_url: str = ""  # for /tokenize

    def public(self) -> dict[str, Any]:
        """What clients may see: no path of this machine but the model's name, no address."""
        hidden = ("model_path", "vllm_url")
        return {key: value for key, value in asdict(self).items() if key not in hidden}


class Registry:
    """Model and worker of one served model."""

    def __init__(self, client: Client, model: str) -> None:
        self.client = client
        self.keys = Keys(model)

    def publish_model(self, info: ModelInfo) -> None:
        """Called by the worker whenever it attached."""
        self.client.set(self.keys("model"), json.dumps(asdict(info)))

    def model(self) -> ModelInfo:
        """Raises ServiceUnavailable when no worker ever attached to this model."""
        info = self.model_or_none()
        if info is None:
            raise ServiceUnavailable(
                f"No worker has attached to the model {self.keys.model!r} yet, so its vocabulary and lengths are not "
                "known: wait until vLLM and the worker are up ('hogwild up' says so), or check HOGWILD_SERVED_MODEL_"
                "NAME.", retry_after=10)
        return info

    def model_or_none(self) -> ModelInfo | None:
        """The model, or None when no worker ever attached to it."""
        raw = self.client.get(self.keys("model"))
        if raw is None:
            return None
        known = {f.name for f in fields(ModelInfo)}
        return ModelInfo(**{key: value for key, value in json.loads(raw).items() if key in known})

    def register_worker(self, worker_id: str, host: str, *, alive_s: int = ALIVE_S) -> None:
        """Become the worker of this model. Raises AlreadyAttached when one on another host lives.

        One on the same host is dead: the caller holds the lock on the manifest there.
        """
        key = self.keys("worker")
        previous = json.loads(self.client.get(key) or b"{}")
        other = previous.get("worker_id", "")
        if other and other != worker_id:
            alive = self.keys("alive", other)
            if previous.get("host") != host and self.client.exists(alive):
                raise AlreadyAttached(
                    f"Worker {other} on {previous.get('host')} serves the model {self.keys.model!r} already: two "
                    "deployments that share a Redis need different served model names.")
            self.client.delete(alive)
        self.heartbeat(worker_id, {"host": host}, alive_s=alive_s)

    def heartbeat(self, worker_id: str, status: Mapping[str, Any], *, alive_s: int = ALIVE_S) -> None:
        """Say that the worker lives, and how it is.

        `status`: JSON; by agreement `host`, `pid`, `state` (of the lifecycle, or training | syncing),
        `weight_version`, `job_id`, `step`, `steps`, `optimizer`, `memory`, `last_sync`.
        """
        pipe = self.client.pipeline(transaction=True)
        pipe.set(self.keys("alive", worker_id), "1", ex=alive_s)
        pipe.set(self.keys("worker"), json.dumps({**status, "worker_id": worker_id}, default=str))
        pipe.execute()

    def unregister_worker(self, worker_id: str) -> None:
        """The worker stops in order: it counts as gone at once."""
        self.client.delete(self.keys("alive", worker_id))

    def worker(self) -> dict[str, Any] | None:
        """Last status of the worker with `alive` added; None when there never was one."""
        raw = self.client.get(self.keys("worker"))
        if raw is None:
            return None
        status: dict[str, Any] = load_json(raw)
        return {**status, "alive": bool(self.client.exists(self.keys("alive", status["worker_id"])))}

    def publish_checkpoint(self, document: Mapping[str, Any]) -> None:
        """Called by the worker after it opened the store, and after each sync and rollback.

        `document`: JSON; by agreement `directory`, `head` (newest generation), `generations` (newest first, each
        with `generation`, `weight_version`, `created_at`, `blocks_changed`, `bytes_written`, `jobs`) and `last_sync`
        (a report).
        """
        self.client.set(self.keys("checkpoint"), json.dumps(dict(document), default=str))

    def checkpoint(self) -> dict[str, Any] | None:
        """What the worker published last about the checkpoint."""
        raw = self.client.get(self.keys("checkpoint"))
        return None if raw is None else dict(load_json(raw))
