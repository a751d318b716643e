"""Errors as `application/problem+json` (RFC 9457), on routes of ours only.

The router is also mounted on vLLM's application, whose own errors must stay as its clients know them. So nothing is
registered on the application: the route class turns every error of its handler into a problem document, limits the
body while it is read, and gives each request an id.
"""

import asyncio
import json
import logging
import re
import secrets
from collections.abc import Awaitable, Callable, Coroutine
from http import HTTPStatus
from typing import Any

import redis
from fastapi import params
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive

from hogwild.errors import HogwildError, PayloadTooLarge, ServiceUnavailable

log = logging.getLogger("hogwild.api")

MEDIA_TYPE = "application/problem+json"
REQUEST_ID = "X-Request-ID"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# One chunk must arrive in this time and the whole body in the second: a client that trickles bytes holds memory.
CHUNK_TIMEOUT_S = 20.0
BODY_TIMEOUT_S = 120.0
MOST_ERRORS = 20  # of one document; a hundred thousand wrong ids need no longer answer than twenty

# What every operation may answer besides its success: for the OpenAPI document. Inline, because on vLLM's application
# there is no component of ours to refer to.
PROBLEM_SCHEMA: dict[str, Any] = {
    "type": "object",
    "title": "Problem",
    "description": "RFC 9457 problem document.",
    "required": ["type", "title", "status", "detail", "request_id"],
    "properties": {
        "type": {"type": "string", "examples": ["urn:hogwild:problem:invalid-request"]},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string", "description": "What went wrong and what to do about it."},
        "request_id": {"type": "string"},
        "errors": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["pointer", "field", "message"],
                "properties": {
                    "pointer": {"type": "string", "examples": ["/samples/3/continuation_ids/0"]},
                    "field": {"type": "string", "examples": ["continuation_ids"]},
                    "message": {"type": "string"},
                    "limit": {"description": "The limit that was passed, where there is one."},
                },
            },
        },
    },
}
_DESCRIPTIONS = {
    400: "The request could not be read.", 401: "A valid API key is needed.", 403: "This key may not do that.",
    404: "There is no such thing.", 405: "Not with this method.", 408: "The body did not arrive in time.",
    409: "Not possible in the present state.", 413: "The body is too large.",
    415: "The body is not of the type that is read here.", 422: "The request can't be accepted as it is.",
    429: "The queue is full, or this key sent too many requests.", 500: "A defect of the server.",
    502: "vLLM did not answer as expected.", 503: "Redis or the model is not available right now.",
}
_RETRY_AFTER = {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds to wait."}}


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI entries for problem documents with these statuses; those that any route can answer are added."""
    found: dict[int | str, dict[str, Any]] = {}
    for status in sorted({401, 403, 422, 429, 503, *statuses}):
        found[status] = {"description": _DESCRIPTIONS[status], "content": {MEDIA_TYPE: {"schema": PROBLEM_SCHEMA}}}
        if status in (429, 503):
            found[status]["headers"] = _RETRY_AFTER
    return found


class ProblemResponse(JSONResponse):
    """A problem document. ASCII only: an error can quote half a surrogate pair, which has no UTF-8."""

    media_type = MEDIA_TYPE

    def render(self, content: Any) -> bytes:
        return json.dumps(content).encode()


def problem(status: int, slug: str, title: str, detail: str, *, request_id: str, path: str = "",
            headers: dict[str, str] | None = None, **details: Any) -> JSONResponse:
    """A problem document. Below /v1 it also has the `error` member that OpenAI's clients read."""
    document = {"type": f"urn:hogwild:problem:{slug}", "title": title, "status": status, "detail": detail,
                "request_id": request_id, **details}
    headers = {**(headers or {}), REQUEST_ID: request_id}
    if "retry_after" in details:
        headers["Retry-After"] = str(max(1, round(details["retry_after"])))
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if path.startswith("/v1/"):
        errors = details.get("errors") or [{}]
        document["error"] = {"message": detail, "type": "server_error" if status >= 500 else "invalid_request_error",
                             "param": details.get("field") or errors[0].get("field"), "code": slug}
    return ProblemResponse(document, status, headers)


def request_id_of(request: Request) -> str:
    """The client's X-Request-ID when it is a sane one, else one of ours; the same for the whole request."""
    state = request.scope.setdefault("state", {})
    if "hogwild_request_id" not in state:
        given = request.headers.get(REQUEST_ID, "")
        state["hogwild_request_id"] = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
    return str(state["hogwild_request_id"])


def problem_of(error: Exception, request: Request) -> JSONResponse:
    """The problem document of any exception. Unexpected ones are logged; their text stays here."""
    request_id, path = request_id_of(request), request.url.path
    if isinstance(error, HTTPException) and isinstance(error.__cause__, HogwildError):
        error = error.__cause__  # FastAPI wraps what is raised while it reads the body
    if isinstance(error, redis.RedisError) and not _our_fault(error):
        log.warning("request %s: Redis: %s", request_id, error)
        error = ServiceUnavailable("Redis does not answer, so nothing was accepted for certain: try again later, with "
                                   "the same Idempotency-Key if you sent one.", retry_after=2)
    if isinstance(error, HogwildError):
        if error.status >= 500 and not isinstance(error, ServiceUnavailable):
            log.error("request %s failed", request_id, exc_info=error)
        return problem(error.status, error.slug, error.title(), error.message, request_id=request_id, path=path,
                       **error.details)
    if isinstance(error, RequestValidationError):
        errors = [_field_error(e) for e in error.errors()]
        first = errors[0]
        more = f" ({len(errors) - 1} more)" if len(errors) > 1 else ""
        return problem(422, "invalid-request", "The request can't be accepted as it is",
                       f"{first['pointer'] or 'The body'}: {first['message']}{more}", request_id=request_id, path=path,
                       errors=errors[:MOST_ERRORS])
    if isinstance(error, HTTPException):
        phrase = HTTPStatus(error.status_code).phrase
        return problem(error.status_code, phrase.lower().replace(" ", "-"), phrase, str(error.detail),
                       request_id=request_id, path=path, headers=dict(error.headers or {}))
    log.error("request %s failed", request_id, exc_info=error)
    return problem(500, "internal", "Internal error", f"A defect of the server; its log has the details under request "
                   f"id {request_id}.", request_id=request_id, path=path)


def _our_fault(error: redis.RedisError) -> bool:
    """Whether Redis is well and was asked for something that makes no sense."""
    return type(error) is redis.ResponseError and error.status_code == "ERR"


def _field_error(error: dict[str, Any]) -> dict[str, Any]:
    if error["type"] == "json_invalid":
        reason = (error.get("ctx") or {}).get("error", "it can't be parsed")
        return {"pointer": "", "field": "body", "message": f"is not JSON: {reason} at character {error['loc'][-1]}"}
    location = [str(part) for part in error["loc"]]
    where, path = (location[0], location[1:]) if location else ("body", [])
    named = [part for part in path if not part.isdigit()]
    found = {"pointer": "/" + "/".join(part.replace("~", "~0").replace("/", "~1") for part in path) if path else "",
             "field": named[-1] if named else where, "message": error["msg"].removeprefix("Value error, ")}
    if where not in ("body", "query", "path", "header"):
        found["field"] = where
    limits = {key: value for key, value in (error.get("ctx") or {}).items()
              if key in ("ge", "gt", "le", "lt", "max_length", "min_length", "expected", "pattern")}
    if limits:
        found["limit"] = next(iter(limits.values()))
    return found


class _LimitedReceive:
    """Reads a request's body within limits of size and time."""

    def __init__(self, receive: Receive, limit: int, advice: str) -> None:
        self.receive, self.limit, self.advice, self.size = receive, limit, advice, 0
        self.deadline: float | None = None
        self.done = False

    async def __call__(self) -> Message:
        if self.done:  # what follows the body is the wait for a disconnect, which has no limit
            return await self.receive()
        loop = asyncio.get_running_loop()
        self.deadline = self.deadline or loop.time() + BODY_TIMEOUT_S
        try:
            async with asyncio.timeout_at(min(self.deadline, loop.time() + CHUNK_TIMEOUT_S)):
                message = await self.receive()
        except TimeoutError:
            raise HTTPException(408, "The request's body did not arrive in time.") from None
        if message["type"] == "http.request":
            self.size += len(message.get("body", b""))
            if self.size > self.limit:
                raise PayloadTooLarge(f"The request body is larger than {self.limit} bytes: {self.advice}",
                                      limit=self.limit)
            self.done = not message.get("more_body", False)
        else:
            self.done = True
        return message


Guard = Callable[[Request], Awaitable[None]]


def route_class(max_body_bytes: int, guard: Guard, *, most_json: int | None = None) -> type[APIRoute]:
    """The class of our routes. `guard` decides about each request before a byte of its body is read.

    `most_json`: limit of JSON bodies, where it is a smaller one. They are read at once; files come piece by piece.
    """

    class HogwildRoute(APIRoute):
        """Problem documents, body limits and request ids, for our routes alone."""

        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handler = super().get_route_handler()
            reads_json = self.body_field is not None and not isinstance(self.body_field.field_info, params.Form)
            most, advice = max_body_bytes, "split the job, or raise HOGWILD_MAX_BODY_BYTES."
            if reads_json and most_json is not None and most_json < most:
                most = most_json
                advice = "split the job, send it to Hogwild's own port, or raise HOGWILD_VLLM_MAX_JSON_BYTES."

            async def handle(request: Request) -> Response:
                try:
                    await guard(request)
                    length = request.headers.get("content-length", "0")
                    if length.isdigit() and int(length) > most:
                        raise PayloadTooLarge(
                            f"The request body has {length} bytes; the limit is {most}: {advice}", limit=most)
                    if reads_json:
                        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
                        if kind != "application/json" and not kind.endswith("+json"):
                            raise HTTPException(415, "The body must be JSON: send Content-Type: application/json.")
                    limited = Request(request.scope, _LimitedReceive(request.receive, most, advice), request._send)
                    response = await handler(limited)
                except ClientDisconnect:
                    raise
                except Exception as error:  # the edge of the service: every error becomes a document
                    return problem_of(error, request)
                response.headers[REQUEST_ID] = request_id_of(request)
                return response

            return handle

    return HogwildRoute
