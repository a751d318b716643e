"""`/checkpoint`: save now, list generations, verify, roll back."""

import asyncio
import re
import time
from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from hogwild.api.auth import ApiKey
from hogwild.api.problems import responses
from hogwild.api.schemas import CheckpointOut, OperationOut, RollbackRequest
from hogwild.api.service import Service
from hogwild.api.views import checkpoint_out, operation_out
from hogwild.errors import InvalidRequest, NotFound
from hogwild.tasks.operations import Kind, Operation

_OP_ID = re.compile(r"op-[0-9a-f]{24}")
MAX_WAIT_S = 60
WAIT_POLL_S = 0.1
Wait = Annotated[int, Query(ge=0, le=MAX_WAIT_S, description="Seconds to wait for the end before answering.")]
Key = Annotated[str | None, Header(alias="Idempotency-Key", min_length=1, max_length=255, description=(
    "Makes it safe to send a request again: the same key and body are the same operation."))]
OpId = Annotated[str, Path(examples=["op-0123456789abcdef01234567"])]
_ACCEPTED: dict[int | str, dict[str, Any]] = {202: {
    "description": "Will be done between two steps, before all waiting jobs.",
    "headers": {"Location": {"schema": {"type": "string"}, "description": "Where to poll."},
                "Idempotency-Replayed": {"schema": {"type": "string"}, "description":
                                         "`true`: this key was used before; the operation is that one."}}}}


def known_id(op_id: str) -> str:
    """The id when it can be one; NotFound otherwise (it becomes part of a key's name)."""
    if not _OP_ID.fullmatch(op_id):
        raise NotFound(f"There is no operation {op_id[:40]!r}.")
    return op_id


def checkpoint_router(service: Service, router: APIRouter) -> None:
    """Add the routes to `router`."""

    async def waited(op_id: str, seconds: int) -> Operation:
        """Waits on the event loop: a thread for each client that waits would leave none for the others."""
        deadline = time.monotonic() + seconds
        while True:
            op = await run_in_threadpool(service.operations.get, op_id)
            if op.final or time.monotonic() >= deadline:
                return op
            await asyncio.sleep(WAIT_POLL_S)

    @router.post("/checkpoint", operation_id="saveCheckpoint", summary="Save now", status_code=202,
                 tags=["checkpoint"], response_model=OperationOut, responses={**_ACCEPTED, **responses()})
    async def save(request: Request, response: Response, wait: Wait = 0, key: Key = None) -> OperationOut:
        """Write the changed blocks of the live weights to the checkpoint, at the next step boundary."""
        return await asked(request, response, wait, key, "sync")

    @router.get("/checkpoint", operation_id="getCheckpoint", summary="Generations", tags=["checkpoint"],
                response_model=CheckpointOut, responses=responses())
    def show() -> CheckpointOut:
        """Saved generations, and what is not saved yet."""
        return checkpoint_out(service)

    @router.post("/checkpoint/rollback", operation_id="rollbackCheckpoint", summary="Roll back", status_code=202,
                 tags=["checkpoint"], response_model=OperationOut,
                 responses={**_ACCEPTED, **responses(400, 404, 408, 409, 413, 415)})
    async def rollback(request: Request, body: RollbackRequest, response: Response, wait: Wait = 0,
                       key: Key = None) -> OperationOut:
        """Return to a generation, on disk and in the live weights; serving goes on."""
        return await asked(request, response, wait, key, "rollback", generation=body.generation)

    @router.post("/checkpoint/verify", operation_id="verifyCheckpoint", summary="Verify", status_code=202,
                 tags=["checkpoint"], response_model=OperationOut, responses={**_ACCEPTED, **responses()})
    async def verify(request: Request, response: Response, wait: Wait = 0, key: Key = None) -> OperationOut:
        """Compare files and live weights with the fingerprints of the last generation, at the next step boundary.

        The result's `ok` says whether all agrees; `disk` and `live` count the blocks that differ, by tensor. `unsaved`:
        the live weights have steps that are not saved yet, and are meant to differ.
        """
        return await asked(request, response, wait, key, "verify")

    async def asked(request: Request, response: Response, wait: int, key: str | None, kind: Kind,
                    **params: int) -> OperationOut:
        caller: ApiKey = request.state.api_key
        derived = None if key is None else service.operations.id_of(kind, f"{caller.name}:{key}")
        op_id, replayed = await run_in_threadpool(ask, kind, derived, params)
        response.headers["Location"] = f"/checkpoint/operations/{op_id}"
        if replayed:
            response.headers["Idempotency-Replayed"] = "true"
        return operation_out(await waited(op_id, wait))

    def ask(kind: Kind, op_id: str | None, params: dict[str, int]) -> tuple[str, bool]:
        service.model()
        replayed = op_id is not None and service.operations.known(op_id)
        if kind == "rollback" and not replayed:  # its own generation may have taken the place of the one it went to
            check_generation(params["generation"])
        return service.operations.submit(kind, op_id=op_id, **params), replayed

    def check_generation(generation: int) -> None:
        reported = service.registry.checkpoint()
        if reported is not None:
            known = [g["generation"] for g in reported.get("generations", [])]
            if generation not in known:
                there = f"{min(known)} to {max(known)}" if known else "none"
                raise InvalidRequest(f"There is no generation {generation} to roll back to; there are: {there}.",
                                     errors=[{"pointer": "/generation", "field": "generation",
                                              "message": f"is not one of {known}"}])

    @router.get("/checkpoint/operations/{op_id}", operation_id="getOperation", summary="Poll an operation",
                tags=["checkpoint"], response_model=OperationOut, responses=responses(404))
    async def operation(op_id: OpId, response: Response, wait: Wait = 0) -> OperationOut:
        """A sync, a rollback or a verification that was asked for."""
        op = await waited(known_id(op_id), wait)
        if not op.final:
            response.headers["Retry-After"] = "1"
        return operation_out(op)

    @router.post("/checkpoint/operations/{op_id}/cancel", operation_id="cancelOperation", summary="Cancel an operation",
                 tags=["checkpoint"], response_model=OperationOut, responses=responses(404, 409))
    def cancel(op_id: OpId) -> OperationOut:
        """Take back a sync, a rollback or a verification that no worker has begun. Asking again is no error."""
        return operation_out(service.operations.cancel(known_id(op_id)))
