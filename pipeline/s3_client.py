"""S3 through s3fs: conditional puts (`If-None-Match: *`), and what its errors mean.

Address and credentials come from where AWS's tools look (`AWS_ENDPOINT_URL_S3`, `AWS_PROFILE`, roles, …) and
from fsspec's own configuration. botocore repeats a request that was throttled, cut off or met a fault of the
store a few times, with growing, jittered pauses; `pipeline.commits.retrying` repeats the operation after
that.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import aiobotocore.session
import aiohttp
import s3fs
from botocore import exceptions as boto
from botocore.loaders import create_loader
from botocore.parsers import ResponseParserError

from pipeline.fsspec_client import FsspecClient
from pipeline.object_storage import Fault

_CONNECT_SECONDS = 10
_ANSWER_SECONDS = 60
_TRIES_A_REQUEST = 3
# Larger files are uploaded in parts of this size (s3fs makes them larger where 10,000 would not be enough).
_PART_BYTES = 32 * 2**20

_KINDS = {
    "PutObject": "put",
    "UploadPart": "put",
    "GetObject": "get",
    "HeadObject": "head",
    "ListObjectsV2": "list",
    "DeleteObject": "delete",
}
_EXPIRED = {
    "400",  # to a HEAD, whose answer has no body to say why: no other reason is known for what is asked here
    "ExpiredToken",
    "ExpiredTokenException",
    "InvalidAccessKeyId",
    "InvalidToken",
    "RequestExpired",
    "TokenRefreshRequired",
}
_PASSING_CODES = {"RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded"}
_PASSING_STATUSES = {408, 409, 425, 429}
_CREDENTIAL_ERRORS = (
    boto.CredentialRetrievalError,
    boto.SSOError,
    boto.UnauthorizedSSOTokenError,
    boto.TokenRetrievalError,
)
_PASSING_ERRORS = (
    boto.ConnectionError,
    boto.HTTPClientError,
    boto.IncompleteReadError,
    ResponseParserError,  # an answer cut short, or a proxy's page in its place
    aiohttp.ClientError,
    ConnectionError,
    TimeoutError,
)


@cache
def _loader(data_path: str | None) -> Any:
    """Reads the descriptions of AWS's services, of half a second's parsing, once a process."""
    return create_loader(data_path)


class S3Client(FsspecClient):
    """A bucket of an S3 store."""

    scheme = "s3"

    def connect(self) -> None:
        session = aiobotocore.session.AioSession()
        session.register_component("data_loader", _loader(session.get_config_variable("data_path")))
        session.register("before-send.s3", self._count)
        self._fs = s3fs.S3FileSystem(
            session=session,
            config_kwargs={
                "connect_timeout": _CONNECT_SECONDS,
                "read_timeout": _ANSWER_SECONDS,
                "retries": {"mode": "standard", "total_max_attempts": _TRIES_A_REQUEST},
            },
            use_listings_cache=False,
            skip_instance_cache=True,
        )
        self._fs.retries = 1  # s3fs would repeat what botocore has repeated

    async def _count(self, event_name: str, **_: Any) -> None:
        await self._meter.admit(_KINDS.get(event_name.rpartition(".")[2], "post"))

    def create_from_file(self, key: str, path: Path) -> None:
        self._fs.put_file(str(path), self._path(key), mode="create", chunksize=_PART_BYTES)

    def create_in_parts(self, key: str, data: bytes) -> None:
        where = {"Bucket": self.bucket, "Key": key}
        upload = {**where, "UploadId": self._fs.call_s3("create_multipart_upload", **where)["UploadId"]}
        try:
            part = self._fs.call_s3("upload_part", **upload, PartNumber=1, Body=data)
            parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
            self._fs.call_s3("complete_multipart_upload", **upload, MultipartUpload=parts, IfNoneMatch="*")
        except Exception:
            self._fs.call_s3("abort_multipart_upload", **upload)
            raise

    def read(self, key: str) -> bytes:
        return self._fs.cat_file(self._path(key), max_concurrency=1)  # with more it asks for the size first

    def size(self, key: str) -> int:
        return self._fs.call_s3("head_object", Bucket=self.bucket, Key=key)["ContentLength"]

    def list(self, prefix: str) -> dict[str, float | None]:
        # Not `ls`, which for a folder without objects lists the folder above it too.
        found: dict[str, float | None] = {}
        more: dict[str, str] = {}
        while True:
            where = {"Bucket": self.bucket, "Prefix": prefix, "Delimiter": "/"}
            page = self._fs.call_s3("list_objects_v2", **where, **more)
            found |= {each["Key"]: each["LastModified"].timestamp() for each in page.get("Contents", ())}
            found |= {each["Prefix"].rstrip("/"): None for each in page.get("CommonPrefixes", ())}
            if not page.get("IsTruncated"):
                return {key.removeprefix(prefix): at for key, at in found.items() if key != prefix}
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def uploads(self, prefix: str) -> dict[tuple[str, str], float]:
        found: dict[tuple[str, str], float] = {}
        more: dict[str, str] = {}
        while True:
            page = self._fs.call_s3("list_multipart_uploads", Bucket=self.bucket, Prefix=prefix, **more)
            found |= {
                (each["Key"], each["UploadId"]): each["Initiated"].timestamp()
                for each in page.get("Uploads", ())
            }
            if not page.get("IsTruncated"):
                return found
            more = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def abort_upload(self, key: str, upload_id: str) -> None:
        self._fs.call_s3("abort_multipart_upload", Bucket=self.bucket, Key=key, UploadId=upload_id)

    def delete(self, key: str) -> None:
        self._fs.call_s3("delete_object", Bucket=self.bucket, Key=key)

    def fault_of(self, error: Exception) -> Fault | None:
        answer = error if isinstance(error, boto.ClientError) else error.__cause__
        if isinstance(answer, boto.ClientError):
            return _fault_of_answer(answer)
        if isinstance(error, _CREDENTIAL_ERRORS):
            return Fault.EXPIRED
        if isinstance(error, _PASSING_ERRORS):
            return Fault.PASSING
        if isinstance(error, boto.BotoCoreError):  # no credentials, no such profile, a malformed address, …
            return Fault.REFUSED
        return None


def _fault_of_answer(answer: boto.ClientError) -> Fault:
    code = answer.response.get("Error", {}).get("Code", "")
    status = answer.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if code in _EXPIRED:
        return Fault.EXPIRED
    if code == "PreconditionFailed" or status == 412:
        return Fault.EXISTS
    if code in _PASSING_CODES or status in _PASSING_STATUSES or status >= 500:
        return Fault.PASSING
    if status == 404:
        return Fault.MISSING
    return Fault.REFUSED
