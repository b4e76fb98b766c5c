"""Rows that share pages become neighbours, and groups are ranges that really share what they say."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import prefix_groups
from engine.group_costs import GroupCosts
from engine.plan import PlannedRow
from engine.prefix_groups import (
    MAX_BRANCHES,
    MAX_DEPTH,
    Branch,
    PrefixGroup,
    find_groups,
)
from engine.prefix_groups import arrange_rows as arrange_pages
from engine.request import Request
from engine.sampling_params import SamplingParams

PAGE_SIZE = 4
# Any sharing of two rows pays.
FREE = GroupCosts(token=1.0, query=0.0, group=0.0)


def make_row(pages: list[int], num_shared: int, num_tokens: int = 1) -> PlannedRow:
    """A row whose first query comes right after `num_shared` pages; it has a page of its own for it."""
    request = Request(
        request_id="r", prompt_token_ids=(1,), sampling=SamplingParams(), key=(0, 0), max_total_len=9
    )
    return PlannedRow(request, num_shared * PAGE_SIZE, num_tokens, True, 1, pages)


def make_rows(paths: list[tuple[int, ...]], num_tokens: list[int] | None = None) -> list[PlannedRow]:
    """Rows with the pages of their paths in a tree, each with a page of its own after them."""
    numbers: dict[tuple[int, ...], int] = {}
    rows = []
    for index, path in enumerate(paths):
        pages = [numbers.setdefault(path[: depth + 1], 7 * len(numbers) % 1009) for depth in range(len(path))]
        rows.append(make_row([*pages, 2000 + index], len(path), num_tokens[index] if num_tokens else 1))
    return rows


def arrange_rows(rows: list[PlannedRow], page_size: int) -> tuple[list[int], list[Branch]]:
    page_tables = np.zeros((len(rows), max((len(row.page_ids) for row in rows), default=0)), np.int32)
    for table, row in zip(page_tables, rows, strict=True):
        table[: len(row.page_ids)] = row.page_ids
    order, branches = arrange_pages(page_tables, np.array([row.start for row in rows], np.int32), page_size)
    return order.tolist(), branches


def grouped(
    rows: list[PlannedRow], costs: GroupCosts | None
) -> tuple[list[PlannedRow], list[Branch], list[PrefixGroup]]:
    order, branches = arrange_rows(rows, PAGE_SIZE)
    assert sorted(order) == list(range(len(rows)))
    slots = [rows[index] for index in order]
    query_ends = np.cumsum([row.num_tokens for row in slots], dtype=np.int32)
    return slots, branches, find_groups(branches, query_ends, PAGE_SIZE, costs)


def total_saving(groups: list[PrefixGroup], slots: list[PlannedRow], costs: GroupCosts) -> float:
    return sum(
        costs.saving(
            stop - start, sum(row.num_tokens for row in slots[start:stop]), (last - first) * PAGE_SIZE
        )
        for start, stop, first, last in groups
    )


paths = st.lists(st.lists(st.integers(0, 2), max_size=5).map(tuple), max_size=12)
all_costs = st.builds(
    GroupCosts,
    token=st.sampled_from([0.0, 0.1, 1.0]),
    query=st.sampled_from([0.0, 0.5, 3.0]),
    group=st.sampled_from([0.0, 2.0, 9.0]),
)


@pytest.mark.parametrize("num_rows", [2, 3, 40])
@pytest.mark.parametrize("num_pages", [1, 2, 3, 4, 5, 8, 33])
def test_a_branch_is_as_long_as_what_its_rows_share(num_rows: int, num_pages: int):
    for num_shared in range(num_pages + 1):
        # After what they share each row goes on alone, every second one for a page more.
        paths = [
            (*(0,) * num_shared, *(1 + row,) * (num_pages - num_shared + row % 2)) for row in range(num_rows)
        ]
        order, branches = arrange_rows(make_rows(paths), PAGE_SIZE)
        expected = [Branch(0, num_rows, num_shared, None)] if num_shared else []
        assert (order, branches) == (list(range(num_rows)), expected)


@given(paths, st.data())
def test_groups_share_what_they_say_and_nothing_is_read_twice(
    paths: list[tuple[int, ...]], data: st.DataObject
):
    rows = make_rows(paths, data.draw(st.lists(st.integers(1, 9), min_size=len(paths), max_size=len(paths))))
    costs = data.draw(all_costs)
    slots, branches, groups = grouped(rows, costs)
    for start, stop, first, last in groups:
        assert stop - start >= 2
        assert first < last
        assert len({tuple(row.page_ids[:last]) for row in slots[start:stop]}) == 1
        assert last * PAGE_SIZE <= min(row.start for row in slots[start:stop])
    for slot in range(len(slots)):
        # From the outside in, the pages that a row is read together with others are one range from the first.
        read = [(first, last) for start, stop, first, last in groups if start <= slot < stop]
        assert [first for first, _ in read] == [0, *(last for _, last in read)][: len(read)]
    for one, other in itertools.combinations(groups, 2):
        apart = one[1] <= other[0]
        assert apart or (one[0] <= other[0] and other[1] <= one[1])  # and the outer one comes first
    for branch in branches:
        if branch.outer is not None:
            outer = branches[branch.outer]
            assert outer.page_stop < branch.page_stop
            assert branch.slot_stop - branch.slot_start < outer.slot_stop - outer.slot_start


@given(paths)
def test_rows_that_share_any_page_are_neighbours_and_all_they_share_is_found(paths: list[tuple[int, ...]]):
    slots, branches, _ = grouped(make_rows(paths), None)
    for page in {page for row in slots for page in row.page_ids}:
        holders = [slot for slot, row in enumerate(slots) if page in row.page_ids]
        assert holders == list(range(holders[0], holders[-1] + 1))
        if len(holders) > 1:
            column = list(slots[holders[0]].page_ids).index(page)
            assert any(
                (branch.slot_start, branch.slot_stop) == (holders[0], holders[-1] + 1)
                and branch.page_stop > column
                for branch in branches
            )


@given(st.lists(st.lists(st.integers(0, 2), max_size=5).map(tuple), min_size=2, max_size=60))
def test_few_rows_one_by_one_and_many_at_once_are_arranged_alike(paths: list[tuple[int, ...]]):
    rows = make_rows(paths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_groups, "_MANY", 100)
        one_by_one = arrange_rows(rows, PAGE_SIZE)
        patch.setattr(prefix_groups, "_MANY", 2)
        assert arrange_rows(rows, PAGE_SIZE) == one_by_one


@given(paths, all_costs, st.data())
def test_no_other_choice_of_branches_saves_more(
    paths: list[tuple[int, ...]], costs: GroupCosts, data: st.DataObject
):
    rows = make_rows(paths, data.draw(st.lists(st.integers(1, 4), min_size=len(paths), max_size=len(paths))))
    slots, branches, groups = grouped(rows, costs)
    saved = total_saving(groups, slots, costs)
    assert saved >= 0
    # All of them, when there are few; else any one alone, the common prefix of all rows among them.
    sizes = range(len(branches) + 1) if len(branches) <= 7 else [1]
    for size in sizes:
        for chosen in itertools.combinations(range(len(branches)), size):
            others = []
            for index in chosen:
                outer = branches[index].outer
                while outer is not None and outer not in chosen:
                    outer = branches[outer].outer
                begin = 0 if outer is None else branches[outer].page_stop
                branch = branches[index]
                others.append(PrefixGroup(branch.slot_start, branch.slot_stop, begin, branch.page_stop))
            assert saved >= total_saving(others, slots, costs) - 1e-9


def test_rows_with_nothing_in_common_keep_their_order():
    rows = make_rows([(1,), (2, 2), (), (3,), ()])
    assert arrange_rows(rows, PAGE_SIZE) == ([0, 1, 2, 3, 4], [])
    assert arrange_rows([], PAGE_SIZE) == ([], [])


def test_those_that_share_come_where_the_first_of_them_was():
    rows = make_rows([(5,), (1, 1), (6,), (1, 2), (1, 1), (7,)])
    order, branches = arrange_rows(rows, PAGE_SIZE)
    assert order == [0, 1, 4, 3, 2, 5]
    assert branches == [Branch(1, 4, 1, None), Branch(1, 3, 2, 0)]


def test_pages_at_or_after_a_first_query_are_never_shared():
    """Both hold page 8, but the first row has yet to compute it, or part of it."""
    rows = [make_row([7, 8, 9], 1), make_row([7, 8, 10], 2)]
    assert arrange_rows(rows, PAGE_SIZE)[1] == [Branch(0, 2, 1, None)]
    rows = [rows[0]._replace(start=3), rows[1]]
    assert arrange_rows(rows, PAGE_SIZE) == ([0, 1], [])


def test_a_decode_and_a_chunk_are_grouped_alike():
    rows = [make_row([7, 8, 9], 2, num_tokens=1), make_row([7, 8, 10, 11], 2, num_tokens=7)]
    assert grouped(rows, FREE)[2] == [(0, 2, 0, 2)]
    # Eight queries are put aside and taken up again, for 8 tokens that are read once less.
    assert grouped(rows, GroupCosts(token=1.0, query=1.1, group=0.0))[2] == []


def test_a_branch_that_is_not_worth_a_pass_leaves_its_pages_to_those_inside():
    rows = make_rows([(0, 1, 1), (0, 1, 1), (0, 2, 2), (0, 2, 2)])
    costs = GroupCosts(token=1.0, query=0.0, group=5.0)
    # The page that all four share would save 12 in a pass of its own, and the two pairs 4 less each.
    assert grouped(rows, costs)[2] == [(0, 2, 0, 3), (2, 4, 0, 3)]
    assert grouped(rows, GroupCosts(token=1.0, query=0.0, group=3.0))[2] == [
        (0, 4, 0, 1), (0, 2, 1, 3), (2, 4, 1, 3)
    ]  # fmt: skip


def test_a_device_without_grouped_attention_has_no_groups():
    rows = make_rows([(1, 2, 3)] * 9)
    assert grouped(rows, None)[2] == []
    assert grouped(rows, FREE)[2] == [(0, 9, 0, 3)]


def test_the_work_is_bounded_for_any_tree():
    num_rows = 256
    comb = [(*([0] * index), 1 + index) for index in range(num_rows)]
    binary = [tuple(index >> (8 - depth) for depth in range(9)) for index in range(num_rows)]
    for paths in (comb, binary):
        rows = make_rows(paths)
        started = time.perf_counter()
        slots, branches, groups = grouped(rows, FREE)
        assert time.perf_counter() - started < 0.5  # 5 ms when nothing else runs
        depths = []
        for branch in branches:
            depths.append(1 if branch.outer is None else 1 + depths[branch.outer])
        assert max(depths) <= MAX_DEPTH
        assert 1 <= len(groups) <= MAX_BRANCHES
        assert total_saving(groups, slots, FREE) >= (num_rows - 2) * PAGE_SIZE
