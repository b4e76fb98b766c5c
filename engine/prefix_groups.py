"""Which rows of a step share leading pages, and for which of them attention reads those pages once.

The rows' pages make a tree: rows that begin with the same pages lie below the same branch. In the order of
that tree the rows below a branch are neighbours, and the branch is a range of slots and a range of columns of
their page tables. Attention of a whole range to its shared pages is a product of all its queries with each
page, where each row alone would read the page again (Hydragen, Juravsky et al. 2024; cascade attention, Ye
et al. 2024). Whether that pays is told by a model of costs.

A shared page comes from the prefix cache, where it stands in one place of one chain. So two rows with the
same page in a column have the same pages before it, and a look at one column tells what a walk to it would.

Plain Python and numpy, no JAX: this runs on the host while the device computes the step before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from engine.errors import ConfigError

# These bound the work of a step whatever the tree: templates rarely nest deeper, and what branches beyond
# these share is read by each row.
MAX_DEPTH = 8
MAX_BRANCHES = 128


@dataclass(frozen=True, slots=True)
class GroupCosts:
    """What attention costs on one kind of device, in microseconds of one layer. The defaults are estimates.

    A group pays when what its rows no longer read is more than what the extra pass costs.
    """

    token: float = 0.02
    """For a row to read the keys and values of one more token of a prefix by itself."""
    query: float = 0.3
    """To put a query's running softmax aside after the shared pages and take it up again."""
    group: float = 2.0
    """To set up one more pass."""

    def __post_init__(self) -> None:
        for name in ("token", "query", "group"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"GroupCosts.{name} is {getattr(self, name)}: give microseconds, 0 or more")

    def saving(self, num_rows: int, num_queries: int, num_tokens: int) -> float:
        """What reading `num_tokens` once for `num_rows` rows saves; negative when it costs more."""
        return (num_rows - 1) * num_tokens * self.token - num_queries * self.query - self.group


GROUP_COSTS = {
    "cpu": GroupCosts(),
    # From the schedule of an 8B model's shape on v5e: a token costs a decode 5 ns of memory bandwidth.
    "pallas_tpu": GroupCosts(token=0.005, query=0.1, group=3.0),
}
"""By attention backend; those that read every row by itself are not there."""


class GroupArrays(NamedTuple):
    """Prefix groups of one step, each i32[max_groups]; unused entries have slot_start == slot_stop == 0.

    The rows in slots [slot_start, slot_stop) have the same pages in columns [page_start, page_stop) of their
    page tables: full pages, all before each row's first query. A group inside another has its slots among
    the outer one's, and its pages begin where the outer one's stop; outer groups come first.
    """

    slot_start: np.ndarray
    slot_stop: np.ndarray
    page_start: np.ndarray
    page_stop: np.ndarray


class Branch(NamedTuple):
    """Rows in slots [slot_start, slot_stop) that share the columns [0, page_stop)."""

    slot_start: int
    slot_stop: int
    page_stop: int
    outer: int | None
    """Index of the branch around it; None at the top."""


def arrange_rows(
    page_tables: np.ndarray, starts: np.ndarray, page_size: int
) -> tuple[list[int], list[Branch]]:
    """Put rows that share leading pages next to each other.

    Only full pages before a row's first query count. What rows share more than MAX_DEPTH branches deep is not
    looked for.

    Args:
        page_tables: each row's pages, i32[num_rows, table_width].
        starts: each row's first query, i32[num_rows].

    Returns:
        order: a permutation of the rows' indices, the row of each slot. Those that share pages come where the
            first of them was; rows that share nothing keep the order they came in.
        branches: the tree over the slots, outer branches before those inside.
    """
    num_full = starts // page_size
    order: list[int] = []
    branches: list[Branch] = []

    def place(rows: _Rows, column: int, outer: int | None, depth: int) -> None:
        """Give slots to rows that share all columns before `column`."""
        heads = rows.column(column)
        num_heads = len(set(heads))
        if depth == MAX_DEPTH or num_heads == len(heads):
            order.extend(rows.members)
            return
        below: dict[int, list[int]] = {}
        if num_heads > 1:
            for head, member in zip(heads, rows.members, strict=True):
                below.setdefault(head, []).append(member)
        for members in below.values() if below else (rows.members,):
            if len(members) == 1:
                order.append(members[0])
                continue
            together = _Rows(page_tables, num_full, members) if below else rows
            most = together.least_full()
            if most <= column:
                order.extend(members)
                continue
            stop = together.num_shared(column + 1, most)
            start = len(order)
            branches.append(Branch(start, start + len(members), stop, outer))
            place(together, stop, len(branches) - 1, depth + 1)

    if len(starts):
        place(_Rows(page_tables, num_full, [*range(len(starts))]), 0, None, 0)
    return order, branches


