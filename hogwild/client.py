"""Python client of the API, synchronous and asynchronous.

    from hogwild import Client

    with Client("http://127.0.0.1:8100") as client:
        job = client.train(context_ids=[…], continuation_ids=[…], steps=8)
        job = client.wait(job.id, progress=True)
        client.checkpoint()

Requests are repeated when the network, Redis or a restart gets in between; jobs, saves, rollbacks and verifications
carry an idempotency key, so that a repeated request is the same one. Errors of the API come as the classes of
`hogwild.errors`.
"""

import asyncio
import json
import math
import random
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import httpx

from hogwild.config import is_loopback
from hogwild.errors import CheckpointError, HogwildError, InvalidRequest, ServiceUnavailable

DEFAULT_URL = "http://127.0.0.1:8100"
RETRY_STATUSES = (429, 502, 503, 504)
OPERATION_WAIT_S = 30  # of one long poll; below the minute after which proxies close a silent connection
FINAL = ("succeeded", "failed", "cancelled")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training job at one moment. `data` is the whole answer of the API."""

    id: str
    state: str
    data: Mapping[str, Any] = field(repr=False)
    paused: bool = False
    samples: int = 0
    tokens: int = 0
    steps: int | None = None  # of the plan; None until a worker has planned the job
    steps_applied: int = 0
    steps_interrupted: int = 0
    tokens_trained: int = 0
    seconds: float = 0.0
    loss_first: float | None = None
    loss_last: float | None = None
    weight_version_first: int | None = None
    weight_version_last: int | None = None
    error: Mapping[str, Any] | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def final(self) -> bool:
        """Nothing will happen to it any more."""
        return self.state in FINAL

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> "Job":
        """From the API's JSON: of a job, or of the answer to a submit."""
        if not isinstance(data.get("steps"), dict):
            return cls(id=data["id"], state=data["state"], samples=data["samples"], tokens=data["tokens"], data=data)
        return cls(
            id=data["id"], state=data["state"], data=data, paused=data["paused"], samples=data["samples"],
            tokens=data["tokens"], steps=data["steps"]["total"], steps_applied=data["steps"]["applied"],
            steps_interrupted=data["steps"]["interrupted"], tokens_trained=data["tokens_trained"],
            seconds=data["seconds"], loss_first=data["loss"]["first"], loss_last=data["loss"]["last"],
            weight_version_first=data["weight_version"]["first"], weight_version_last=data["weight_version"]["last"],
            error=data["error"], metadata=data["metadata"])


@dataclass(frozen=True)
class Event:
    """Something that happened to a job.

    `type`: `queued`, `running`, `begun` (its first step), `step`, …, and last `succeeded`, `failed` or `cancelled`.
    """

    id: str
    type: str
    data: Mapping[str, Any]

    @property
    def time(self) -> float:
        """When, in seconds since the epoch by Redis' clock (to the millisecond)."""
        return int(self.id.partition("-")[0]) / 1000


@dataclass(frozen=True)
class _Call(Generic[T]):
    """One request and what to make of its answer."""

    method: str
    path: str
    parse: Callable[[Any], T]
    content: bytes | None = None
    params: Mapping[str, Any] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


def _post(path: str, parse: Callable[[Any], T], body: Mapping[str, Any] | None, idempotency_key: str,
          params: Mapping[str, Any] | None = None) -> _Call[T]:
    """A call with a JSON body that may be repeated. Raises InvalidRequest."""
    headers, content = {"Idempotency-Key": idempotency_key}, None
    if body is not None:
        headers["Content-Type"] = "application/json"
        try:
            content = json.dumps(body, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise InvalidRequest(f"The request can't be written as JSON: {error}.") from error
    return _Call("POST", path, parse, content=content, params=params, headers=headers)


def _listed(value: Any) -> Any:
    """Ids or weights as a list. What can't be one is left as it is: the API names the field that is wrong."""
    return list(value) if isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping)) else value


