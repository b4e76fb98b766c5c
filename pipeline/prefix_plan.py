"""The prefix plan of a window: rows that begin alike run one after the other, so that each beginning is
computed once and is given up only when no row is left that needs it.

    planner = WindowPlanner(shard, start, seen)
    planner.add(prompt_or_reject)            # in input order, one a row
    window = planner.plan()                  # the WindowOrder to record

The rows' hashes, sorted, are the prefix tree laid flat: neighbours have the longest beginnings in common, and
what they have in common is all there is to know of the tree. So a window takes a byte a token and some tens
of bytes a row, and nothing else is held. Depth-first order gives each template to all of its rows in one go.
Where a node branches, longer work (prompt and max_tokens) goes first, so that what is
left at the end is short; exact duplicates are neighbours.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from pipeline.prefix_hashes import UNIT, PrefixHasher, SeenPrefixes
from pipeline.row_order import PlannedOrder, WindowOrder
from pipeline.rows import Prompt, Reject

MAX_WINDOW_ROWS = 32_768
MAX_WINDOW_TOKENS = 2**28
"""Rows and tokens planned as one: all of them are tokenised before the first runs."""

EARLY_ROWS = 4096
EARLY_SHARE = 0.01
"""Where the first so many rows of a window have less than this in common, planning more is not worth it."""

_Key = tuple[int, int, int]  # less work, sampling, first position: the least runs first


class _Node:
    """Rows with their first `depth` hashes in common: nodes below, and rows that end or branch off here."""

    __slots__ = ("depth", "items", "key")

    def __init__(self, depth: int):
        self.depth = depth
        self.items: list[tuple[_Key, _Node | int]] = []
        self.key: _Key = (0, 0, 0)

    def close(self) -> _Node:
        """All is in: what runs first is first."""
        self.items.sort(key=lambda item: item[0])
        self.key = self.items[0][0]
        return self


class WindowPlanner:
    """Orders the rows of one window, which begins at row `start` of shard number `shard`.

    seen: the prefixes of windows planned before; this window's are added to it.
    """

    def __init__(self, shard: int, start: int, seen: SeenPrefixes):
        self._shard = shard
        self._start = start
        self._seen = seen
        self._hasher = PrefixHasher()
        self._prompts: list[int] = []  # offsets of rows with a prompt
        self._rejects: list[int] = []
        self._hashes: list[bytes] = []  # of each prompt
        self._lens: list[int] = []
        self._work: list[int] = []
        self._sampling: list[int] = []
        self._known_samplings: dict[str, int] = {}
        self._last_sampling: object = None
        self.num_prompt_tokens = 0

    @property
    def num_rows(self) -> int:
        return len(self._prompts) + len(self._rejects)

    @property
    def is_full(self) -> bool:
        """Time to end the window: so many rows, or so many tokens (a byte is held for each)."""
        return self.num_rows >= MAX_WINDOW_ROWS or self.num_prompt_tokens >= MAX_WINDOW_TOKENS

    def add(self, row: Prompt | Reject) -> None:
        """Take the next row of the window."""
        offset = self.num_rows
        if row.position != self._start + offset:
            raise ValueError(f"row {row.position} came where row {self._start + offset} was to come")
        if isinstance(row, Reject):
            self._rejects.append(offset)
            return
        self._prompts.append(offset)
        self._hashes.append(self._hasher.hashes(row.token_ids).tobytes())
        self._lens.append(len(row.token_ids))
        self._work.append(len(row.token_ids) + row.sampling.max_tokens)
        self._sampling.append(self._sampling_number(row))
        self.num_prompt_tokens += len(row.token_ids)

    def _sampling_number(self, row: Prompt) -> int:
        if row.sampling is self._last_sampling:
            return self._sampling[-1]
        self._last_sampling = row.sampling
        return self._known_samplings.setdefault(repr(row.sampling), len(self._known_samplings))

    def is_worth_planning(self) -> bool:
        """Whether the rows so far have enough in common, with each other or with windows before."""
        order = sorted(range(len(self._hashes)), key=self._hashes.__getitem__)
        shared = sum(self._common(order)) * UNIT
        shared += sum(self._seen.num_known(np.frombuffer(each, np.uint64)) for each in self._hashes) * UNIT
        return shared >= EARLY_SHARE * self.num_prompt_tokens

    def plan(self) -> WindowOrder:
        """The order of the rows taken so far: rejects first (they cost nothing), then prompts."""
        # Memory order is as good as any for finding neighbours; equal prompts keep their input order.
        order = sorted(range(len(self._hashes)), key=self._hashes.__getitem__)
        running, depths = _walk(self._tree(order))
        lens = np.array(self._lens, dtype=np.int64)[running]
        prefix_lens = np.minimum(np.array(depths, dtype=np.int64) * UNIT, lens)
        prefix_lens = np.minimum(prefix_lens, np.concatenate([lens[:1], lens[:-1]]))
        known = [self._seen.num_known(np.frombuffer(self._hashes[row], np.uint64)) for row in running]
        # The last token of a prompt is always computed, for what follows from it.
        longest = np.maximum(prefix_lens, np.array(known, dtype=np.int64) * UNIT)
        achievable = np.minimum(longest, lens - 1)
        if self._hashes:
            self._seen.add(np.unique(np.frombuffer(b"".join(self._hashes), np.uint64)))
        none = np.zeros(len(self._rejects), dtype=np.int64)
        offsets = [*self._rejects, *(self._prompts[row] for row in running)]
        planned = PlannedOrder(
            offsets=np.array(offsets, dtype=np.int64),
            prefix_lens=np.concatenate([none, prefix_lens]),
            achievable=np.concatenate([none, achievable]),
        )
        stop = self._start + self.num_rows
        return WindowOrder(shard=self._shard, start=self._start, stop=stop, planned=planned)

    def _common(self, order: list[int]) -> list[int]:
        """How many hashes each row of a sorted order shares with the one before it (0 for the first)."""
        common = [0] * min(1, len(order))
        for before, after in pairwise(order):
            common.append(_num_common(self._hashes[before], self._hashes[after]))
        return common

    def _tree(self, order: list[int]) -> _Node:
        common = [*self._common(order), 0]
        stack = [_Node(0)]
        for index, row in enumerate(order):
            self._close_down_to(stack, common[index])
            if common[index + 1] > stack[-1].depth:
                stack.append(_Node(common[index + 1]))
            key = (-self._work[row], self._sampling[row], self._prompts[row])
            stack[-1].items.append((key, row))
        self._close_down_to(stack, 0)
        return stack[0].close() if stack[0].items else stack[0]

    @staticmethod
    def _close_down_to(stack: list[_Node], depth: int) -> None:
        """Hang nodes deeper than `depth` under what they continue, a new node of that depth if need be."""
        while stack[-1].depth > depth:
            node = stack.pop().close()
            if stack[-1].depth < depth:
                stack.append(_Node(depth))
            stack[-1].items.append((node.key, node))


def _num_common(a: bytes, b: bytes) -> int:
    """How many leading hashes two prompts have in common."""
    num_bytes = min(len(a), len(b))
    if a[:num_bytes] == b[:num_bytes]:
        return num_bytes // 8
    differ = np.frombuffer(a, np.uint64, num_bytes // 8) != np.frombuffer(b, np.uint64, num_bytes // 8)
    return int(np.argmax(differ))


def _walk(root: _Node) -> tuple[list[int], list[int]]:
    """Rows in depth-first order, and how deep each one's common ancestor with the row before it is."""
    rows: list[int] = []
    depths: list[int] = []
    common = 0
    stack: list[tuple[_Node, int]] = [(root, 0)]
    while stack:
        node, number = stack.pop()
        if number == len(node.items):
            continue
        if number > 0:
            common = node.depth
        stack.append((node, number + 1))
        item = node.items[number][1]
        if isinstance(item, _Node):
            stack.append((item, 0))
        else:
            rows.append(item)
            depths.append(common if rows[1:] else 0)
    return rows, depths
