"""Who works on what of a shard, as it is on record: all of it is read by one listing of the shard's folder.

    claims/<shard>/000002.json            the second epoch: who took the shard, but for what is let to others
    claims/<shard>/000002-001.ask         another worker asks the holder of 000002 for a part of the shard
    claims/<shard>/000002-001.json        the answer: the chunks that are let to it
    claims/<shard>/000002.full            no more is let: all that this holder has to do is begun
    claims/<shard>/<key>.released         its holder gave it back
    claims/<shard>/<key>.dead             somebody found its holder dead (of an epoch the next one says so)
    heartbeats/<shard>/<key>.json         overwritten by the holder: a nonce, and the rows in flight

Each is created once, heartbeats excepted. A part may be let on: 000002-001-001 is a part of 000002-001.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pipeline.commits import damaged, parse_record, retrying
from pipeline.process_identity import ProcessIdentity
from pipeline.storage import Storage

_NAME = re.compile(r"(\d{6,}(?:-\d{3,})*)\.(json|ask|full|released|dead)")

Ranges = tuple[tuple[int, int], ...]
"""Half-open ranges of chunk numbers."""


@dataclass(frozen=True, slots=True)
class Claim:
    """One worker's right to chunks of a shard; `chunks` is None for an epoch: all that is not let."""

    shard: int
    key: str
    attempt: str
    owner: ProcessIdentity
    chunks: Ranges | None

    @property
    def epoch(self) -> int:
        return int(self.key.partition("-")[0])


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The last words of a claim's holder. `alone_progress`: set when the only row in flight ran alone, its
    steps so far.
    """

    nonce: str
    in_flight: frozenset[str]
    alone_progress: int | None


@dataclass(frozen=True, slots=True)
class Claims:
    """What the listing of a shard's folder says: its keys, each with the kinds of records it has."""

    shard: int
    records: Mapping[str, frozenset[str]]

    def has(self, key: str, *kinds: str) -> bool:
        """Whether a key has a record of one of these kinds."""
        return not self.records.get(key, frozenset()).isdisjoint(kinds)

    @property
    def epochs(self) -> dict[int, bool]:
        """Every epoch in order, with whether it was released."""
        keys = [key for key in self.records if "-" not in key and self.has(key, "json")]
        return {int(key): self.has(key, "released") for key in sorted(keys)}

    @property
    def latest(self) -> int:
        """The last epoch; 0 before the first."""
        return max(self.epochs, default=0)

    @property
    def open_parts(self) -> list[str]:
        """Parts that are let and were neither given back nor found abandoned."""
        return [
            key
            for key in sorted(self.records)
            if "-" in key and self.has(key, "json") and not self.has(key, "released", "dead")
        ]

    @property
    def dead_parts(self) -> list[str]:
        """Parts whose holders were found dead."""
        return [
            key
            for key in sorted(self.records)
            if "-" in key
            and self.has(key, "dead")
            and self.has(key, "json")
            and not self.has(key, "released")
        ]

    @property
    def open_keys(self) -> list[str]:
        """Whose holders may be at work: the last epoch's and the parts'."""
        latest = epoch_key(self.latest)
        is_open = self.has(latest, "json") and not self.has(latest, "released")
        return [*([latest] if is_open else []), *self.open_parts]

    def asks(self, key: str) -> list[str]:
        """The parts that are asked for of a key's holder, with no answer so far."""
        return [
            each
            for each in sorted(self.records)
            if lessor(each) == key and self.has(each, "ask") and not self.has(each, "json", "dead")
        ]

    def next_part(self, key: str) -> str:
        """The key of the next part that may be asked for."""
        numbers = [int(each.rpartition("-")[2]) for each in self.records if lessor(each) == key]
        return f"{key}-{1 + max(numbers, default=0):03d}"


def epoch_key(epoch: int) -> str:
    return f"{epoch:06d}"


def lessor(key: str) -> str:
    """The key that a part was let from; empty for an epoch."""
    return key.rpartition("-")[0]


def is_part_of(key: str, other: str) -> bool:
    """Whether `key` was let from `other`, or from a part of it."""
    return key.startswith(f"{other}-")


def claims_folder(state: str, shard: int) -> str:
    return f"{state}/claims/{shard:05d}"


def claim_path(state: str, shard: int, key: str, kind: str = "json") -> str:
    return f"{claims_folder(state, shard)}/{key}.{kind}"


def heartbeat_path(state: str, shard: int, key: str) -> str:
    return f"{state}/heartbeats/{shard:05d}/{key}.json"


def read_claims(storage: Storage, state: str, shard: int) -> Claims:
    names = retrying(lambda: storage.list(claims_folder(state, shard)))
    records: dict[str, set[str]] = {}
    for name in names:
        found = _NAME.fullmatch(name)
        if found is not None:
            records.setdefault(found[1], set()).add(found[2])
    return Claims(shard, {key: frozenset(kinds) for key, kinds in records.items()})


def read_claim(storage: Storage, state: str, shard: int, key: str) -> Claim:
    """A claim that is there. Raises OutputError when it is damaged."""
    path = claim_path(state, shard, key)
    place = f"{storage.url}/{path}"
    value = parse_record(retrying(lambda: storage.read(path)) or b"", place)
    try:
        chunks = value.get("chunks")
        return Claim(
            shard,
            key,
            value["attempt"],
            ProcessIdentity.from_json(value["owner"]),
            None if chunks is None else tuple((start, stop) for start, stop in chunks),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(place) from error


def read_heartbeat(storage: Storage, state: str, shard: int, key: str) -> Heartbeat | None:
    """The last heartbeat of a claim; None before its first, or when a power cut spoilt it."""
    path = heartbeat_path(state, shard, key)
    data = retrying(lambda: storage.read(path))
    if data is None:
        return None
    try:
        value = json.loads(data)
        return Heartbeat(value["nonce"], frozenset(value["in_flight"]), value["alone_progress"])
    except (ValueError, KeyError, TypeError):
        return None


def is_inside(number: int, ranges: Sequence[tuple[int, int]]) -> bool:
    return any(start <= number < stop for start, stop in ranges)


def deaths(claims: Claims) -> Iterator[tuple[str, bool]]:
    """The keys whose holders ended before the last epoch, oldest first, with whether they gave them back.

    Of parts only those whose holders died: while others give parts back, a row may go on killing.
    """
    keys = [epoch_key(epoch) for epoch in claims.epochs if epoch < claims.latest] + claims.dead_parts
    for key in sorted(keys, key=lambda key: (key.partition("-")[0], "-" not in key, key)):
        yield key, "-" not in key and claims.has(key, "released")
