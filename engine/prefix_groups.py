"""Which rows of a step share leading pages, and for which of them attention reads those pages once.

The rows' pages make a tree: rows that begin with the same pages lie below the same branch. In the order of
that tree the rows below a branch are neighbours, and the branch is a range of slots and a range of columns of
their page tables. Attention of a whole range to its shared pages is a product of all its queries with each
page, where each row alone would read the page again (Hydragen, Juravsky et al. 2024; cascade attention, Ye
et al. 2024). Whether that pays is told by a model of costs (`engine/group_costs.py`).

A shared page comes from the prefix cache, where it stands in one place of one chain. So two rows with the
same page in a column have the same pages before it, and a look at one column tells what a walk to it would.

Plain Python and numpy, no JAX: this runs on the host while the device computes the step before.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np

from engine.group_costs import GroupCosts

# These bound the work of a step whatever the tree: templates rarely nest deeper, and what branches beyond
# these share is read by each row.
MAX_DEPTH = 8
MAX_BRANCHES = 128


class PrefixGroup(NamedTuple):
    """The rows in slots [slot_start, slot_stop) have the same pages in columns [page_start, page_stop) of
    their page tables: full pages, all before each row's first query.

    A group inside another has its slots among the outer one's; its pages begin where the outer one's stop.
    """

    slot_start: int
    slot_stop: int
    page_start: int
    page_stop: int


class Branch(NamedTuple):
    """Rows in slots [slot_start, slot_stop) that share the columns [0, page_stop)."""

    slot_start: int
    slot_stop: int
    page_stop: int
    outer: int | None
    """Index of the branch around it; None at the top."""


def arrange_rows(
    page_tables: np.ndarray, starts: np.ndarray, page_size: int
) -> tuple[np.ndarray, list[Branch]]:
    """Put rows that share leading pages next to each other.

    Only full pages before a row's first query count. What rows share more than MAX_DEPTH branches deep is not
    looked for.

    Args:
        page_tables: each row's pages, i32[num_rows, table_width].
        starts: each row's first query, i32[num_rows].

    Returns:
        order: a permutation of the rows' indices, the row of each slot, i64[num_rows]. Those that share pages
            come where the first of them was; rows that share nothing keep the order they came in.
        branches: the tree over the slots, outer branches before those inside.
    """
    order = np.arange(len(starts))
    branches: list[Branch] = []
    if len(starts):
        _Arranging(page_tables, starts // page_size, order, branches).place(0, len(starts), 0, None, 0)
    return order, branches


class _Arranging(NamedTuple):
    """What `arrange_rows` works on. Not a function within it that calls itself: such a function refers to
    itself, and would keep each step's arrays until the collector of garbage comes by."""

    page_tables: np.ndarray
    num_full: np.ndarray
    """Pages that are full and before the first query, of each row."""
    order: np.ndarray
    branches: list[Branch]

    def place(self, first: int, last: int, column: int, outer: int | None, depth: int) -> None:
        """Order the slots [first, last), whose rows share all columns before `column`."""
        page_tables, order = self.page_tables, self.order
        for start, stop in _bring_together(page_tables, order, first, last, column):
            most = _least_full(self.num_full, order[start:stop])
            if most > column:
                shared = _num_shared(page_tables, order[start:stop], column + 1, most)
                self.branches.append(Branch(start, stop, shared, outer))
                if depth + 1 < MAX_DEPTH:
                    self.place(start, stop, shared, len(self.branches) - 1, depth + 1)


# From so many rows on numpy looks at all at once. Of four it would spend most of its time on being called.
_MANY = 24


def _bring_together(
    page_tables: np.ndarray, order: np.ndarray, first: int, last: int, column: int
) -> list[tuple[int, int]]:
    """Reorder `order[first:last]` so that rows with the same page in this column are neighbours, where the
    first of them was; the ranges of slots of two rows or more that have."""
    rows = order[first:last]
    if len(rows) < _MANY:
        below: dict[int, list[int]] = {}
        for row in rows.tolist():
            below.setdefault(page_tables.item(row, column), []).append(row)
        if len(below) == len(rows):
            return []
        rows[:] = [row for together in below.values() for row in together]
        stops = accumulate(map(len, below.values()), initial=first)
        return [(start, stop) for start, stop in pairwise(stops) if stop - start > 1]
    heads = page_tables[:, column].take(rows)
    if np.count_nonzero(heads == heads[0]) == len(heads):
        return [(first, last)]
    by_head = heads.argsort(kind="stable")
    sorted_heads = heads[by_head]
    is_again = (sorted_heads[1:] == sorted_heads[:-1]).nonzero()[0]
    if not len(is_again):
        return []
    # Each row's place is that of the first one with its page.
    places = np.arange(len(rows))
    for at in is_again.tolist():  # in order, so the one before has its place
        places[by_head[at + 1]] = places[by_head[at]]
    by_place = places.argsort(kind="stable")
    rows[:] = rows[by_place]
    starts = np.unique(places[by_head[is_again]])
    sorted_places = places[by_place]
    begins = (first + sorted_places.searchsorted(starts)).tolist()
    ends = (first + sorted_places.searchsorted(starts, "right")).tolist()
    return list(zip(begins, ends, strict=True))