def _samples(samples: Sequence[Any]) -> list[dict[str, Any]]:
    """Samples as JSON: mappings with the names of the API, or (context_ids, continuation_ids[, weights])."""
    found: list[Mapping[str, Any]] = []
    try:
        for sample in samples:
            found.append(sample if isinstance(sample, Mapping) else
                         dict(zip(("context_ids", "continuation_ids", "weights"), sample, strict=False)))
    except TypeError as error:
        raise InvalidRequest("Samples are a list of mappings with context_ids and continuation_ids, or of pairs: "
                             f"sample {len(found)} is neither.") from error
    return [{name: _listed(value) for name, value in sample.items() if value is not None} for sample in found]


class _Calls:
    """The API's operations, without the network: what both clients share."""

    @staticmethod
    def train(context_ids: Sequence[int] | None, continuation_ids: Sequence[int] | None,
              samples: Sequence[Any] | None, weights: Sequence[float] | None, idempotency_key: str | None,
              options: Mapping[str, Any]) -> _Call[Job]:
        body: dict[str, Any] = {k: v for k, v in options.items() if v is not None}
        if samples is not None:
            body["samples"] = _samples(samples)
        for name, value in (("context_ids", context_ids), ("continuation_ids", continuation_ids),
                            ("weights", weights)):
            if value is not None:
                body[name] = _listed(value)
        return _post("/train", Job.parse, body, str(idempotency_key or uuid.uuid4().hex))

    @staticmethod
    def job(job_id: str) -> _Call[Job]:
        return _Call("GET", f"/train/{job_id}", Job.parse)

    @staticmethod
    def control(job_id: str, verb: str) -> _Call[Job]:
        return _Call("POST", f"/train/{job_id}/{verb}", Job.parse)

    @staticmethod
    def page(cursor: str | None, limit: int, state: str | None, metadata: Mapping[str, str] | None
             ) -> _Call[tuple[list[Job], str | None]]:
        params: dict[str, Any] = {"limit": limit}
        if cursor is not None:
            params["cursor"] = cursor
        if state is not None:
            params["state"] = state
        if metadata:
            params["metadata"] = [f"{name}:{value}" for name, value in metadata.items()]
        return _Call("GET", "/train", lambda d: ([Job.parse(j) for j in d["data"]], d["next_cursor"]), params=params)

    @staticmethod
    def get(path: str) -> _Call[dict[str, Any]]:
        return _Call("GET", path, dict)

    @staticmethod
    def operation(path: str, body: Mapping[str, Any] | None, wait: int) -> _Call[dict[str, Any]]:
        return _post(path, dict, body, uuid.uuid4().hex, {"wait": wait})

    @staticmethod
    def poll(operation_id: str, wait: int) -> _Call[dict[str, Any]]:
        return _Call("GET", f"/checkpoint/operations/{operation_id}", dict, params={"wait": wait})

    @staticmethod
    def cancel_operation(operation_id: str) -> _Call[dict[str, Any]]:
        return _Call("POST", f"/checkpoint/operations/{operation_id}/cancel", dict)


class _Patience:
    """How long an operation is waited for."""

    def __init__(self, wait: bool, timeout: float | None) -> None:
        self.wait = wait
        self.timeout = math.inf if timeout is None else timeout
        self.deadline = time.monotonic() + self.timeout

    def poll_s(self) -> int:
        """Seconds that the server may take for its next answer."""
        return math.ceil(max(0, min(OPERATION_WAIT_S, self.deadline - time.monotonic()))) if self.wait else 0

    def ask_again(self, operation: Mapping[str, Any]) -> bool:
        """Whether the end is still to be waited for. Raises TimeoutError."""
        if not self.wait or operation["state"] not in ("pending", "running"):
            return False
        if time.monotonic() >= self.deadline:
            raise TimeoutError(f"{operation['id']} is {operation['state']} after {self.timeout:g} s; it stays queued, "
                               "and is done when a worker is there for it")
        return True

    def answer(self, operation: Mapping[str, Any]) -> dict[str, Any]:
        """The report, or the operation when it was not waited for."""
        return _result(operation) if self.wait else dict(operation)


