"""Storage in a bucket: conditional puts where a local disk has links.

What differs between stores is in an `ObjectClient` (pipeline/s3_client.py, pipeline/gcs_client.py): how a
request is made and what its errors mean. What an error means for a run is decided here.

A client repeats a request whose answer did not come, so a create may be told "exists already" of the object
that it made itself a moment before. LOST therefore says no more than that the name is taken: whose it is is
read back, as for UNKNOWN.
"""

from __future__ import annotations

import builtins
import logging
import os
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from enum import Enum, auto
from pathlib import Path
from typing import NoReturn, TypeVar

from engine.errors import OutputError, RetryLater, TidemillError
from pipeline.commits import retrying
from pipeline.storage import Outcome, PassingFault, Storage, explain

logger = logging.getLogger(__name__)

_PROBE = ".tidemill-probe-"
_UPLOAD = "?uploadId="

T = TypeVar("T")


class Fault(Enum):
    """What a client's error means."""

    MISSING = auto()  # no such object, or no such bucket
    EXISTS = auto()  # a create found the name taken
    EXPIRED = auto()  # the credentials are no longer, or not yet, accepted
    REFUSED = auto()  # the store will not ever do this as asked
    PASSING = auto()  # throttled, timed out, cut off, or a fault inside the store; it may have been applied


class ObjectClient(ABC):
    """A bucket of one store. Methods raise the client library's own errors, for `fault_of` to judge."""

    scheme: str
    bucket: str

    @abstractmethod
    def connect(self) -> None:
        """Begin anew, credentials included: they are read again from where they came from."""

    @abstractmethod
    def create(self, key: str, data: bytes) -> None:
        """Create an object in one conditional request."""

    @abstractmethod
    def create_from_file(self, key: str, path: Path) -> None:
        """Create an object, a large one in parts, if nothing has its name when it is completed."""

    @abstractmethod
    def create_in_parts(self, key: str, data: bytes) -> None:
        """As `create_from_file` creates a large one, however small the data; for the probe."""

    @abstractmethod
    def overwrite(self, key: str, data: bytes) -> None: ...

    @abstractmethod
    def read(self, key: str) -> bytes: ...

    @abstractmethod
    def fetch(self, key: str, path: Path) -> None:
        """Write an object's content to a local file."""

    @abstractmethod
    def size(self, key: str) -> int:
        """In bytes."""

    @abstractmethod
    def list(self, prefix: str) -> dict[str, float | None]:
        """What follows `prefix` (which is empty or ends with a slash) up to the next slash, each once, with
        the time it was written, in seconds since 1970, or None for a folder.
        """

    def uploads(self, prefix: str) -> dict[tuple[str, str], float]:
        """Uploads in parts below `prefix` that are not completed, by key and id, with the time each began.
        There are none where the store forgets them by itself.
        """
        return {}

    def abort_upload(self, key: str, upload_id: str) -> None:
        """Abort an upload in parts; MISSING when it is gone already."""
        raise NotImplementedError(f"{self.scheme} lists no uploads")

    @abstractmethod
    def delete(self, key: str) -> None: ...

    @abstractmethod
    def fault_of(self, error: Exception) -> Fault | None:
        """None for an error that is not the store's."""

    @abstractmethod
    def take_requests(self) -> Mapping[str, int]:
        """Requests sent since the last call, by kind."""


