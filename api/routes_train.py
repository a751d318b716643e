"""`/train`: submit, list, poll, control and follow jobs."""

import logging
import re
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

import redis
from fastapi import APIRouter, Header, Path, Query, Request, Response
from pydantic import StringConstraints
from sse_starlette.event import ServerSentEvent
from sse_starlette.sse import EventSourceResponse
from starlette.concurrency import run_in_threadpool

from hogwild.api.auth import ApiKey
from hogwild.api.problems import responses
from hogwild.api.schemas import AcceptedOut, JobOut, JobPage, StatusOut, TrainRequest
from hogwild.api.service import Service
from hogwild.api.validation import check_config, check_length, check_samples
from hogwild.api.views import job_out, status_out
from hogwild.errors import InvalidRequest, NotFound

log = logging.getLogger("hogwild.api")

JobId = Annotated[str, Path(description="Id of a job.", examples=["job-0123456789abcdef01234567"])]
State = Literal["queued", "running", "succeeded", "failed", "cancelled"]
Label = Annotated[str, StringConstraints(pattern=r"^[^:]{1,64}:[\s\S]{0,512}$")]
_JOB_ID = re.compile(r"(ft)?job-[0-9a-f]{24}")
POLL_S = 1  # what Retry-After of a poll says: steps take about this long


def known_id(job_id: str) -> str:
    """The id when it can be one; NotFound otherwise (it becomes part of a key's name)."""
    if not _JOB_ID.fullmatch(job_id):
        raise NotFound(f"There is no job {job_id[:40]!r}.")
    return job_id


def last_event_id(header: str | None) -> str:
    """A Last-Event-ID as the id of a Redis stream entry. Raises InvalidRequest."""
    if header is None or header == "":
        return "0-0"
    if not re.fullmatch(r"[0-9]{1,18}(-[0-9]{1,18})?", header):
        raise InvalidRequest("Last-Event-ID must be the id of an event that was received.", errors=[
            {"pointer": "", "field": "Last-Event-ID", "message": "is not the id of an event"}])
    return header


def bracketed(request: Request) -> dict[str, str]:
    """Labels to filter by that the query names as OpenAI's API does: `metadata[name]=value`."""
    return {name[9:-1]: value for name, value in request.query_params.items()
            if name.startswith("metadata[") and name.endswith("]")}


