"""`/v1/fine_tuning/jobs`: OpenAI's fine-tuning API over the same ledger, for clients that speak it already.

What differs, because one live model is trained in place: `model` is the served model, `fine_tuned_model` is its name
and the weight version that the job made, and jobs run one after the other.
"""

from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from hogwild.api.auth import ApiKey
from hogwild.api.finetune import (
    CheckpointList,
    CreateRequest,
    EventList,
    JobList,
    JobObject,
    checkpoint_objects,
    event_objects,
    job_object,
    training_config,
)
from hogwild.api.jsonl import parse
from hogwild.api.problems import responses
from hogwild.api.routes_files import known_file
from hogwild.api.routes_train import JobId, bracketed, known_id, last_event_id
from hogwild.api.service import Service
from hogwild.api.tokenizer import Limits, Tokenizer
from hogwild.api.validation import check_length, check_lines, sample_limit
from hogwild.config import url_host
from hogwild.errors import InvalidRequest, NotFound
from hogwild.tasks.jobs import Job
from hogwild.tasks.ledger import DEFAULT_PRIORITY

Limit = Annotated[int, Query(ge=1, le=100)]


def finetune_router(service: Service, router: APIRouter) -> None:
    """Add the routes to `router`."""
    tags: Any = ["fine-tuning"]
    settings = service.settings

    def find(job_id: str) -> Job:
        return service.ledger.get(known_id(job_id))

    def tokenizer() -> Tokenizer:
        url = settings.vllm_url or service.model().vllm_url
        url = url or f"http://{url_host(settings.vllm_host)}:{settings.vllm_port}"
        key = settings.vllm_api_key.get_secret_value() if settings.vllm_api_key else None
        return Tokenizer(url, api_key=key)

    @router.post("/v1/fine_tuning/jobs", operation_id="createFineTuningJob", summary="Fine-tune on a file", tags=tags,
                 response_model=JobObject, responses=responses(400, 404, 408, 413, 415))
    async def create(request: Request, body: CreateRequest,
                     idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None) -> JobObject:
        """Tokenise a file with vLLM's tokenizer and chat template, and queue the job."""
        key: ApiKey = request.state.api_key
        model = await run_in_threadpool(service.model)
        served = model.served_model_name
        if body.model != served and not body.model.startswith(f"{served}@v"):
            raise NotFound(f"The model that is served and trained here is {served!r}, not {body.model[:100]!r}.",
                           field="model")
        config = training_config(body, model)
        content = await run_in_threadpool(service.files.content, known_file(body.training_file))
        examples = await run_in_threadpool(parse, content, max_lines=settings.max_job_samples)
        async with tokenizer() as vllm:
            # No more tokens in all than ids fit into the body of POST /train.
            samples = await vllm.samples(examples, Limits(sample_limit(model, settings), settings.max_body_bytes // 2))
        payload = await run_in_threadpool(check_lines, samples, model, settings)
        check_length(config, payload)
        if await request.is_disconnected():  # it may send the request again, and each would train
            raise HTTPException(408, "The client left before the file was tokenised: nothing was queued.")
        extra = body.model_dump(include={"training_file", "suffix", "hyperparameters", "method"}, exclude_none=True)
        priority = body.hogwild.priority if body.hogwild else None
        job_id, _ = await run_in_threadpool(
            service.ledger.submit, payload, config, metadata=body.metadata,
            priority=DEFAULT_PRIORITY if priority is None else priority, api_key=key.name, kind="fine_tuning",
            extra={**extra, "model": served},
            idempotency_key=None if idempotency_key is None else f"{key.name}:{idempotency_key}")
        return job_object(await run_in_threadpool(service.ledger.get, job_id), served)

    @router.get("/v1/fine_tuning/jobs", operation_id="listFineTuningJobs", summary="List fine-tuning jobs", tags=tags,
                response_model=JobList, responses=responses(404))
    def list_jobs(request: Request, after: str | None = None, limit: Limit = 20) -> JobList:
        """Newest first. `metadata[name]=value` filters."""
        cursor = None if after is None else find(after).seq
        page = service.ledger.list(limit=limit, cursor=cursor, metadata=bracketed(request), kind="fine_tuning")
        return JobList(data=[job_object(job, settings.model_name) for job in page.jobs],
                       has_more=page.next_cursor is not None)

    @router.get("/v1/fine_tuning/jobs/{job_id}", operation_id="retrieveFineTuningJob", tags=tags,
                summary="Poll a fine-tuning job", response_model=JobObject, responses=responses(404))
    def retrieve(job_id: JobId) -> JobObject:
        """A job; it may have been created with `POST /train` too."""
        return job_object(find(job_id), settings.model_name)

    def control(verb: str, want: Any) -> None:
        @router.post(f"/v1/fine_tuning/jobs/{{job_id}}/{verb}", operation_id=f"{verb}FineTuningJob", tags=tags,
                     summary=f"{verb.capitalize()} a fine-tuning job", response_model=JobObject,
                     responses=responses(404, 409))
        def act(job_id: JobId) -> JobObject:
            return job_object(service.ledger.request(known_id(job_id), want), settings.model_name)

    control("cancel", "cancel")
    control("pause", "pause")
    control("resume", "run")

    @router.get("/v1/fine_tuning/jobs/{job_id}/events", operation_id="listFineTuningEvents", tags=tags,
                summary="What happened to a job", response_model=EventList, responses=responses(404))
    def events(job_id: JobId, after: str | None = None, limit: Limit = 20) -> EventList:
        """Newest first."""
        job = find(job_id)
        before = "+"
        if after is not None:
            place = last_event_id(after.removeprefix("ftevent-"))
            before = f"({place}" if place.strip("0-") else place  # nothing is before 0, which Redis takes for an error
        rows = service.client.xrevrange(service.ledger.keys("events", job.id), before, "-", count=limit + 1)
        return EventList(data=event_objects(rows[:limit], job), has_more=len(rows) > limit)

    @router.get("/v1/fine_tuning/jobs/{job_id}/checkpoints", operation_id="listFineTuningCheckpoints", tags=tags,
                summary="Generations that hold a job's steps", response_model=CheckpointList,
                responses=responses(404))
    def checkpoints(job_id: JobId, after: str | None = None, limit: Limit = 10) -> CheckpointList:
        """Newest first: generations of the checkpoint directory that were written with this job's steps."""
        job = find(job_id)
        found = checkpoint_objects(service.registry.checkpoint() or {}, job, settings.model_name)
        if after is not None:
            places = [i for i, checkpoint in enumerate(found) if checkpoint.id == after]
            if not places:
                raise InvalidRequest("after must be the id of a checkpoint of this job.", field="after")
            found = found[places[0] + 1:]
        data = found[:limit]
        return CheckpointList(data=data, has_more=len(found) > limit, first_id=data[0].id if data else None,
                              last_id=data[-1].id if data else None)