class ObjectStorage(Storage):
    """A folder of a bucket. `is_single_writer` is the user's word that no second process ever writes there,
    with which a store that knows no conditional requests is used all the same.
    """

    requests_are_dear = True

    def __init__(self, client: ObjectClient, folder: str, *, is_single_writer: bool = False):
        self._client = client
        self._folder = folder.strip("/")
        self._is_single_writer = is_single_writer
        self._looks_first = False  # instead of a condition, where those are ignored
        self._is_checked = False

    @property
    def url(self) -> str:
        return f"{self._client.scheme}://{'/'.join(filter(None, (self._client.bucket, self._folder)))}"

    def subfolder(self, name: str) -> ObjectStorage:
        inside = ObjectStorage(self._client, self._key(name), is_single_writer=self._is_single_writer)
        inside._looks_first, inside._is_checked = self._looks_first, self._is_checked
        return inside

    def check(self) -> None:
        """Find out by trying, once, whether of two creates the second is refused, in one request and in
        parts.
        """
        if self._is_checked:
            return
        in_one = retrying(lambda: self._is_exclusive(self._client.create))
        in_parts = in_one and retrying(lambda: self._is_exclusive(self._client.create_in_parts))
        if not (in_one and in_parts):
            kind = "in parts " if in_one else ""
            if not self._is_single_writer:
                raise OutputError(
                    f"{self.url}: this store overwrites an object that is created {kind}twice instead of "
                    "refusing the second (it ignores conditional requests), so workers could overwrite each "
                    "other's results; use another store, or set output.unsafe_single_writer=true and never "
                    "start a second process on this output"
                )
            logger.warning(
                "%s ignores conditional requests: nothing protects it from a second writer", self.url
            )
            self._looks_first = True
        self._is_checked = True

    def _is_exclusive(self, create: Callable[[str, bytes], None]) -> bool:
        key = self._key(f"{_PROBE}{uuid.uuid4().hex}")
        try:
            outcomes = [
                self._create(key, lambda data=data: create(key, data)) for data in (b"first", b"second")
            ]
            if Outcome.UNKNOWN in outcomes:
                raise PassingFault(f"{self.url} did not answer; start the same command again")
            return outcomes[1] is Outcome.LOST and self._read(key) == b"first"
        finally:
            with suppress(TidemillError):  # the fault that brought us here is the one to tell
                self._delete(key)

    def create(self, path: str, data: bytes) -> Outcome:
        if not data:
            raise ValueError(f"an empty object is never written: {path}")
        key = self._key(path)
        return self._create(key, lambda: self._client.create(key, data))

    def create_from_file(self, path: str, spool: Path) -> Outcome:
        key = self._key(path)
        return self._create(key, lambda: self._client.create_from_file(key, spool))

    def _create(self, key: str, action: Callable[[], None]) -> Outcome:
        if self._looks_first and self._size(key) is not None:
            return Outcome.LOST

        def create() -> Outcome:
            action()
            return Outcome.WON

        return self._ask(key, create, {Fault.EXISTS: Outcome.LOST, Fault.PASSING: Outcome.UNKNOWN})

    def read(self, path: str) -> bytes | None:
        return self._read(self._key(path))

    def _read(self, key: str) -> bytes | None:
        return self._ask(key, lambda: self._client.read(key), {Fault.MISSING: None})

    def size(self, path: str) -> int | None:
        return self._size(self._key(path))

    def _size(self, key: str) -> int | None:
        return self._ask(key, lambda: self._client.size(key), {Fault.MISSING: None})

    def local_file(self, path: str, spool_dir: Path) -> Path | None:
        """Fetched once into a folder: an object of a run never changes."""
        target = spool_dir / f"fetched-{path.replace('/', '-')}"
        if target.exists():
            return target
        unfinished = target.with_name(f"{target.name}-{uuid.uuid4().hex}")
        key = self._key(path)

        def fetch() -> bool:
            self._client.fetch(key, unfinished)
            return True

        try:
            spool_dir.mkdir(parents=True, exist_ok=True)
            if not self._ask(key, fetch, {Fault.MISSING: False}):
                return None
            os.replace(unfinished, target)
        finally:
            unfinished.unlink(missing_ok=True)
        return target

    def list(self, folder: str) -> list[str]:
        return sorted(self._listed(folder))

    def ages(self, folder: str) -> dict[str, float]:
        now = time.time()
        return {name: now - at for name, at in self._listed(folder).items() if at is not None}

    def _listed(self, folder: str) -> dict[str, float | None]:
        prefix = self._prefix(folder)
        return self._ask(prefix, lambda: self._client.list(prefix), {Fault.MISSING: {}})

    def leftovers(self, min_age_s: float) -> builtins.list[str]:
        prefix, now = self._prefix(""), time.time()
        uploads = self._ask(prefix, lambda: self._client.uploads(prefix), {Fault.MISSING: {}})
        probes = [name for name, age in self.ages("").items() if name.startswith(_PROBE) and age >= min_age_s]
        old = [each for each, began in uploads.items() if now - began >= min_age_s]
        return [*probes, *(f"{key.removeprefix(prefix)}{_UPLOAD}{upload}" for key, upload in sorted(old))]

    def remove_leftover(self, name: str) -> None:
        path, is_upload, upload = name.partition(_UPLOAD)
        key = self._key(path)
        if is_upload:
            self._ask(key, lambda: self._client.abort_upload(key, upload), {Fault.MISSING: None})
        else:
            self._delete(key)

    def overwrite_heartbeat(self, path: str, data: bytes) -> None:
        key = self._key(path)
        self._ask(key, lambda: self._client.overwrite(key, data), {})

    def discard(self, path: str) -> None:
        self._delete(self._key(path))

    def _delete(self, key: str) -> None:
        self._ask(key, lambda: self._client.delete(key), {Fault.MISSING: None})

    def take_requests(self) -> Mapping[str, int]:
        return self._client.take_requests()

    def _prefix(self, folder: str) -> str:
        key = self._key(folder)
        return f"{key}/" if key else ""

    def _key(self, path: str) -> str:
        return "/".join(filter(None, (self._folder, path)))

    def _ask(self, key: str, action: Callable[[], T], answers: Mapping[Fault, T]) -> T:
        """The action's result, or what its fault stands for; credentials are read anew once if need be."""
        for may_reconnect in (True, False):
            try:
                return action()
            except Exception as error:  # judged: what is not the store's goes on as it is
                fault = self._client.fault_of(error)
                if fault is Fault.EXPIRED and may_reconnect:
                    logger.info("%s: the credentials were refused; they are read again", self.url)
                    self._client.connect()
                elif fault is not None and fault in answers:
                    return answers[fault]
                else:
                    self._raise(fault, key, error)
        raise AssertionError("the second try returns or raises")

    def _raise(self, fault: Fault | None, key: str, error: Exception) -> NoReturn:
        place = f"{self._client.scheme}://{self._client.bucket}/{key}"
        text = " ".join(str(error).split()) or type(error).__name__
        if fault is None:
            if isinstance(error, OSError) and error.errno is not None:  # of the local spool
                raise explain(error, Path(error.filename or ".")) from error
            raise error
        if fault is Fault.EXPIRED:
            raise RetryLater(
                f"{place}: the credentials have expired or are not valid ({text}); nothing was lost: renew "
                "them and start the same command again"
            ) from error
        if fault is Fault.PASSING:
            raise PassingFault(f"{place}: {text}; start the same command again to go on") from error
        if fault is Fault.MISSING:
            raise OutputError(
                f"{place}: there is no bucket {self._client.bucket!r}; create it first"
            ) from error
        raise OutputError(f"{place}: {text}; check the credentials and what they permit") from error