def _result(operation: Mapping[str, Any]) -> dict[str, Any]:
    if operation["state"] == "failed":
        error = operation.get("error") or {}
        raise CheckpointError(error.get("message") or "The worker gave no reason.", operation=operation["id"])
    return dict(operation.get("result") or {})


def error_of(response: httpx.Response) -> HogwildError:
    """The error of a problem document: the class that the server raised, with its message and details."""
    try:
        document = response.json()
    except ValueError:
        document = {}
    if not isinstance(document, dict):
        document = {}
    slug = str(document.get("type", "")).rpartition(":")[2]
    known = {"status", "title", "type", "detail", "error", "message"}
    details = {k: v for k, v in document.items() if k not in known}
    message = document.get("detail") or f"{response.request.url} answered {response.status_code}."
    return _class_of(slug, response.status_code)(str(message), **details)


def _class_of(slug: str, status: int) -> type[HogwildError]:
    classes = [HogwildError]
    for one in classes:
        classes += one.__subclasses__()
    named = [c for c in classes if c.slug == slug and c is not HogwildError]
    alike = [c for c in classes if c.status == status and c is not HogwildError and status != 500]
    return (named or alike or [HogwildError])[0]


class _Base:
    """What both clients know: where the API is, the key, and when to try again."""

    def __init__(self, url: str = DEFAULT_URL, *, api_key: str | None = None, timeout: float = 60.0,
                 retries: int = 6) -> None:
        """`timeout`: seconds for one request. `retries`: attempts after the first, up to 10 s apart."""
        self.url = url.rstrip("/")
        self.retries = retries
        self._options: dict[str, Any] = {
            "base_url": self.url, "timeout": timeout,
            "trust_env": not is_loopback(httpx.URL(self.url).host),  # a proxy would look for the API on its own machine
            "headers": {"Authorization": f"Bearer {api_key}"} if api_key else {}}

    def _pause(self, attempt: int, response: httpx.Response | None) -> float | None:
        """Seconds until the next attempt, or None when there is none."""
        if attempt >= self.retries:
            return None
        backoff: float = min(10.0, 0.2 * 2.0**attempt) * random.uniform(0.5, 1.0)
        if response is None:
            return backoff
        if response.status_code not in RETRY_STATUSES:
            return None
        asked = response.headers.get("retry-after", "")
        return min(60.0, max(backoff, float(asked))) if asked.isdigit() else backoff

    def _away(self, error: Exception) -> ServiceUnavailable:
        return ServiceUnavailable(f"No API answers at {self.url} ({type(error).__name__}): is 'hogwild up' running?")


def _parse(call: _Call[T], response: httpx.Response) -> T:
    if response.is_error:
        raise error_of(response)
    try:
        answer = response.json()
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise HogwildError(f"{response.request.url} answered {response.status_code} without JSON: is that Hogwild's "
                           "API?")
    return call.parse(answer)


