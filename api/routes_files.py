"""`/v1/files`: training files, as OpenAI's clients upload them."""

import re
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Form, Path, Query, UploadFile
from pydantic import BaseModel
from starlette.responses import Response

from hogwild.api.jsonl import parse
from hogwild.api.problems import responses
from hogwild.api.service import Service
from hogwild.errors import InvalidRequest, NotFound
from hogwild.tasks.files import StoredFile

FileId = Annotated[str, Path(examples=["file-0123456789abcdef01234567"])]
_FILE_ID = re.compile(r"file-[0-9a-f]{24}")


class FileOut(BaseModel):
    """An uploaded file."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: Literal["fine-tune"] = "fine-tune"
    status: Literal["processed"] = "processed"


class FileList(BaseModel):
    """A page of files."""

    object: Literal["list"] = "list"
    data: list[FileOut]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(BaseModel):
    """A file is gone."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


def known_file(file_id: str) -> str:
    """The id when it can be one; NotFound otherwise."""
    if not _FILE_ID.fullmatch(file_id):
        raise NotFound(f"There is no file {file_id[:60]!r}.")
    return file_id


def _out(file: StoredFile) -> FileOut:
    return FileOut(id=file.id, bytes=file.bytes, created_at=file.created_at, filename=file.filename)


def files_router(service: Service, router: APIRouter) -> None:
    """Add the routes to `router`."""
    tags: Any = ["files"]

    @router.post("/v1/files", operation_id="createFile", summary="Upload a training file", tags=tags,
                 response_model=FileOut, responses=responses(400, 408, 413, 415))
    def create(file: UploadFile, purpose: Annotated[str, Form(description="`fine-tune`")]) -> FileOut:
        """JSON Lines of chats or prompt/completion pairs; every line is checked now."""
        if purpose != "fine-tune":
            raise InvalidRequest("Only files for fine-tuning are kept here: purpose must be 'fine-tune'.", errors=[
                {"pointer": "/purpose", "field": "purpose", "message": "must be 'fine-tune'"}])
        content = file.file.read()
        parse(content, max_lines=service.settings.max_job_samples)
        name = re.sub(r"[^\w. -]", "_", file.filename or "training.jsonl")[:200]
        return _out(service.files.put(name, purpose, content))

    @router.get("/v1/files", operation_id="listFiles", summary="List files", tags=tags, response_model=FileList,
                responses=responses(404))
    def list_files(limit: Annotated[int, Query(ge=1, le=10_000)] = 100, after: str | None = None,
                   order: Literal["asc", "desc"] = "desc", purpose: str | None = None) -> FileList:
        """Uploaded files by age."""
        last = None if after is None else service.files.place(known_file(after))
        files, more = service.files.list(limit=limit, after=last, ascending=order == "asc")
        data = [_out(file) for file in files if purpose in (None, file.purpose)]
        return FileList(data=data, first_id=data[0].id if data else None, last_id=data[-1].id if data else None,
                        has_more=more)

    @router.get("/v1/files/{file_id}", operation_id="retrieveFile", summary="Look up a file", tags=tags,
                response_model=FileOut, responses=responses(404))
    def retrieve(file_id: FileId) -> FileOut:
        """What is known of a file."""
        return _out(service.files.get(known_file(file_id)))

    @router.get("/v1/files/{file_id}/content", operation_id="downloadFile", summary="Content of a file", tags=tags,
                response_class=Response, responses={
                    200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}},
                    **responses(404)})
    def content(file_id: FileId) -> Response:
        """The bytes that were uploaded."""
        return Response(service.files.content(known_file(file_id)), media_type="application/octet-stream")

    @router.delete("/v1/files/{file_id}", operation_id="deleteFile", summary="Delete a file", tags=tags,
                   response_model=FileDeleted, responses=responses(404))
    def delete(file_id: FileId) -> FileDeleted:
        """Jobs that were created from it keep their samples."""
        service.files.delete(known_file(file_id))
        return FileDeleted(id=file_id)
