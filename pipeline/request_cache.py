"""Results of rows, kept across runs: a row that asks for what one asked before is not computed.

    <cache.path>/<family>/objects/<sha256>.json    results of a committed chunk's rows, by their keys
    <cache.path>/<family>/indexes/, merged/        which object holds which key (pipeline/cache_index.py)

A family is everything that tokens depend on besides the row: the weights, the tokenizer, the engine's
options that are part of a run's fingerprint (the seed among them), the device with its kernels, and versions.
A row's key is its token ids, the sampling in effect and, where draws descend from it, its id. So what is
found is what this run would compute, byte for byte on a CPU; on devices whose rounding depends on what runs
together, it is what a run computed.

Objects are created once, named by the hash of their content, which is checked when they are read; they are
JSON. One that is damaged is passed over and counted, and its rows are computed. What is kept is only what
ended by itself: "stop" or "length". A run finds what was there when it began.

Requests to a store: at the start three listings (a request per thousand names), and a read of each index, at
most 64 and one for every 64 merged before; objects without an index, at most 256, are read too. Then one
create a committed chunk that computed anything, one for every 256 of those, and one read for an object from
which rows are found, the last few being kept. A cache of a million rows in chunks of 64 is 15,600 objects:
sixteen listings, 61 indexes of half a megabyte, and 100 MB of memory. Nothing is ever removed: delete the
folder of a family to forget it.

Who can write to the folder can say what rows come out: keep it as safe as the output.
"""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.checkpoints.remote import without_secrets
from engine.errors import ConfigError, OutputError, RetryLater
from engine.outputs import RequestOutput
from pipeline.cache_index import NOT_READABLE, CacheIndex, object_path
from pipeline.cached_results import decode, encode, from_json, row_key
from pipeline.commits import publish_record, retrying
from pipeline.fingerprint import sha256_json
from pipeline.rows import Prompt
from pipeline.storage import Storage, open_storage

logger = logging.getLogger(__name__)

KEPT_OBJECTS = 16
"""Decoded ones: rows of a chunk are asked for together, and several chunks are open."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSettings:
    """path: a local folder, or one of a bucket (s3://, gs://), for results to be used again by runs to come,
    and to be looked for; None keeps nothing and looks nowhere.
    """

    path: str | None = None


class RequestCache:
    """One family of a cache. A fault of its storage while the run goes on costs hits, not the run."""

    def __init__(self, storage: Storage, facts: Mapping[str, Any]):
        """`facts`: JSON values, all that tokens depend on besides the row.

        Raises OutputError or RetryLater when the storage cannot be used.
        """
        self._storage = storage.subfolder(sha256_json(facts)[:32])
        self._index = CacheIndex(self._storage)
        self._num_damaged = self._index.num_damaged
        self._objects: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._is_failing = False

    def __len__(self) -> int:
        """Rows that were there at the start."""
        return len(self._index)

    def find(self, prompt: Prompt, request_id: str) -> RequestOutput | None:
        """The result for a row, if there is one."""
        key = row_key(prompt)
        name = self._index.find(key)
        if name is None:
            return None
        rows = self._rows(name)
        if key not in rows:
            return None
        try:
            return from_json(rows[key], prompt, request_id)
        except NOT_READABLE as error:
            self._pass_over(f"row {key} of {name}", error)
            return None

    def store(self, results: Mapping[str, Any]) -> int:
        """Keep the results of a committed chunk's rows (`to_json`), by key; how many were kept."""
        if not results or self._is_failing:
            return 0
        try:
            data = encode(results)
            name = hashlib.sha256(data).hexdigest()
            publish_record(self._storage, object_path(name), data)
            self._index.note(name, list(results))
        except ValueError as error:  # a log-probability that is no number
            logger.warning("the rows of a chunk are not kept in the cache: %s", error)
            return 0
        except (RetryLater, OutputError) as error:
            self._fail(error)
            return 0
        return len(results)

    def close(self) -> None:
        """Index what was kept."""
        if not self._is_failing:
            try:
                self._index.flush()
            except (RetryLater, OutputError) as error:
                self._fail(error)

    def take_damaged(self) -> int:
        """Objects and rows passed over since the last call."""
        taken, self._num_damaged = self._num_damaged, 0
        return taken

    def take_requests(self) -> dict[str, int]:
        """Requests sent to the cache's store since the last call, by kind."""
        return {f"cache {kind}": count for kind, count in self._storage.take_requests().items()}

    def _rows(self, name: str) -> dict[str, Any]:
        rows = self._objects.get(name)
        if rows is None:
            rows = self._objects[name] = self._read(name)
            while len(self._objects) > KEPT_OBJECTS:
                self._objects.popitem(last=False)
        self._objects.move_to_end(name)
        return rows

    def _read(self, name: str) -> dict[str, Any]:
        """The rows of an object; none where it is damaged or cannot be read."""
        if self._is_failing:
            return {}
        try:
            data = retrying(lambda: self._storage.read(object_path(name)))
            return decode(data or b"", name)
        except NOT_READABLE as error:
            self._pass_over(object_path(name), error)
        except (RetryLater, OutputError) as error:
            self._fail(error)
        return {}

    def _pass_over(self, what: str, error: Exception) -> None:
        self._num_damaged += 1
        logger.warning("%s: %s is damaged and passed over: %s", self._storage.url, what, error)

    def _fail(self, error: Exception) -> None:
        self._is_failing = True
        logger.warning("the request cache is not used any more in this run: %s", error)


def open_request_cache(path: str, facts: Mapping[str, Any]) -> RequestCache:
    """The family of a cache that a job uses. Raises ConfigError, naming `cache.path`, where it cannot be
    used."""
    try:
        storage = open_storage(path)
        storage.check()
        return RequestCache(storage, facts)
    except ConfigError as error:
        raise ConfigError(f"cache.path={without_secrets(path)}: {error}") from error