class Client(_Base):
    """Synchronous client; a context manager."""

    def __init__(self, url: str = DEFAULT_URL, **options: Any) -> None:
        """Options: see `_Base`."""
        super().__init__(url, **options)
        self._http = httpx.Client(**self._options)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def _do(self, call: _Call[T]) -> T:
        attempt = 0
        while True:
            response = None
            try:
                response = self._http.request(call.method, call.path, content=call.content, params=call.params,
                                              headers=call.headers)
            except httpx.TransportError as error:
                pause = self._pause(attempt, None)
                if pause is None:
                    raise self._away(error) from error
            else:
                pause = self._pause(attempt, response)
                if pause is None:
                    return _parse(call, response)
            time.sleep(pause)
            attempt += 1

    def train(self, *, context_ids: Sequence[int] | None = None, continuation_ids: Sequence[int] | None = None,
              samples: Sequence[Any] | None = None, weights: Sequence[float] | None = None,
              idempotency_key: str | None = None, **options: Any) -> Job:
        """Submit a job; returns when it is on the server's disk.

        `samples`: mappings like {"context_ids": […], "continuation_ids": […]}, or pairs. `options`: `learning_rate`,
        `steps`, `epochs`, `optimizer`, `metadata`, `priority`, … as in `POST /train`. Raises InvalidRequest,
        TooManyRequests, ServiceUnavailable.
        """
        return self._do(_Calls.train(context_ids, continuation_ids, samples, weights, idempotency_key, options))

    def job(self, job_id: str) -> Job:
        """A job as it is now. Raises NotFound."""
        return self._do(_Calls.job(job_id))

    def losses(self, job_id: str) -> list[float | None]:
        """Loss of each of the job's last 1,000 applied steps; None where one was not finite."""
        return list(self.job(job_id).data.get("losses") or [])

    def jobs(self, *, state: str | None = None, metadata: Mapping[str, str] | None = None,
             page_size: int = 50) -> Iterator[Job]:
        """All jobs, newest first, read page by page."""
        cursor: str | None = None
        while True:
            page, cursor = self._do(_Calls.page(cursor, page_size, state, metadata))
            yield from page
            if cursor is None:
                return

    def cancel(self, job_id: str) -> Job:
        """Cancel a job: at once when it waits, after its present step when it runs. Raises NotFound, Conflict."""
        return self._do(_Calls.control(job_id, "cancel"))

    def pause(self, job_id: str) -> Job:
        """Pause a job. Raises NotFound, Conflict."""
        return self._do(_Calls.control(job_id, "pause"))

    def resume(self, job_id: str) -> Job:
        """Let a paused job go on. Raises NotFound, Conflict."""
        return self._do(_Calls.control(job_id, "resume"))

    def wait(self, job_id: str, *, timeout: float | None = None, poll: float = 0.5, progress: bool = False) -> Job:
        """Wait until a job has ended, in whatever way. Raises TimeoutError after `timeout` seconds.

        `poll`: seconds between looks. `progress`: show a bar on stderr.
        """
        from hogwild.progress import job_bar

        deadline = None if timeout is None else time.monotonic() + timeout
        with job_bar(progress) as update:
            while True:
                job = self.job(job_id)
                update(job)
                if job.final:
                    return job
                if deadline is not None and time.monotonic() > deadline:
                    raise TimeoutError(f"{job_id} is {job.state} after {timeout:g} s")
                time.sleep(poll)

    def events(self, job_id: str, *, after: str | None = None) -> Iterator[Event]:
        """What happened to a job and what happens, until it ends; goes on by itself after a lost connection.

        `after`: id of an event that was seen.
        """
        attempt = 0
        while True:
            response, seen = None, False
            try:
                headers = {"Last-Event-ID": after} if after else {}
                with self._http.stream("GET", f"/train/{job_id}/events", headers=headers,
                                       timeout=httpx.Timeout(30, read=60)) as response:
                    if response.is_error:
                        response.read()
                    else:
                        parser = _EventParser()
                        for line in response.iter_lines():
                            if event := parser.feed(line):
                                attempt, after, seen = 0, event.id, True
                                yield event
                                if event.type in FINAL:
                                    return
                if response.is_success:
                    # The stream ended before the job: with the server, or everything had been seen before.
                    if not seen and self.job(job_id).final:
                        return
                    response = None
            except httpx.TransportError as error:
                pause = self._pause(attempt, None)
                if pause is None:
                    raise self._away(error) from error
            else:
                pause = self._pause(attempt, response)
                if pause is None:
                    raise error_of(response) if response is not None else self._away(EOFError())
            time.sleep(pause)
            attempt += 1

    def status(self) -> dict[str, Any]:
        """Model, worker, queue, running job and checkpoint."""
        return self._do(_Calls.get("/train/status"))

    def generations(self) -> dict[str, Any]:
        """Saved generations and what is not saved yet (`GET /checkpoint`)."""
        return self._do(_Calls.get("/checkpoint"))

    def checkpoint(self, *, wait: bool = True, timeout: float | None = None) -> dict[str, Any]:
        """Save the live weights now. Returns the report; with `wait=False` the operation.

        Without a worker it waits for one: for `timeout` seconds, then TimeoutError names the operation, which stays
        queued. Raises CheckpointError, TooManyRequests.
        """
        return self._operation("/checkpoint", None, wait, timeout)

    def verify(self, *, wait: bool = True, timeout: float | None = None) -> dict[str, Any]:
        """Compare files and live weights with the last generation's fingerprints; the report's `ok` says how it went.

        `unsaved`: the live weights have steps that are not saved yet, and are meant to differ. `timeout`: as of
        `checkpoint`. Raises CheckpointError.
        """
        return self._operation("/checkpoint/verify", None, wait, timeout)

    def rollback(self, generation: int, *, wait: bool = True, timeout: float | None = None) -> dict[str, Any]:
        """Return to a generation, on disk and in the live weights. `timeout`: as of `checkpoint`.

        Raises InvalidRequest, CheckpointError.
        """
        return self._operation("/checkpoint/rollback", {"generation": generation}, wait, timeout)

    def operation(self, operation_id: str, *, wait: bool = True, timeout: float | None = None) -> dict[str, Any]:
        """An operation that was asked for before: its report, or with `wait=False` the operation as it is now.

        Raises NotFound, CheckpointError, TimeoutError.
        """
        patience = _Patience(wait, timeout)
        return self._finished(self._do(_Calls.poll(operation_id, patience.poll_s())), patience)

    def cancel_operation(self, operation_id: str) -> dict[str, Any]:
        """Take back an operation that no worker has begun. Raises NotFound, Conflict."""
        return self._do(_Calls.cancel_operation(operation_id))

    def _operation(self, path: str, body: Mapping[str, Any] | None, wait: bool, timeout: float | None
                   ) -> dict[str, Any]:
        patience = _Patience(wait, timeout)
        return self._finished(self._do(_Calls.operation(path, body, patience.poll_s())), patience)

    def _finished(self, operation: dict[str, Any], patience: _Patience) -> dict[str, Any]:
        while patience.ask_again(operation):
            operation = self._do(_Calls.poll(operation["id"], patience.poll_s()))
        return patience.answer(operation)


