"""In which order a shard's rows run: windows of its rows, each planned as one and recorded once.

A shard of N rows is cut into windows [0, a), [a, b), ..., [z, N), each ending where a chunk ends. In a window
rows run in the order that its record gives, so a *place* in that order and a row's *position* in the shard
are two numbers. Chunks are runs of places, so that they commit while the job goes on; the final files are in
order of position. A window's record is created before the first of its chunks, once, and never changes:
whoever goes on with the shard cuts it in the same way. Its hash is in the commit record of each chunk.
"""

from __future__ import annotations

import base64
import hashlib
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from pipeline.commits import damaged, parse_record
from pipeline.fingerprint import canonical_json

ORDER_VERSION = 1

# Fewer tokens in common are no prefix worth naming; so many rows make one a template.
MIN_PREFIX_LEN = 16
MIN_TEMPLATE_ROWS = 8


@dataclass(frozen=True, slots=True)
class PrefixGroup:
    """Places [start, stop) of a shard, whose prompts begin with the same `prefix_len` tokens.

    Groups are nested: `parent` holds this one's places and more, and is shorter. None is the whole window.
    """

    start: int
    stop: int
    prefix_len: int
    parent: PrefixGroup | None

    @property
    def num_rows(self) -> int:
        return self.stop - self.start

    @property
    def template(self) -> PrefixGroup | None:
        """The longest prefix that many rows share, this one's or one before it."""
        group: PrefixGroup | None = self
        while group is not None and group.num_rows < MIN_TEMPLATE_ROWS:
            group = group.parent
        return group


@dataclass(frozen=True, kw_only=True)
class PlannedOrder:
    """How the rows of a window were ordered. Arrays are i64[rows], one entry a place.

    offsets: the row's position less the window's start; a permutation.
    prefix_lens: how many tokens the row has in common with the row before it (0 for the first, and for a
        row that was rejected).
    achievable: how many of its prompt's tokens a cache that forgets nothing would hold when it runs.
    """

    offsets: np.ndarray
    prefix_lens: np.ndarray
    achievable: np.ndarray

    def __post_init__(self) -> None:
        num_rows = len(self.offsets)
        if not np.array_equal(np.sort(self.offsets), np.arange(num_rows)):
            raise ValueError("the order of a window must name each of its rows once")
        if not len(self.prefix_lens) == len(self.achievable) == num_rows:
            raise ValueError("a window's arrays must have an entry for each row")


@dataclass(frozen=True, kw_only=True)
class WindowOrder:
    """Places [start, stop) of a shard, which are its rows [start, stop) in another order.

    `planned` is None where rows run in input order: place and position are the same there.
    """

    shard: int
    start: int
    stop: int
    planned: PlannedOrder | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise ValueError(f"a window has rows; [{self.start}, {self.stop}) has none")
        if self.planned is not None and len(self.planned.offsets) != self.stop - self.start:
            raise ValueError(f"the order of [{self.start}, {self.stop}) has {len(self.planned.offsets)} rows")

    def positions(self, start: int, stop: int) -> Sequence[int]:
        """The positions of the rows at places [start, stop), in running order."""
        if not self.start <= start <= stop <= self.stop:
            raise IndexError(f"places [{start}, {stop}) are not of the window [{self.start}, {self.stop})")
        if self.planned is None:
            return range(start, stop)
        return (self.planned.offsets[start - self.start : stop - self.start] + self.start).tolist()

    def achievable(self, place: int) -> int:
        """Tokens of the prompt at `place` that a cache which forgets nothing holds; 0 if not known."""
        return 0 if self.planned is None else int(self.planned.achievable[place - self.start])

    @cached_property
    def groups(self) -> tuple[PrefixGroup | None, ...]:
        """The smallest prefix group of each place; None where a row shares no beginning with a neighbour."""
        if self.planned is None:
            return (None,) * (self.stop - self.start)
        return tuple(_smallest_groups(self.planned.prefix_lens.tolist(), self.start))

    def group(self, place: int) -> PrefixGroup | None:
        """The smallest prefix group that the row at `place` is in."""
        return self.groups[place - self.start]

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        value: dict[str, Any] = {
            "order_version": ORDER_VERSION,
            "shard": self.shard,
            "start": self.start,
            "stop": self.stop,
            "planned": None,
        }
        if self.planned is not None:
            value["planned"] = {
                "offsets": _packed(self.planned.offsets),
                "prefix_lens": _packed(self.planned.prefix_lens),
                "achievable": _packed(self.planned.achievable),
            }
        return canonical_json(value)

    @classmethod
    def from_bytes(cls, data: bytes, place: str) -> WindowOrder:
        """Read a record back; OutputError, naming `place`, when it is damaged."""
        value = parse_record(data, place)
        try:
            if value.pop("order_version") != ORDER_VERSION:
                raise ValueError("another version")
            arrays = value.pop("planned")
            planned = None
            if arrays is not None:
                planned = PlannedOrder(**{name: _unpacked(each) for name, each in arrays.items()})
            return cls(**value, planned=planned)
        except (KeyError, TypeError, ValueError, zlib.error) as error:
            raise damaged(place) from error


def order_path(folder: str, shard: int, start: int) -> str:
    """Where the record of the window that begins at row `start` is."""
    return f"{folder}/orders/{shard:05d}/{start:012d}.json"


def _packed(array: np.ndarray) -> str:
    """Numbers in base64: little-endian differences of 32 bits, compressed."""
    return base64.b64encode(zlib.compress(np.diff(array, prepend=0).astype("<i4").tobytes(), 6)).decode()


def _unpacked(text: str) -> np.ndarray:
    raw = zlib.decompress(base64.b64decode(text))
    return np.cumsum(np.frombuffer(raw, "<i4").astype(np.int64))


class _OpenGroup:
    __slots__ = ("length", "start")

    def __init__(self, start: int, length: int):
        self.start = start
        self.length = length


def _smallest_groups(prefix_lens: Sequence[int], first: int) -> Iterator[PrefixGroup | None]:
    """The smallest group of each place, from what neighbours have in common.

    A group is a longest run of places whose neighbours all share `length` tokens or more.
    """
    num_rows = len(prefix_lens)
    lens = [length if length >= MIN_PREFIX_LEN else 0 for length in prefix_lens]
    # First the stops, from the right: where the group that is open at a place ends.
    bounds: list[tuple[int, int, int]] = []  # (start, stop, length), parents before children
    stack: list[_OpenGroup] = []
    for index in range(1, num_rows + 1):
        length = lens[index] if index < num_rows else 0
        start = index - 1
        while stack and stack[-1].length > length:
            closed = stack.pop()
            bounds.append((closed.start, index, closed.length))
            start = closed.start
        if length and (not stack or stack[-1].length < length):
            stack.append(_OpenGroup(start, length))
    bounds.sort(key=lambda each: (each[0], -each[1], each[2]))
    opened: list[PrefixGroup] = []
    following = iter(bounds)
    upcoming = next(following, None)
    for index in range(num_rows):
        while opened and opened[-1].stop - first <= index:
            opened.pop()
        while upcoming is not None and upcoming[0] == index:
            start, stop, length = upcoming
            opened.append(PrefixGroup(start + first, stop + first, length, opened[-1] if opened else None))
            upcoming = next(following, None)
        yield opened[-1] if opened else None
