"""Which object of the request cache holds which row: indexes, each written once.

    indexes/<sha256>.json   what some objects hold, a list of keys each
    merged/<sha256>.json    the same of many indexes, which it names and replaces

A start lists both folders and reads what no merged one replaces. Objects that no index names, because their
worker died or the index is damaged, are read themselves, up to MAX_UNINDEXED of them, and indexed.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.cached_results import KEY_CHARS, decode
from pipeline.commits import publish_record, retrying
from pipeline.storage import Storage

logger = logging.getLogger(__name__)

OBJECTS_PER_INDEX = 256
MAX_INDEXES = 64
"""More than these are merged into one by the next who starts."""
MAX_UNINDEXED = 256
NOT_READABLE = (ValueError, KeyError, TypeError, AttributeError)
"""What comes of an object that is damaged, or something else."""
_SUFFIX = ".json"


class CacheIndex:
    """What a family of the cache held when it was opened: `find` gives the object that has a key.

    A known row takes about a hundred bytes of memory.
    """

    def __init__(self, storage: Storage):
        self._storage = storage
        self._objects: list[str] = []
        self._object_of: dict[bytes, int] = {}
        self._noted: dict[str, str] = {}
        self.num_damaged = 0
        self._open()

    def __len__(self) -> int:
        return len(self._object_of)

    def find(self, key: str) -> str | None:
        """The name of the object that holds this key's row."""
        index = self._object_of.get(bytes.fromhex(key))
        return None if index is None else self._objects[index]

    def note(self, name: str, keys: Sequence[str]) -> None:
        """An object was created, for those who start later: what is found here stays the same."""
        self._noted[name] = "".join(keys)
        if len(self._noted) >= OBJECTS_PER_INDEX:
            self.flush()

    def flush(self) -> None:
        """Write what was noted."""
        if self._noted:
            self._write("indexes", self._noted, ())
            self._noted = {}

    def _open(self) -> None:
        objects = self._list("objects")
        if not objects:
            return
        held: dict[str, str] = {}
        replaced: set[str] = set()
        for name in self._list("merged"):
            names, replaces = self._read("merged", name)
            held |= names
            replaced |= set(replaces)
        single = [name for name in self._list("indexes") if name not in replaced]
        of_single: dict[str, str] = {}
        for name in single:
            of_single |= self._read("indexes", name)[0]
        if len(single) > MAX_INDEXES:
            self._write("merged", of_single, single)
        held |= of_single
        for name in [name for name in objects if name not in held][:MAX_UNINDEXED]:
            self._index(name)
        for name in [name for name in objects if name in held]:
            self._know(name, held[name])
        self.flush()

    def _index(self, name: str) -> None:
        data = retrying(lambda: self._storage.read(object_path(name)))
        try:
            keys = "".join(decode(data or b"", name))
            self._know(name, keys)
        except NOT_READABLE as error:
            self._pass_over(object_path(name), error)
        else:
            self._noted[name] = keys

    def _know(self, name: str, keys: str) -> None:
        for key in _split(keys):
            self._object_of[key] = len(self._objects)
        self._objects.append(name)

    def _list(self, folder: str) -> list[str]:
        names = retrying(lambda: self._storage.list(folder))
        return [name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX)]

    def _read(self, folder: str, name: str) -> tuple[dict[str, str], list[str]]:
        """The keys of each object that an index names, and the indexes it replaces; none if it is damaged."""
        path = f"{folder}/{name}{_SUFFIX}"
        data = retrying(lambda: self._storage.read(path)) or b""
        try:
            if hashlib.sha256(data).hexdigest() != name:
                raise ValueError("its content is not what it was created with")
            value = json.loads(data)
            objects: Mapping[str, str] = value["objects"]
            for keys in objects.values():
                _split(keys)
            return dict(objects), list(value["replaces"])
        except NOT_READABLE as error:
            self._pass_over(path, error)
            return {}, []

    def _write(self, folder: str, objects: Mapping[str, str], replaces: Sequence[str]) -> None:
        value: dict[str, Any] = {"objects": objects, "replaces": list(replaces)}
        data = json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
        publish_record(self._storage, f"{folder}/{hashlib.sha256(data).hexdigest()}{_SUFFIX}", data)

    def _pass_over(self, path: str, error: Exception) -> None:
        self.num_damaged += 1
        logger.warning("%s/%s is damaged and passed over: %s", self._storage.url, path, error)


def object_path(name: str) -> str:
    return f"objects/{name}{_SUFFIX}"


def _split(keys: str) -> list[bytes]:
    """Raises ValueError for what is no list of keys."""
    if len(keys) % KEY_CHARS:
        raise ValueError("its keys are cut off")
    return [bytes.fromhex(keys[start : start + KEY_CHARS]) for start in range(0, len(keys), KEY_CHARS)]
