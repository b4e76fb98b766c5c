"""Where a run's output lives, behind an interface small enough for a local disk and a bucket alike.

The only writing primitive is *exclusive create of a whole object*. Nothing is renamed, appended to or
overwritten; heartbeats are the one exception, and nothing's correctness rests on them. A create has three
outcomes, because an answer can get lost after the write was applied.

Paths are relative to the root, with forward slashes, and come from the plan's numbers, never from data.
"""

from __future__ import annotations

import errno
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from engine.errors import ConfigError, MissingExtraError, OutputError, RetryLater, TidemillError

if TYPE_CHECKING:
    from pipeline.object_storage import ObjectClient


class Outcome(Enum):
    WON = "won"  # the object is ours and durable
    LOST = "lost"  # an object of that name was there already (ours, if a repeated request found its own)
    UNKNOWN = "unknown"  # it may or may not have been applied: read it back


class PassingFault(RetryLater):
    """One operation failed without being applied, and may well work when tried again."""


class Storage(ABC):
    """One output folder. Methods raise OutputError (cannot ever work), or RetryLater (may work later).

    requests_are_dear: each operation is a request to a store, so heartbeats are not to be written before
    every step, nor all finished files to be looked at.
    """

    requests_are_dear = False

    @property
    @abstractmethod
    def url(self) -> str:
        """The root, as a user would type it."""

    @abstractmethod
    def check(self) -> None:
        """Raise OutputError unless objects can be created there, each only once; leaves nothing behind."""

    @abstractmethod
    def create(self, path: str, data: bytes) -> Outcome:
        """Create a small object, whole and durable, if none of that name exists. `data` is not empty."""

    @abstractmethod
    def create_from_file(self, path: str, spool: Path) -> Outcome:
        """The same from a finished local file, which is left in place and must not be written to again."""

    @abstractmethod
    def read(self, path: str) -> bytes | None:
        """A small object's bytes, or None when there is none."""

    @abstractmethod
    def size(self, path: str) -> int | None:
        """An object's length in bytes, or None when there is none."""

    @abstractmethod
    def local_file(self, path: str, spool_dir: Path) -> Path | None:
        """A local file with the object's content, to be read only; fetched into `spool_dir` if need be.

        None when there is no such object.
        """

    @abstractmethod
    def list(self, folder: str) -> list[str]:
        """Sorted names directly inside a folder; empty when the folder is not there."""

    @abstractmethod
    def overwrite_heartbeat(self, path: str, data: bytes) -> None:
        """Replace a heartbeat: cheap, and not durable. The object may keep blanks at its end."""

    @abstractmethod
    def discard(self, path: str) -> None:
        """Remove an object that nothing refers to or ever will; no error when it is gone already."""

    @abstractmethod
    def subfolder(self, name: str) -> Storage:
        """The storage of a folder inside this one."""

    @abstractmethod
    def ages(self, folder: str) -> dict[str, float]:
        """Seconds since each object directly inside a folder was written, by name."""

    @abstractmethod
    def leftovers(self, min_age_s: float) -> list[str]:
        """What dead processes left half made anywhere inside, at least so many seconds ago; no object is."""

    @abstractmethod
    def remove_leftover(self, name: str) -> None:
        """Remove one of `leftovers`; no error when it is gone already."""

    def take_requests(self) -> Mapping[str, int]:
        """Requests sent to a store since the last call, by kind; none where the output is on a disk."""
        return {}


def open_storage(
    url: str, *, unsafe_single_writer: bool = False, max_requests_per_second: float | None = None
) -> Storage:
    """The storage of an output path: a local path, or a URL of the scheme file, s3 or gs.

    Args:
        unsafe_single_writer: use a store that knows no conditional requests too; the user's word that no
            second process writes there.
        max_requests_per_second: to a store; None does not limit them.

    Sends nothing and creates nothing. Raises ConfigError, MissingExtraError where a store's package is not
    installed.
    """
    from pipeline.local_storage import LocalStorage

    if not url.strip():
        raise ConfigError("output.path is empty; give the folder that results go to")
    scheme = url.partition("://")[0].lower() if "://" in url else ""
    if scheme in _BUCKETS:
        from pipeline.object_storage import ObjectStorage

        bucket, _, folder = url.partition("://")[2].partition("/")
        if not bucket or "::" in url or "//" in folder:
            raise ConfigError(
                f"output.path {url!r} names no folder of a bucket; write it as {scheme}://bucket/folder"
            )
        client = _BUCKETS[scheme](url, bucket, max_requests_per_second)
        return ObjectStorage(client, folder, is_single_writer=unsafe_single_writer)
    if not scheme:
        return LocalStorage(Path(url).expanduser())
    parts = urlsplit(url)
    if scheme == "file" and parts.netloc in ("", "localhost") and parts.path.startswith("/"):
        return LocalStorage(Path(unquote(parts.path)))
    if scheme == "file":
        raise ConfigError(f"output.path {url!r} is not a local file URL; write it as file:///folder")
    raise ConfigError(
        f"output.path {url!r}: results go to a local disk, s3:// or gs://, not to {scheme}://; give a local "
        "path and copy the finished folder"
    )


def _s3(url: str, bucket: str, max_requests_per_second: float | None) -> ObjectClient:
    try:
        from pipeline.s3_client import S3Client
    except ImportError as error:
        raise MissingExtraError("s3fs", "s3", f"output.path {url!r}") from error
    return S3Client(bucket, max_requests_per_second)


def _gcs(url: str, bucket: str, max_requests_per_second: float | None) -> ObjectClient:
    try:
        from pipeline.gcs_client import GcsClient
    except ImportError as error:
        raise MissingExtraError("gcsfs", "gcs", f"output.path {url!r}") from error
    return GcsClient(bucket, max_requests_per_second)


_BUCKETS = {"s3": _s3, "s3a": _s3, "gs": _gcs, "gcs": _gcs}


_FULL = {errno.ENOSPC, errno.EDQUOT}
_NEVER = {
    errno.ENOENT: "its folder does not exist and cannot be made",
    errno.EACCES: "permission denied",
    errno.EPERM: "operation not permitted",
    errno.EROFS: "the file system is read-only",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EEXIST: "a part of the path is a file, not a folder",
    errno.EISDIR: "it is a folder",
    errno.ENAMETOOLONG: "the path is too long",
    errno.ELOOP: "too many symbolic links",
    errno.EFBIG: "the file is larger than the file system or the limit on file sizes allows",
}


def explain(error: OSError, path: Path, needed: int = 0) -> TidemillError:
    """The error to raise for `error` met while writing (or reading) `path`; `needed` in bytes, for a full
    disk.
    """
    if error.errno in _FULL:
        place = nearest_existing(path)
        free = shutil.disk_usage(place).free
        size = f"{needed:,} bytes" if needed else "more room"
        return RetryLater(
            f"the disk of {place} is full: {path} needs {size} and {free:,} are free; "
            "nothing was lost: make room and start the same command again"
        )
    if error.errno in _NEVER:
        return OutputError(f"{path} cannot be used: {_NEVER[error.errno]}; fix that or choose another folder")
    return PassingFault(f"{path}: {error.strerror or error}; start the same command again to go on")


def nearest_existing(path: Path) -> Path:
    """`path` or the closest folder above it that exists."""
    for place in (path, *path.parents):
        if os.path.lexists(place):
            return place
    return Path(path.anchor or ".")
