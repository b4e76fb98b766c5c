"""`/v1/files` and `/v1/batches`: OpenAI's API of batches, over a `BatchBackend`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, FastAPI, Path, Query, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from engine.server.batches.backend import BatchBackend, NotFound, Refused
from engine.server.batches.uploads import UPLOAD_SCHEMA, received_upload
from engine.server.errors import ERROR_ANSWERS, ApiError, bad_request

T = TypeVar("T")
FILES_PATH = "/v1/files"
MAX_LISTED = 100

Id = Annotated[str, Path(max_length=128)]
After = Annotated[str | None, Query(max_length=128)]


class FileAnswer(BaseModel):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: str
    status_details: str | None


class Deleted(BaseModel):
    id: str
    object: Literal["file"]
    deleted: bool


class NewBatch(BaseModel):
    """A batch to be run: the requests of a file that was uploaded."""

    model_config = ConfigDict(extra="forbid", strict=True)

    input_file_id: str = Field(min_length=1, max_length=128)
    endpoint: str = Field(min_length=1, max_length=128)
    completion_window: str = Field(min_length=1, max_length=16)
    metadata: dict[str, str] | None = Field(None, max_length=16)


class Listed(BaseModel):
    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


def batch_routes(backend: BatchBackend) -> APIRouter:
    """The routes; with the app they are included in, the backend is started and closed."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await run_in_threadpool(backend.start)
        try:
            yield
        finally:
            await run_in_threadpool(backend.close)

    routes = APIRouter(tags=["batches"], responses=ERROR_ANSWERS, lifespan=lifespan)
    _add_file_routes(routes, backend)
    _add_batch_routes(routes, backend)
    return routes


def _add_file_routes(routes: APIRouter, backend: BatchBackend) -> None:
    @routes.post(FILES_PATH, openapi_extra=UPLOAD_SCHEMA)
    async def upload_file(request: Request) -> FileAnswer:
        """Keep a file of requests for a batch: multipart, with `file` and `purpose=batch`."""
        async with received_upload(request, backend.max_file_bytes) as upload:
            stored = await run_in_threadpool(
                _answered, lambda: backend.create_file(_tenant(request), upload.filename, upload.content)
            )
        return FileAnswer(**stored.to_openai())

    @routes.get(FILES_PATH)
    def list_files(
        request: Request,
        purpose: Annotated[str | None, Query(max_length=64)] = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
        after: After = None,
        order: Literal["asc", "desc"] = "desc",
    ) -> Listed:
        """The caller's files."""
        files = [file for file in backend.files(_tenant(request)) if purpose in (None, file.purpose)]
        if order == "asc":
            files.reverse()
        return _page([file.to_openai() for file in files], after, limit)

    @routes.get(FILES_PATH + "/{file_id}")
    def retrieve_file(request: Request, file_id: Id) -> FileAnswer:
        """What is known of a file."""
        return FileAnswer(**_answered(lambda: backend.file(_tenant(request), file_id)).to_openai())

    @routes.get(FILES_PATH + "/{file_id}/content", response_class=StreamingResponse)
    def file_content(request: Request, file_id: Id) -> StreamingResponse:
        """A file's bytes."""
        tenant = _tenant(request)
        file = _answered(lambda: backend.file(tenant, file_id))
        pieces = _answered(lambda: backend.content(tenant, file_id))
        headers = {"Content-Length": str(file.num_bytes)}
        return StreamingResponse(pieces, media_type="application/octet-stream", headers=headers)

    @routes.delete(FILES_PATH + "/{file_id}")
    def delete_file(request: Request, file_id: Id) -> Deleted:
        """Remove a file."""
        _answered(lambda: backend.delete_file(_tenant(request), file_id))
        return Deleted(id=file_id, object="file", deleted=True)


def _add_batch_routes(routes: APIRouter, backend: BatchBackend) -> None:
    @routes.post("/v1/batches")
    def create_batch(request: Request, body: NewBatch) -> dict[str, Any]:
        """Run the requests of a file."""
        for name, value in (body.metadata or {}).items():
            if len(name) > 64 or len(value) > 512:
                message = f"metadata.{name[:64]}: keys have at most 64 characters and values 512"
                raise bad_request(message, "metadata")
        batch = _answered(
            lambda: backend.create_batch(
                _tenant(request),
                input_file_id=body.input_file_id,
                endpoint=body.endpoint,
                completion_window=body.completion_window,
                metadata=body.metadata,
            ),
            missing_is_bad=True,
        )
        return batch.to_openai()

    @routes.get("/v1/batches")
    def list_batches(
        request: Request,
        after: After = None,
        limit: Annotated[int, Query(ge=1, le=MAX_LISTED)] = 20,
    ) -> Listed:
        """The caller's batches, the newest first."""
        batches = backend.batches(_tenant(request))
        return _page([batch.to_openai() for batch in batches], after, limit)

    @routes.get("/v1/batches/{batch_id}")
    def retrieve_batch(request: Request, batch_id: Id) -> dict[str, Any]:
        """How far a batch is."""
        return _answered(lambda: backend.batch(_tenant(request), batch_id)).to_openai()

    @routes.post("/v1/batches/{batch_id}/cancel")
    def cancel_batch(request: Request, batch_id: Id) -> dict[str, Any]:
        """Stop a batch; what is finished by then is in its output file."""
        return _answered(lambda: backend.cancel(_tenant(request), batch_id)).to_openai()


def _tenant(request: Request) -> str | None:
    """Whose files and batches: those of the request's API key."""
    key = getattr(request.state, "key", None)
    return None if key is None else key.id


def _answered(call: Callable[[], T], *, missing_is_bad: bool = False) -> T:
    """The backend's answer. Raises ApiError: 404, or 400 where what is missing is named in a body."""
    try:
        return call()
    except NotFound as error:
        status = 400 if missing_is_bad else 404
        kind = error.kind
        raise ApiError(status, str(error), param=f"{kind}_id", code=f"{kind}_not_found") from error
    except Refused as error:
        raise bad_request(str(error), error.param, error.code) from error


def _page(items: Sequence[dict[str, Any]], after: str | None, limit: int) -> Listed:
    """At most `limit` items behind the one of the id `after`. Raises ApiError (400) where that is none."""
    start = 0
    if after is not None:
        places = [place for place, item in enumerate(items) if item["id"] == after]
        if not places:
            raise bad_request(f"after={after[:80]!r} is none of the list's ids", "after")
        start = places[0] + 1
    page = list(items[start : start + limit])
    return Listed(
        object="list",
        data=page,
        first_id=page[0]["id"] if page else None,
        last_id=page[-1]["id"] if page else None,
        has_more=len(items) > start + limit,
    )