def train_router(service: Service, router: APIRouter) -> None:
    """Add the routes to `router`, whose dependency puts the caller's key into `request.state.api_key`."""

    @router.post("/train", operation_id="createTrainingJob", summary="Train on samples", status_code=202,
                 tags=["train"], response_model=AcceptedOut, responses={
                     202: {"description": "Accepted and on disk.", "headers": {
                         "Location": {"schema": {"type": "string"}, "description": "Where to poll."},
                         "Idempotency-Replayed": {"schema": {"type": "string"}, "description":
                                                  "`true`: this key was used before; the job is that one."}}},
                     **responses(400, 408, 413, 415)})
    def create(request: Request, body: TrainRequest, response: Response,
               idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255, description=(
                   "Makes it safe to send a request again: the same key and body are the same job."))] = None,
               ) -> AcceptedOut:
        """Queue a training job; the answer comes when it is on disk.

        The ids are checked against the served model's vocabulary and length first: what is answered 422 was not queued.
        """
        key: ApiKey = request.state.api_key
        model = service.model()
        config = check_config(body, model)
        payload = check_samples(body, model, service.settings)
        check_length(config, payload)
        job_id, new = service.ledger.submit(
            payload, config, metadata=body.metadata, priority=body.priority, api_key=key.name,
            idempotency_key=None if idempotency_key is None else f"{key.name}:{idempotency_key}")
        response.headers["Location"] = f"/train/{job_id}"
        state = "queued"
        if not new:
            response.headers["Idempotency-Replayed"] = "true"
            state = service.ledger.get(job_id).state
        return AcceptedOut(id=job_id, state=state, samples=payload.samples, tokens=payload.tokens)

    @router.get("/train", operation_id="listTrainingJobs", summary="List jobs", tags=["train"],
                response_model=JobPage, responses=responses())
    def list_jobs(request: Request,
                  limit: Annotated[int, Query(ge=1, le=100, description="Jobs on a page.")] = 20,
                  cursor: Annotated[str | None, Query(pattern=r"^[0-9]{1,15}$", description="`next_cursor` of the page "
                                                      "before.")] = None,
                  state: Annotated[State | None, Query(description="Only jobs in this state.")] = None,
                  kind: Annotated[Literal["train", "fine_tuning"] | None, Query(
                      description="Only jobs of this API.")] = None,
                  metadata: Annotated[list[Label] | None,
                                      Query(max_length=16, description="Only jobs with this label, as `name:value`; "
                                            "may be repeated; `metadata[name]=value` for names with a colon. A page "
                                            "can be short although more follow.")] = None,
                  ) -> JobPage:
        """Jobs, newest first."""
        labels = {**bracketed(request), **dict(item.split(":", 1) for item in metadata or [])}
        page = service.ledger.list(limit=limit, cursor=None if cursor is None else int(cursor), state=state, kind=kind,
                                   metadata=labels)
        more = None if page.next_cursor is None else str(page.next_cursor)
        return JobPage(data=[job_out(job) for job in page.jobs], has_more=more is not None, next_cursor=more)

    @router.get("/train/status", operation_id="getStatus", summary="State of the service", tags=["train"],
                response_model=StatusOut, responses=responses())
    def status() -> StatusOut:
        """Model, worker, queue, running job and checkpoint at this moment."""
        return status_out(service)

    @router.get("/train/{job_id}", operation_id="getTrainingJob", summary="Poll a job", tags=["train"],
                response_model=JobOut, responses={
                    200: {"headers": {"Retry-After": {"schema": {"type": "integer"}, "description":
                                                      "Seconds until asking again is worth it; absent at the end."}}},
                    **responses(404)})
    def get(job_id: JobId, response: Response) -> JobOut:
        """A job with its losses."""
        job, losses = service.ledger.get_with_losses(known_id(job_id))
        if not job.final:
            response.headers["Retry-After"] = str(POLL_S)
        return job_out(job, losses)

    def control(verb: Literal["cancel", "pause", "resume"], summary: str, about: str) -> None:
        want: Any = "run" if verb == "resume" else verb

        @router.post(f"/train/{{job_id}}/{verb}", operation_id=f"{verb}TrainingJob", summary=summary, description=about,
                     tags=["train"], response_model=JobOut, responses=responses(404, 409))
        def act(job_id: JobId) -> JobOut:
            return job_out(service.ledger.request(known_id(job_id), want))

    control("cancel", "Cancel a job", "A queued job ends at once, a running one after its present step; what it has "
            "trained stays in the weights. Asking again is no error.")
    control("pause", "Pause a job", "A queued job keeps its place but is not started, a running one stops after its "
            "present step.")
    control("resume", "Resume a paused job", "The job goes on where it stopped.")

    @router.get("/train/{job_id}/events", operation_id="followTrainingJob", summary="Follow a job", tags=["train"],
                response_class=EventSourceResponse, responses={
                    200: {"description": "Server-sent events: `queued`, `running`, `begun`, `step`, `paused`, "
                          "`resumed`, `cancel_requested`, `pause_requested`, `run_requested`, `interrupted`, and last "
                          "`succeeded`, `failed` or `cancelled`. `data` is JSON.",
                          "content": {"text/event-stream": {"schema": {"type": "string"}}}},
                    **responses(404)})
    async def events(request: Request, job_id: JobId,
                     last_id: Annotated[str | None, Header(alias="Last-Event-ID", description=(
                         "Go on after this event."))] = None) -> EventSourceResponse:
        """Events of a job from its beginning, or after `Last-Event-ID`; the stream ends with the job.

        A job keeps its last 2,000 events or so: of a longer one the first are gone.
        """
        job = await run_in_threadpool(service.ledger.get, known_id(job_id))
        start = last_event_id(last_id)
        # vLLM handles its signals itself, so that sse-starlette does not see them, and waits for open connections.
        server = getattr(request.app.state, "server", None)

        def ending() -> bool:
            return bool(getattr(server, "should_exit", False))

        async def stream() -> AsyncIterator[ServerSentEvent]:
            try:
                async for event_id, kind, data in service.hub().follow(job.id, start, ending):
                    yield ServerSentEvent(id=event_id, event=kind, data=data)
            except redis.RedisError as error:  # the client comes back with Last-Event-ID, and finds all of them
                log.warning("events of %s end early: %s", job.id, error)

        return EventSourceResponse(stream(), ping=15, send_timeout=30)
