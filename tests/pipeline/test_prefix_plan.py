"""The planned order is the prefix tree, depth first: nothing shared is left out, longer work goes first."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import OutputError
from engine.sampling_params import SamplingParams
from pipeline.prefix_hashes import UNIT, PrefixHasher, SeenPrefixes
from pipeline.prefix_plan import WindowPlanner
from pipeline.row_order import PlannedOrder, PrefixGroup, WindowOrder
from pipeline.rows import Prompt, Reject

DEFAULT = SamplingParams(max_tokens=4)


def prompt(position: int, tokens: list[int], sampling: SamplingParams = DEFAULT) -> Prompt:
    return Prompt(str(position), 0, position, tuple(tokens), "", sampling, {}, False)


def plan(prompts: list[list[int]], seen: SeenPrefixes | None = None, start: int = 0) -> WindowOrder:
    planner = WindowPlanner(0, start, seen or SeenPrefixes(2**12))
    for offset, tokens in enumerate(prompts):
        planner.add(prompt(start + offset, tokens))
    return planner.plan()


def num_common(a: list[int], b: list[int]) -> int:
    """Tokens in common, to a whole unit, or all of them where prompts are equal."""
    if a == b:
        return len(a)
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return same // UNIT * UNIT


# Prompts of few different units, so that many begin alike and some are equal.
units = st.sampled_from([[i] * UNIT for i in range(2)])
prompts_of_units = st.lists(
    st.tuples(st.lists(units, max_size=5), st.lists(st.integers(0, 1), min_size=1, max_size=UNIT - 1)).map(
        lambda parts: [token for unit in parts[0] for token in unit] + parts[1]
    ),
    min_size=1,
    max_size=14,
)


@given(prompts_of_units)
def test_a_row_follows_the_one_that_it_has_most_in_common_with(prompts: list[list[int]]):
    window = plan(prompts)
    assert window.planned is not None
    order = [prompts[position] for position in window.positions(0, len(prompts))]
    for place, tokens in enumerate(order):
        before = [num_common(tokens, other) for other in order[:place]]
        assert window.planned.prefix_lens[place] == (before[-1] if before else 0)
        assert max(before, default=0) == (before[-1] if before else 0)
        # The last token of a prompt is always computed.
        assert window.achievable(place) == min(max(before, default=0), len(tokens) - 1)


@given(prompts_of_units)
def test_what_can_be_achieved_does_not_depend_on_the_order(prompts: list[list[int]]):
    window, backwards = plan(prompts), plan(prompts[::-1])
    total = sum(window.achievable(place) for place in range(len(prompts)))
    assert total == sum(backwards.achievable(place) for place in range(len(prompts)))


@given(prompts_of_units)
def test_groups_are_the_longest_runs_that_share_a_beginning(prompts: list[list[int]]):
    window = plan(prompts)
    order = [prompts[position] for position in window.positions(0, len(prompts))]
    for place, tokens in enumerate(order):
        group, shorter_than = window.group(place), 10**9
        neighbours = [num_common(tokens, order[i]) for i in (place - 1, place + 1) if 0 <= i < len(order)]
        longest = max(neighbours, default=0)
        assert (group.prefix_len if group else 0) == (longest if longest >= 16 else 0)
        while group is not None:
            assert group.start <= place < group.stop
            assert group.prefix_len < shorter_than
            members = [i for i, other in enumerate(order) if num_common(tokens, other) >= group.prefix_len]
            assert members == list(range(group.start, group.stop))
            shorter_than, group = group.prefix_len, group.parent


def test_longer_work_is_first_where_the_tree_branches():
    a, b = [1] * 16, [2] * 16
    prompts = [[*a, 5], [*b, 5, 5], [*a, 6, 6, 6], [7], [*b, 6], [*a, 7, 7]]
    assert plan(prompts).positions(0, 6) == [2, 5, 0, 1, 4, 3]


def test_the_work_is_the_prompt_and_what_may_be_generated():
    planner = WindowPlanner(0, 0, SeenPrefixes(2**12))
    for position, max_tokens in enumerate([5, 50, 7]):
        planner.add(prompt(position, [position] * (10 - position), SamplingParams(max_tokens=max_tokens)))
    assert planner.plan().positions(0, 3) == [1, 0, 2]


def test_exact_duplicates_are_neighbours_and_rejects_come_first():
    planner = WindowPlanner(3, 100, SeenPrefixes(2**12))
    rows = [[1] * 20, [2] * 20, [1] * 20, None, [2] * 20, [1] * 20, [3] * 20, [2] * 20]
    other = SamplingParams(max_tokens=4, seed=1)
    for offset, tokens in enumerate(rows):
        if tokens is None:
            planner.add(Reject(3, 100 + offset, None, "not_json", "", "", ""))
        else:
            planner.add(prompt(100 + offset, tokens, other if offset in (2, 7) else DEFAULT))
    window = planner.plan()
    assert (window.shard, window.start, window.stop) == (3, 100, 108)
    # Of equal prompts those with equal sampling are neighbours.
    assert window.positions(100, 108) == [103, 100, 105, 102, 101, 104, 107, 106]
    assert window.planned is not None
    assert window.planned.prefix_lens.tolist() == [0, 0, 20, 20, 0, 20, 20, 0]


def test_a_prefix_of_an_earlier_window_counts_as_shared():
    seen = SeenPrefixes(2**12)
    template = list(range(24))
    first = plan([[*template, 1], [9] * 30], seen)
    second = plan([[*template, 2], [*template, 3], [8] * 30], seen, start=2)
    assert [first.achievable(place) for place in range(2)] == [0, 0]
    by_position = dict(zip(second.positions(2, 5), range(2, 5), strict=True))
    assert [second.achievable(by_position[position]) for position in (2, 3, 4)] == [24, 24, 0]
    assert second.planned is not None
    assert second.planned.prefix_lens.tolist() == [0, 0, 24]


def test_whether_planning_pays_is_seen_early():
    planner = WindowPlanner(0, 0, SeenPrefixes(2**14))
    for position in range(100):
        planner.add(prompt(position, [position] * 100))
    assert not planner.is_worth_planning()
    planner.add(prompt(100, [0] * 200))
    planner.add(prompt(101, [1] * 200))
    assert planner.is_worth_planning()
    seen = SeenPrefixes(2**14)
    plan([[5] * 100], seen)
    later = WindowPlanner(0, 1, seen)
    later.add(prompt(1, [5] * 99))
    assert later.is_worth_planning()


def test_a_deep_tree_is_walked_without_recursion():
    window = plan([[1] * (8 * length) for length in range(1, 2000)], SeenPrefixes(2**16))
    assert window.positions(0, 1999) == list(range(1998, -1, -1))
    assert sum(1 for group in window.groups if group is not None) == 1998


def test_a_record_is_read_back_as_it_was(tmp_path: Path):
    window = plan([[1] * 20, [2] * 30, [1] * 20, [2] * 31])
    again = WindowOrder.from_bytes(window.to_bytes(), "x")
    assert again.to_bytes() == window.to_bytes()
    assert again.sha256 == window.sha256
    assert again.positions(0, 4) == window.positions(0, 4)
    assert again.groups == window.groups
    plain = WindowOrder(shard=1, start=3, stop=9)
    assert WindowOrder.from_bytes(plain.to_bytes(), "x") == plain
    assert list(plain.positions(4, 6)) == [4, 5]
    with pytest.raises(IndexError, match=r"places \[2, 6\) are not of the window \[3, 9\)"):
        plain.positions(2, 6)
    for damage in (b"{", b"{}", window.to_bytes().replace(b'"stop":4', b'"stop":5')):
        with pytest.raises(OutputError, match="place/0 is damaged; remove"):
            WindowOrder.from_bytes(damage, "place/0")
    with pytest.raises(ValueError, match="each of its rows once"):
        PlannedOrder(offsets=np.array([0, 0]), prefix_lens=np.zeros(2), achievable=np.zeros(2))


def test_the_plan_is_the_same_in_every_process(repository: Path):
    code = (
        "from tests.pipeline.test_prefix_plan import plan\n"
        "print(plan([[i % 7] * (20 + i % 5) for i in range(100)]).sha256)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert found == plan([[i % 7] * (20 + i % 5) for i in range(100)]).sha256


def test_a_template_is_the_longest_prefix_of_many_rows():
    window = plan([[1] * 16 + [2 + i // 4] * 16 + [i] for i in range(12)])
    groups = [window.group(place) for place in range(12)]
    assert {(group.num_rows, group.prefix_len) for group in groups if group} == {(4, 32)}
    assert {group.template for group in groups if group} == {PrefixGroup(0, 12, 16, None)}
    few = plan([[1] * 20, [1] * 21]).group(0)
    assert few is not None
    assert few.template is None


@given(st.lists(st.lists(st.integers(0, 2**31), min_size=1, max_size=40), min_size=2, max_size=6))
def test_hashes_agree_where_prompts_do(prompts: list[list[int]]):
    hasher = PrefixHasher()
    for a, b in pairwise(prompts):
        for left, right in ((a, b), (a, a + b)):
            common = num_common(left, right)
            x, y = hasher.hashes(left), hasher.hashes(right)
            agree = [p == q for p, q in zip(x, y, strict=False)]
            assert [*agree, False].index(False) == -(-common // UNIT)
            assert len(x) == -(-len(left) // UNIT)


@given(st.sets(st.integers(1, 2**64 - 1), max_size=40), st.sets(st.integers(1, 2**64 - 1), max_size=40))
def test_seen_prefixes_forget_at_most(added: set[int], others: set[int]):
    small, large = SeenPrefixes(32), SeenPrefixes(2**12)
    known = np.array(sorted(added), dtype=np.uint64)
    for seen in (small, large):
        seen.add(known)
        for number in others - added:
            assert seen.num_known(np.array([number], dtype=np.uint64)) == 0
        found = sum(seen.num_known(known[i : i + 1]) for i in range(len(known)))
        assert found == len(known) if seen.is_exact else found < len(known)