class AsyncClient(_Base):
    """The same for asyncio; an asynchronous context manager."""

    def __init__(self, url: str = DEFAULT_URL, **options: Any) -> None:
        """Options: see `_Base`."""
        super().__init__(url, **options)
        self._http = httpx.AsyncClient(**self._options)

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def _do(self, call: _Call[T]) -> T:
        attempt = 0
        while True:
            response = None
            try:
                response = await self._http.request(call.method, call.path, content=call.content, params=call.params,
                                                    headers=call.headers)
            except httpx.TransportError as error:
                pause = self._pause(attempt, None)
                if pause is None:
                    raise self._away(error) from error
            else:
                pause = self._pause(attempt, response)
                if pause is None:
                    return _parse(call, response)
            await asyncio.sleep(pause)
            attempt += 1

    async def train(self, *, context_ids: Sequence[int] | None = None, continuation_ids: Sequence[int] | None = None,
                    samples: Sequence[Any] | None = None, weights: Sequence[float] | None = None,
                    idempotency_key: str | None = None, **options: Any) -> Job:
        """See `Client.train`."""
        return await self._do(_Calls.train(context_ids, continuation_ids, samples, weights, idempotency_key, options))

    async def job(self, job_id: str) -> Job:
        """See `Client.job`."""
        return await self._do(_Calls.job(job_id))

    async def losses(self, job_id: str) -> list[float | None]:
        """See `Client.losses`."""
        return list((await self.job(job_id)).data.get("losses") or [])

    async def jobs(self, *, state: str | None = None, metadata: Mapping[str, str] | None = None,
                   page_size: int = 50) -> AsyncIterator[Job]:
        """See `Client.jobs`."""
        cursor: str | None = None
        while True:
            page, cursor = await self._do(_Calls.page(cursor, page_size, state, metadata))
            for job in page:
                yield job
            if cursor is None:
                return

    async def cancel(self, job_id: str) -> Job:
        """See `Client.cancel`."""
        return await self._do(_Calls.control(job_id, "cancel"))

    async def pause(self, job_id: str) -> Job:
        """See `Client.pause`."""
        return await self._do(_Calls.control(job_id, "pause"))

    async def resume(self, job_id: str) -> Job:
        """See `Client.resume`."""
        return await self._do(_Calls.control(job_id, "resume"))

    async def wait(self, job_id: str, *, timeout: float | None = None, poll: float = 0.5,
                   progress: bool = False) -> Job:
        """See `Client.wait`."""
        from hogwild.progress import job_bar

        with job_bar(progress) as update:
            async with asyncio.timeout(timeout):
                while True:
                    job = await self.job(job_id)
                    update(job)
                    if job.final:
                        return job
                    await asyncio.sleep(poll)

    async def events(self, job_id: str, *, after: str | None = None) -> AsyncIterator[Event]:
        """See `Client.events`."""
        attempt = 0
        while True:
            response, seen = None, False
            try:
                headers = {"Last-Event-ID": after} if after else {}
                async with self._http.stream("GET", f"/train/{job_id}/events", headers=headers,
                                             timeout=httpx.Timeout(30, read=60)) as response:
                    if response.is_error:
                        await response.aread()
                    else:
                        parser = _EventParser()
                        async for line in response.aiter_lines():
                            if event := parser.feed(line):
                                attempt, after, seen = 0, event.id, True
                                yield event
                                if event.type in FINAL:
                                    return
                if response.is_success:
                    if not seen and (await self.job(job_id)).final:
                        return
                    response = None
            except httpx.TransportError as error:
                pause = self._pause(attempt, None)
                if pause is None:
                    raise self._away(error) from error
            else:
                pause = self._pause(attempt, response)
                if pause is None:
                    raise error_of(response) if response is not None else self._away(EOFError())
            await asyncio.sleep(pause)
            attempt += 1

    async def status(self) -> dict[str, Any]:
        """See `Client.status`."""
        return await self._do(_Calls.get("/train/status"))

    async def generations(self) -> dict[str, Any]:
        """See `Client.generations`."""
        return await self._do(_Calls.get("/checkpoint"))

    async def checkpoint(self, *, wait: bool = True, timeout: float | None = None) -> dict[str, Any]:
        """See `Client.checkpoint`."""
        return await self._operation("/checkpoint", None, wait, timeout)

    async def verify(self, *, wait: bool = True, timeout: float | None = None) -> dict[str, Any]:
        """See `Client.verify`."""
        return await self._operation("/checkpoint/verify", None, wait, timeout)

    async def rollback(self, generation: int, *, wait: bool = True, timeout: float | None = None) -> dict[str, Any]:
        """See `Client.rollback`."""
        return await self._operation("/checkpoint/rollback", {"generation": generation}, wait, timeout)

    async def operation(self, operation_id: str, *, wait: bool = True, timeout: float | None = None) -> dict[str, Any]:
        """See `Client.operation`."""
        patience = _Patience(wait, timeout)
        return await self._finished(await self._do(_Calls.poll(operation_id, patience.poll_s())), patience)

    async def cancel_operation(self, operation_id: str) -> dict[str, Any]:
        """See `Client.cancel_operation`."""
        return await self._do(_Calls.cancel_operation(operation_id))

    async def _operation(self, path: str, body: Mapping[str, Any] | None, wait: bool, timeout: float | None
                         ) -> dict[str, Any]:
        patience = _Patience(wait, timeout)
        return await self._finished(await self._do(_Calls.operation(path, body, patience.poll_s())), patience)

    async def _finished(self, operation: dict[str, Any], patience: _Patience) -> dict[str, Any]:
        while patience.ask_again(operation):
            operation = await self._do(_Calls.poll(operation["id"], patience.poll_s()))
        return patience.answer(operation)


class _EventParser:
    """Lines of an event stream to events (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

    def __init__(self) -> None:
        self._fields: dict[str, str] = {}

    def feed(self, line: str) -> Event | None:
        """The event that this line completes, if it does."""
        if line:
            name, _, value = line.partition(":")
            if name:
                self._fields[name] = value.removeprefix(" ")
            return None
        fields, self._fields = self._fields, {}
        if "data" not in fields or "id" not in fields:
            return None
        return Event(fields["id"], fields.get("event", "message"), json.loads(fields["data"]))