class _Rows:
    """Some rows of the page tables. Many are looked at with numpy, few one by one: of four rows numpy would
    spend most of its time on being called."""

    MANY = 24

    def __init__(self, page_tables: np.ndarray, num_full: np.ndarray, members: list[int]):
        self._page_tables, self._num_full = page_tables, num_full
        self.members = members
        self._index = np.array(members) if len(members) >= self.MANY else None

    def column(self, column: int) -> list[int]:
        """Each row's page in this column."""
        if self._index is None:
            item = self._page_tables.item
            return [item(member, column) for member in self.members]
        return self._page_tables[self._index, column].tolist()

    def least_full(self) -> int:
        """Pages that are full and before the first query in every row."""
        if self._index is None:
            return min([self._num_full.item(member) for member in self.members])
        return self._num_full[self._index].min().item()

    def num_shared(self, known: int, most: int) -> int:
        """How many leading pages all share: at least `known`, at most `most`."""
        low, high, middle = known, most, most  # mostly all that may be
        while low < high:
            if self._are_alike(middle - 1):
                low = middle
            else:
                high = middle - 1
            middle = (low + high + 1) // 2
        return low

    def _are_alike(self, column: int) -> bool:
        if self._index is None:
            return len(set(self.column(column))) == 1
        pages = self._page_tables[self._index, column]
        return bool((pages == pages[0]).all())


def find_groups(
    branches: Sequence[Branch],
    query_ends: np.ndarray,
    page_size: int,
    costs: GroupCosts | None,
    max_groups: int,
) -> GroupArrays:
    """The branches over which attention should read shared pages once, so that together they save most.

    Args:
        branches: as `arrange_rows` gives them.
        query_ends: for each slot, how many queries it and those before it have, i32[num_slots].
        costs: the device's; None where attention is never grouped: then there are no groups.
        max_groups: the arrays' size, at least the number of slots.
    """
    groups = GroupArrays(*np.zeros((4, max_groups), np.int32))
    if costs is not None and branches:
        num_before = [0, *query_ends.tolist()]
        worthy = _worthy(branches, num_before, page_size, costs)
        chosen = _choose(worthy, num_before, page_size, costs)
        for array, values in zip(groups, zip(*chosen, strict=True), strict=False):
            array[: len(values)] = values
    return groups


def _worthy(
    branches: Sequence[Branch], num_before: Sequence[int], page_size: int, costs: GroupCosts
) -> list[Branch]:
    """The branches that may be worth a pass: those that save something if none around them is taken."""
    savings = [
        costs.saving(stop - start, num_before[stop] - num_before[start], page_stop * page_size)
        for start, stop, page_stop, _ in branches
    ]
    least = 0.0 if len(branches) <= MAX_BRANCHES else max(0.0, sorted(savings)[-MAX_BRANCHES - 1])
    worthy: list[Branch] = []
    index_of: list[int | None] = []
    for branch, saving in zip(branches, savings, strict=True):
        outer = None if branch.outer is None else index_of[branch.outer]
        if saving > least:
            worthy.append(branch._replace(outer=outer))
            outer = len(worthy) - 1
        index_of.append(outer)
    return worthy


def _choose(
    branches: Sequence[Branch], num_before: Sequence[int], page_size: int, costs: GroupCosts
) -> list[tuple[int, int, int, int]]:
    """The best set of branches to read once, as (slot_start, slot_stop, page_start, page_stop).

    A branch that is not taken leaves its pages to those inside it. So what a branch can save depends on the
    column up to which the taken branches around it read, and for each such column the best is found, from
    the innermost branches outwards.
    """
    starts: list[tuple[int, ...]] = []
    for branch in branches:
        outer = branch.outer
        starts.append((0,) if outer is None else (*starts[outer], branches[outer].page_stop))
    # By branch and then by that column: what those inside it save, and whether it is taken itself.
    inside: list[dict[int, float]] = [
        dict.fromkeys((*columns, branch.page_stop), 0.0)
        for branch, columns in zip(branches, starts, strict=True)
    ]
    taken: list[set[int]] = [set() for _ in branches]
    for index in range(len(branches) - 1, -1, -1):
        slot_start, slot_stop, page_stop, outer = branches[index]
        num_queries = num_before[slot_stop] - num_before[slot_start]
        for start in starts[index]:
            best = inside[index][start]
            num_tokens = (page_stop - start) * page_size
            once = costs.saving(slot_stop - slot_start, num_queries, num_tokens) + inside[index][page_stop]
            if once > best:
                best = once
                taken[index].add(start)
            if outer is not None:
                inside[outer][start] += best
    chosen: list[tuple[int, int, int, int]] = []
    read: list[int] = []  # the column up to which taken branches read each branch's rows
    for index, (slot_start, slot_stop, page_stop, outer) in enumerate(branches):
        start = 0 if outer is None else read[outer]
        if start in taken[index]:
            chosen.append((slot_start, slot_stop, start, page_stop))
            start = page_stop
        read.append(start)
    return chosen
