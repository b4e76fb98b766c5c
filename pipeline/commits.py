"""Commit records: `commits/<shard>/<chunk>.json`, created once, decide which attempt at a chunk counts.

Here too is how an unsure answer is settled: an object's name is created once, so reading it back tells
whose it is.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
import zlib
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from engine.errors import OutputError, RetryLater
from pipeline.exact_duplicates import KEY_BYTES
from pipeline.fingerprint import canonical_json
from pipeline.storage import Outcome, PassingFault, Storage

COMMIT_VERSION = 3
# Pauses of 0.1, 0.2, 0.4, … seconds, never more than the cap, half a minute together: a store that restarts,
# or sheds load, is waited for; one that is down for longer ends the run, which is resumed.
MAX_TRIES = 10
_FIRST_PAUSE_S = 0.1
_MAX_PAUSE_S = 8.0

T = TypeVar("T")
Sleep = Callable[[float], None]


@dataclass(frozen=True, slots=True)
class FileRef:
    """An object of the output and what it must hold; the path is relative to the output folder."""

    path: str
    sha256: str
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitRecord:
    """One committed chunk: the rows at places [start, stop) of its shard's order.

    `order` is the SHA-256 of its window's record (pipeline/row_order.py). `counts` has rows, ok, rejected,
    duplicates, samples, prompt_tokens, generated_tokens, where rows = ok + rejected + duplicates, and a
    duplicate repeats another row of the chunk. `duplicate_keys` are the keys of its rows that could be
    duplicates, joined in input order (pipeline/exact_duplicates.py). `rejects` is None when no row was
    rejected.
    """

    shard: int
    chunk: int
    attempt: str
    start: int
    stop: int
    order: str
    data: FileRef
    trace: FileRef
    rejects: FileRef | None
    counts: Mapping[str, int]
    duplicate_keys: bytes
    input_version: Mapping[str, Any]
    packed_metrics: bytes

    @property
    def metrics(self) -> dict[str, Any]:
        """Unpacked at each look: a shard has thousands of records, which are held until it is finished."""
        return json.loads(zlib.decompress(self.packed_metrics))

    def to_bytes(self) -> bytes:
        keys = b64encode(self.duplicate_keys).decode("ascii")
        fields = {name: value for name, value in asdict(self).items() if name != "packed_metrics"}
        fields |= {"duplicate_keys": keys, "metrics": self.metrics}
        return canonical_json({"commit_version": COMMIT_VERSION, **fields})

    @classmethod
    def from_bytes(cls, data: bytes, place: str) -> CommitRecord:
        value = parse_record(data, place)
        try:
            version = value.pop("commit_version")
            if version != COMMIT_VERSION:
                raise OutputError(f"{place}: a commit record of version {version}, this is {COMMIT_VERSION}")
            for kind in ("data", "trace", "rejects"):
                value[kind] = FileRef(**value[kind]) if value[kind] is not None else None
            value["packed_metrics"] = pack_metrics(value.pop("metrics"))
            value["duplicate_keys"] = b64decode(value["duplicate_keys"], validate=True)
            if len(value["duplicate_keys"]) % KEY_BYTES:
                raise damaged(place)
            return cls(**value)
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(place) from error


def pack_metrics(metrics: Mapping[str, Any]) -> bytes:
    return zlib.compress(canonical_json(metrics), 1)


def damaged(place: str) -> OutputError:
    return OutputError(
        f"{place} is damaged; remove that file and start the same command again, what it recorded is redone"
    )


def parse_record(data: bytes, place: str) -> dict[str, Any]:
    """A JSON object as stored at `place`, or OutputError."""
    try:
        value = json.loads(data)
    except ValueError as error:
        raise damaged(place) from error
    if not isinstance(value, dict):
        raise damaged(place)
    return value


def retrying(action: Callable[[], T], sleep: Sleep = time.sleep) -> T:
    """Run an operation that may be repeated, again after a passing fault, with growing, jittered pauses."""
    for attempt in range(MAX_TRIES - 1):
        try:
            return action()
        except PassingFault:
            _pause(attempt, sleep)
    return action()


def publish_record(storage: Storage, path: str, data: bytes, sleep: Sleep = time.sleep) -> bytes:
    """Create a small object and return what is stored under its name: `data` if we won, else another's.

    Raises RetryLater when that cannot be found out; nothing is deleted then.
    """
    for attempt in range(MAX_TRIES):
        try:
            if storage.create(path, data) is Outcome.WON:
                return data
            stored = storage.read(path)
            if stored is not None:
                return stored
        except PassingFault:
            if attempt == MAX_TRIES - 1:
                raise
        _pause(attempt, sleep)
    raise _unsure(storage, path)


def publish_file(
    storage: Storage, path: str, spool: Path, sha256: str, spool_dir: Path, sleep: Sleep = time.sleep
) -> bool:
    """Create an object from a spool file; False when the name holds other bytes. Raises as
    `publish_record`.
    """
    num_bytes = spool.stat().st_size
    for attempt in range(MAX_TRIES):
        try:
            outcome = storage.create_from_file(path, spool)
            size = storage.size(path)
            if outcome is Outcome.WON and size == num_bytes:
                return True
            if size is not None:
                stored = storage.local_file(path, spool_dir)
                if stored is not None:
                    return size == num_bytes and sha256_file(stored) == sha256
        except PassingFault:
            if attempt == MAX_TRIES - 1:
                raise
        _pause(attempt, sleep)
    raise _unsure(storage, path)


def checked_file(storage: Storage, ref: FileRef, spool_dir: Path, remedy: str) -> Path:
    """A local file with exactly the content `ref` names; OutputError with the remedy when it is not so."""
    stored = retrying(lambda: storage.local_file(ref.path, spool_dir))
    place = f"{storage.url}/{ref.path}"
    if stored is None:
        raise OutputError(f"{place} is missing; {remedy}")
    if stored.stat().st_size != ref.num_bytes or sha256_file(stored) != ref.sha256:
        raise OutputError(f"{place} is damaged (its content is not what was committed); {remedy}")
    return stored


def sha256_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unsure(storage: Storage, path: str) -> RetryLater:
    return RetryLater(
        f"{storage.url}/{path}: could not find out whether it was written; nothing was deleted, "
        "start the same command again"
    )


def _pause(attempt: int, sleep: Sleep) -> None:
    # Jitter, so that workers that met the same fault do not come back together. No row's draw uses this.
    sleep(min(_FIRST_PAUSE_S * 2**attempt, _MAX_PAUSE_S) * random.uniform(0.5, 1.5))
