"""What the routes work with: connections, ledger, registry. Made once per process, connected on first use."""

import asyncio
import json
import threading
import time
import weakref
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from hogwild.api.auth import ApiKey, keys_of
from hogwild.api.events import Hub
from hogwild.config import Settings
from hogwild.errors import ManifestError, ServiceUnavailable, TooManyRequests
from hogwild.runtime_files import read_private, write_private
from hogwild.tasks.announce import Announcer
from hogwild.tasks.app import make_app
from hogwild.tasks.connections import api_client, async_client, redis_url
from hogwild.tasks.dirty import Dirty
from hogwild.tasks.files import Files
from hogwild.tasks.ledger import Ledger
from hogwild.tasks.messages import Messages
from hogwild.tasks.operations import Operations
from hogwild.tasks.registry import ModelInfo, Registry

MODEL_CACHE_S = 2.0  # a submit needs the vocabulary's size, which changes when another model is served

# Generic cell rate: one number per key says when its next request would be on time; a burst of a tenth of a minute's
# requests may come early. KEYS: key. ARGV: seconds between requests, seconds of burst
_RATE = """
local t = redis.call('TIME')
local now = t[1] + t[2] / 1e6
local due = math.max(tonumber(redis.call('GET', KEYS[1]) or now), now)
local step, burst = tonumber(ARGV[1]), tonumber(ARGV[2])
if due - now > burst then return tostring(due - now - burst) end
redis.call('SET', KEYS[1], string.format('%.6f', due + step), 'PX', math.ceil((due + step - now + 1) * 1000))
return '0'
"""


class Service:
    """Everything behind the routes of one served model. Thread-safe."""

    def __init__(self, settings: Settings, extra_keys: Iterable[str] = ()) -> None:
        self.settings = settings
        self.url = redis_url(settings)
        self.keys: list[ApiKey] = keys_of(settings, extra_keys)
        self.client = api_client(self.url)
        app = make_app(settings)
        messages = Messages(app, settings.queue)
        self.ledger = Ledger(self.client, settings, messages, Announcer(app, settings.queue))
        self.registry = Registry(self.client, settings.model_name)
        self.operations = Operations(self.client, messages, settings.model_name)
        self.files = Files(self.client, settings.model_name)
        self.dirty = Dirty(self.client, settings.model_name)
        self._rate = self.client.register_script(_RATE)
        self._model: tuple[float, ModelInfo] | None = None
        self._lock = threading.Lock()
        # A connection of asyncio belongs to its loop; tests and vLLM may run more than one.
        self._hubs: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Hub] = weakref.WeakKeyDictionary()

    def model(self) -> ModelInfo:
        """The served model, at most MODEL_CACHE_S old. Raises ServiceUnavailable when none was ever attached."""
        with self._lock:
            if self._model is not None and time.monotonic() - self._model[0] < MODEL_CACHE_S:
                return self._model[1]
        info = self.registry.model()
        with self._lock:
            self._model = (time.monotonic(), info)
        return info

    def hub(self) -> Hub:
        """The reader of events of the running loop."""
        loop = asyncio.get_running_loop()
        if loop not in self._hubs:
            self._hubs[loop] = Hub(async_client(self.url), self.ledger.keys)
        return self._hubs[loop]

    async def close(self) -> None:
        """Close connections of the running loop and the shared ones."""
        hub = self._hubs.pop(asyncio.get_running_loop(), None)
        if hub is not None:
            await hub.close()
            await hub.client.aclose()
        self.client.close()

    def check_rate(self, key: ApiKey) -> None:
        """Raises TooManyRequests when this key sends more than `rate_limit` requests a minute."""
        limit = self.settings.rate_limit
        if limit <= 0:
            return
        step = 60.0 / limit
        wait = float(self._rate(keys=[self.ledger.keys("rate", key.name)], args=[step, max(step, 6.0)]))
        if wait > 0:
            raise TooManyRequests(f"The key {key.name!r} may send {limit} requests a minute.", retry_after=wait,
                                  limit=limit)

    def ready(self) -> None:
        """Raises redis.RedisError or ServiceUnavailable when a job could not be accepted now."""
        self.client.ping()
        info = self.client.info("persistence")
        if info.get("aof_last_write_status", "ok") != "ok":
            raise ServiceUnavailable("Redis can't write its append-only file: is the disk full?", retry_after=30)
        self.registry.model()


SHARED = ("rate_limit", "queue_limit", "queue_bytes", "max_sample_tokens", "max_job_samples", "job_retention_s")
"""Settings of a deployment that hold on a vLLM's port as well, whatever that process' environment says."""


def publish(settings: Settings) -> None:
    """Tell the routes on the port of a vLLM that was started before this deployment what they must know of it."""
    known = {
        "redis_url": settings.redis_url,
        "keys": [asdict(key) for key in keys_of(settings)],
        "settings": settings.model_dump(mode="json", include=set(SHARED)),
    }
    write_private(settings.deployment_file, json.dumps(known))


class LateService:
    """A `Service` of the deployment that `hogwild up --no-vllm` starts after vLLM: made when it is there, anew when it
    is another one. Handlers use it as they use a Service; until then each of its parts raises ServiceUnavailable.

    `own_keys` are valid besides the deployment's.
    """

    def __init__(self, settings: Settings, extra_keys: Iterable[str] = ()) -> None:
        self.own_keys = keys_of(settings, extra_keys)
        self._settings = settings
        self._made: tuple[str, Service] | None = None
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._service(), name)

    @property
    def keys(self) -> list[ApiKey]:
        """Those of the deployment that is there, and our own."""
        try:
            return self._service().keys
        except ServiceUnavailable:
            return self.own_keys

    @property
    def settings(self) -> Settings:
        """The deployment's, as far as it shares them."""
        try:
            return self._service().settings
        except ServiceUnavailable:
            return self._settings

    def _service(self) -> Service:
        try:
            text = read_private(self._settings.deployment_file).decode()
        except ManifestError:
            raise ServiceUnavailable(
                "There is no Redis for vLLM's port: 'hogwild up --no-vllm' brings one; for a Redis of your own, start "
                "vLLM with HOGWILD_REDIS_URL.", retry_after=10) from None
        with self._lock:
            if self._made is None or self._made[0] != text:
                known = json.loads(text)
                made = Service(self._settings.model_copy(update={**known["settings"], "redis_url": known["redis_url"]}))
                made.keys = [*(ApiKey(**key) for key in known["keys"]), *self.own_keys]
                self._made = text, made
            return self._made[1]
