"""A file that comes as multipart: written to disk as it comes, and refused as soon as it is too large."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from fastapi import Request
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from engine.server.errors import ApiError, bad_request

OVERHEAD_BYTES = 64 * 1024
"""Of an upload besides its file: boundaries, headers of parts, other fields."""
MAX_FILENAME_CHARS = 255

UPLOAD_SCHEMA: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": ["batch"]},
                    },
                }
            }
        },
    }
}


@dataclass(frozen=True, slots=True)
class Upload:
    """A whole upload; `content` is open while the request is served, and goes when it is closed."""

    filename: str
    content: BinaryIO


@asynccontextmanager
async def received_upload(request: Request, max_bytes: int) -> AsyncIterator[Upload]:
    """The request's file. Raises ApiError: 413 for more than `max_bytes`, 400 for what is no such form."""
    form = await _form(request, max_bytes)
    try:
        yield _checked(form, max_bytes)
    finally:
        await form.close()


async def _form(request: Request, max_bytes: int) -> FormData:
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise bad_request("A file is uploaded as multipart/form-data.", "file")

    async def counted() -> AsyncIterator[bytes]:
        num_bytes = 0
        async for piece in request.stream():
            num_bytes += len(piece)
            if num_bytes > max_bytes + OVERHEAD_BYTES:
                raise _too_large(max_bytes)
            yield piece

    parser = MultiPartParser(
        request.headers, cast("Any", counted()), max_files=1, max_fields=8, max_part_size=OVERHEAD_BYTES
    )
    try:
        return await parser.parse()
    except (MultiPartException, KeyError, UnicodeDecodeError) as error:
        said = error.message if isinstance(error, MultiPartException) else "it has no boundary, or a bad name"
        raise bad_request(f"The form cannot be read: {said}", "file") from error


def _checked(form: FormData, max_bytes: int) -> Upload:
    for name in form:
        if name not in ("file", "purpose"):
            raise bad_request(
                f"Unrecognized request argument supplied: {name[:80]}", name[:80], "unknown_parameter"
            )
    purpose, file = form.get("purpose"), form.get("file")
    if purpose != "batch":
        raise bad_request("purpose must be 'batch', which alone is supported.", "purpose")
    if not isinstance(file, UploadFile):
        raise bad_request("file is missing, or has no filename.", "file")
    if (file.size or 0) > max_bytes:
        raise _too_large(max_bytes)
    filename = (file.filename or "").rpartition("/")[2]
    if not filename or len(filename) > MAX_FILENAME_CHARS or not filename.isprintable():
        raise bad_request(f"The file's name must be 1 to {MAX_FILENAME_CHARS} printable characters.", "file")
    return Upload(filename, cast("BinaryIO", file.file))


def _too_large(max_bytes: int) -> ApiError:
    return ApiError(413, f"The file is over {max_bytes} bytes.", param="file", code="file_too_large")