def _least_full(num_full: np.ndarray, rows: np.ndarray) -> int:
    """Pages that are full and before the first query in every row."""
    if len(rows) < _MANY:
        return min([num_full.item(row) for row in rows.tolist()])
    return num_full[rows].min().item()


def _num_shared(page_tables: np.ndarray, rows: np.ndarray, known: int, most: int) -> int:
    """How many leading pages all rows share: at least `known`, at most `most`. Those that have the same page
    in a column have the same in all before it."""
    while known < most:
        middle = (known + most + 1) // 2
        pages = page_tables[:, middle - 1].take(rows)
        if np.count_nonzero(pages == pages[0]) == len(pages):
            known = middle
        else:
            most = middle - 1
    return known


def find_groups(
    branches: Sequence[Branch], query_ends: np.ndarray, page_size: int, costs: GroupCosts | None
) -> list[PrefixGroup]:
    """The branches over which attention should read shared pages once, so that together they save most; outer
    groups before those inside, at most MAX_BRANCHES.

    Args:
        branches: as `arrange_rows` gives them.
        query_ends: for each slot, how many queries it and those before it have, i32[num_slots].
        costs: the device's; None where attention is never grouped: then there are no groups.
    """
    if costs is None or not branches:
        return []
    tries = []
    for branch in branches:
        before = query_ends.item(branch.slot_start - 1) if branch.slot_start else 0
        tries.append(_Try(branch, query_ends.item(branch.slot_stop - 1) - before))
    return _choose(_worthy(tries, page_size, costs), page_size, costs)


class _Try(NamedTuple):
    """A branch that may become a group."""

    branch: Branch
    num_queries: int

    def saving(self, page_start: int, page_size: int, costs: GroupCosts) -> float:
        """What reading its pages from this column on once saves."""
        slot_start, slot_stop, page_stop, _ = self.branch
        return costs.saving(slot_stop - slot_start, self.num_queries, (page_stop - page_start) * page_size)


def _worthy(tries: Sequence[_Try], page_size: int, costs: GroupCosts) -> list[_Try]:
    """Those that may be worth a pass: that save something if none around them is taken."""
    savings = [each.saving(0, page_size, costs) for each in tries]
    least = 0.0 if len(tries) <= MAX_BRANCHES else max(0.0, sorted(savings)[-MAX_BRANCHES - 1])
    worthy: list[_Try] = []
    index_of: list[int | None] = []
    for (branch, num_queries), saving in zip(tries, savings, strict=True):
        outer = None if branch.outer is None else index_of[branch.outer]
        if saving > least:
            worthy.append(_Try(branch._replace(outer=outer), num_queries))
            outer = len(worthy) - 1
        index_of.append(outer)
    return worthy


def _choose(tries: Sequence[_Try], page_size: int, costs: GroupCosts) -> list[PrefixGroup]:
    """The best set of branches to read once.

    A branch that is not taken leaves its pages to those inside it. So what a branch can save depends on the
    column up to which the taken branches around it read, and for each such column the best is found, from
    the innermost branches outwards.
    """
    starts: list[tuple[int, ...]] = []
    for branch, _ in tries:
        outer = branch.outer
        starts.append((0,) if outer is None else (*starts[outer], tries[outer].branch.page_stop))
    # By branch and then by that column: what those inside it save, and whether it is taken itself.
    inside: list[dict[int, float]] = [
        dict.fromkeys((*columns, branch.page_stop), 0.0)
        for (branch, _), columns in zip(tries, starts, strict=True)
    ]
    taken: list[set[int]] = [set() for _ in tries]
    for index in range(len(tries) - 1, -1, -1):
        branch = tries[index].branch
        for start in starts[index]:
            best = inside[index][start]
            once = tries[index].saving(start, page_size, costs) + inside[index][branch.page_stop]
            if once > best:
                best = once
                taken[index].add(start)
            if branch.outer is not None:
                inside[branch.outer][start] += best
    chosen: list[PrefixGroup] = []
    read: list[int] = []  # the column up to which taken branches read each branch's rows
    for index, (branch, _) in enumerate(tries):
        start = 0 if branch.outer is None else read[branch.outer]
        if start in taken[index]:
            chosen.append(PrefixGroup(branch.slot_start, branch.slot_stop, start, branch.page_stop))
            start = branch.page_stop
        read.append(start)
    return chosen
