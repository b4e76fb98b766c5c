"""Google Cloud Storage through gcsfs: conditional puts (`ifGenerationMatch=0`), and what its errors mean.

Credentials are the application default ones, or what fsspec's configuration says. gcsfs repeats a request
that was throttled, cut off or met a fault of the store, with growing, jittered pauses;
`pipeline.commits.retrying` repeats the operation after that.
"""

from __future__ import annotations

import logging
from datetime import datetime
from pathlib import Path
from typing import Any

import aiohttp
import google.auth.exceptions
import requests

# Not gcsfs.GCSFileSystem: that one asks every bucket for its kind first, through another protocol, and then
# may give folders a life of their own.
from gcsfs.core import GCSFileSystem
from gcsfs.retry import HttpError, NonRetryableError

from pipeline.fsspec_client import FsspecClient
from pipeline.object_storage import Fault

# gcsfs writes its errors out with a traceback, and raises them: they are told once, in one line.
logging.getLogger("gcsfs").addHandler(logging.NullHandler())

_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=60)
_PART_BYTES = 2**18  # the least that an upload in parts goes in
_PASSING_STATUSES = {408, 409, 429}
_PASSING_ERRORS = (
    aiohttp.ClientError,
    requests.exceptions.RequestException,
    google.auth.exceptions.TransportError,
    ConnectionError,
    TimeoutError,
)


class GcsClient(FsspecClient):
    """A bucket of Google Cloud Storage."""

    scheme = "gs"

    def connect(self) -> None:
        trace = aiohttp.TraceConfig()
        trace.on_request_start.append(self._count)
        self._fs = GCSFileSystem(
            session_kwargs={"trace_configs": [trace]},
            requests_timeout=_TIMEOUT,
            use_listings_cache=False,
            skip_instance_cache=True,
        )

    async def _count(self, session: Any, context: Any, request: aiohttp.TraceRequestStartParams) -> None:
        is_list = request.method == "GET" and request.url.path.endswith("/o")
        await self._meter.admit("list" if is_list else request.method.lower())

    def create_from_file(self, key: str, path: Path) -> None:
        self._fs.put_file(str(path), self._path(key), mode="create")

    def create_in_parts(self, key: str, data: bytes) -> None:
        self._fs.pipe_file(self._path(key), data.ljust(_PART_BYTES), mode="create", chunksize=_PART_BYTES)

    def read(self, key: str) -> bytes:
        return self._fs.cat_file(self._path(key))

    def size(self, key: str) -> int:
        # Not `info`, which lists the folder of what is not there.
        return int(self._fs.call("GET", "b/{}/o/{}", self.bucket, key, json_out=True)["size"])

    def list(self, prefix: str) -> dict[str, float | None]:
        found: dict[str, float | None] = {}
        token: str | None = None
        while True:
            where = {"prefix": prefix, "delimiter": "/", "pageToken": token}
            page = self._fs.call("GET", "b/{}/o", self.bucket, json_out=True, **where)
            found |= {each["name"]: _seconds(each["updated"]) for each in page.get("items", ())}
            found |= {each.rstrip("/"): None for each in page.get("prefixes", ())}
            token = page.get("nextPageToken")
            if not token:
                return {key.removeprefix(prefix): at for key, at in found.items() if key != prefix}

    def delete(self, key: str) -> None:
        self._fs.call("DELETE", "b/{}/o/{}", self.bucket, key)

    def fault_of(self, error: Exception) -> Fault | None:
        if isinstance(error, HttpError):
            return _fault_of_status(error.code)
        if isinstance(error, (NonRetryableError, google.auth.exceptions.RefreshError)):
            return Fault.EXPIRED
        if isinstance(error, _PASSING_ERRORS):
            return Fault.PASSING
        if isinstance(error, google.auth.exceptions.GoogleAuthError):
            return Fault.REFUSED
        if (
            isinstance(error, OSError) and error.errno is None
        ):  # gcsfs raises them without one, a disk with one
            if isinstance(error, FileNotFoundError):
                return Fault.MISSING
            return Fault.EXISTS if isinstance(error, FileExistsError) else Fault.REFUSED
        if isinstance(error, ValueError) and str(error).startswith("Bad Request"):
            return Fault.REFUSED
        return None


def _seconds(timestamp: str) -> float:
    return datetime.fromisoformat(timestamp).timestamp()


def _fault_of_status(code: Any) -> Fault:
    status = int(code) if str(code).isdigit() else 0
    if status == 401:
        return Fault.EXPIRED
    if status == 412:
        return Fault.EXISTS
    if status in _PASSING_STATUSES or status >= 500:
        return Fault.PASSING
    return Fault.REFUSED
