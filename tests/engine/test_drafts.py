"""Where guesses come from, which are kept, and when they pay: pure host."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.packed_tokens import pack_tokens
from engine.speculation.costs import StepCosts
from engine.speculation.ngram import CONTEXT_LENS, prompt_lookup
from engine.speculation.policy import MAX_REST, Measured
from engine.speculation.suffix_index import SuffixIndex
from engine.speculation.verification import accepted

few_tokens = st.lists(st.sampled_from([1, 2, 3, 256, 65536]), max_size=40)


def plain_lookup(tokens: list[int], max_tokens: int) -> tuple[list[int], int]:
    """By comparing lists: the latest place before the end that reads like the end."""
    for length in CONTEXT_LENS:
        for start in range(len(tokens) - length - 1, -1, -1):
            if tokens[start : start + length] == tokens[-length:]:
                text = tokens[start + length :]
                while len(text) < max_tokens:
                    text = text + text
                return text[:max_tokens], length
    return [], 0


@given(few_tokens, st.integers(1, 9))
def test_prompt_lookup_is_the_plain_search(tokens, max_tokens):
    """Also of tokens whose bytes look alike at other places than a token's beginning."""
    assert prompt_lookup(pack_tokens(tokens), max_tokens) == plain_lookup(tokens, max_tokens)


@given(st.lists(few_tokens, max_size=5), few_tokens, st.integers(1, 9))
def test_the_suffix_index_is_the_plain_search(outputs, tokens, max_tokens):
    index = SuffixIndex()
    for output in outputs:
        index.learn("t", pack_tokens(output))
    longest = CONTEXT_LENS[0]
    wanted: tuple[list[int], int] = ([], 0)
    for length in CONTEXT_LENS:
        for output in reversed(outputs):
            stops = range(len(output) - 1, min(longest, len(output)) - 1, -1)
            found = [
                stop
                for stop in stops
                if length <= stop
                and len(tokens) >= length
                and output[stop - length : stop] == tokens[-length:]
            ]
            if found:
                wanted = output[found[0] : found[0] + max_tokens], length
                break
        if wanted[1]:
            break
    assert index.lookup("t", pack_tokens(tokens[-longest:]), max_tokens) == wanted
    assert index.lookup("another", pack_tokens(tokens[-longest:]), max_tokens) == ([], 0)


def test_the_suffix_index_is_bounded_and_forgets_the_oldest_first():
    index, pick = SuffixIndex(max_tokens=200), random.Random(0)
    outputs = [[pick.randrange(1000) for _ in range(30)] for _ in range(40)]
    for number, output in enumerate(outputs):
        index.learn(number % 3, pack_tokens(output))
        if number % 2:
            index.lookup(number % 3, pack_tokens(output[:8]), 4)
        assert index.num_tokens <= 2 * 200, "those that were read, and those that nobody asked for yet"
    last, first = outputs[-1], outputs[0]
    assert index.lookup(39 % 3, pack_tokens(last[2:10]), 3) == (last[10:13], 8)
    assert index.lookup(0, pack_tokens(first[2:10]), 3) == ([], 0)
    known = [context for places in index._places.values() for context in places.values()]
    assert {output for output, _ in known} == {output for _, output in index._outputs}
    assert sum(len(output) // 4 for _, output in index._outputs) <= 200
    index.learn("t", pack_tokens(range(201)))  # longer than all that is kept
    assert index.lookup("t", pack_tokens(range(8)), 3) == ([], 0)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=8), st.integers(0, 5))
def test_what_is_kept_is_what_steps_of_one_token_would_draw(draft, start):
    def drawn_behind(tokens: tuple[int, ...]) -> int:
        return (sum(tokens) * 7 + len(tokens)) % 4

    def seen(guesses: list[int]) -> list[int]:
        return [drawn_behind((start, *guesses[:at])) for at in range(len(guesses) + 1)]

    draws = seen(draft)
    one_by_one: list[int] = []
    while len(one_by_one) <= len(draft):
        one_by_one.append(drawn_behind((start, *one_by_one)))
    kept = [draws[0], *accepted(draft, draws)]
    assert kept == one_by_one[: len(kept)]
    wrong = next((at for at, guess in enumerate(draft) if guess != one_by_one[at]), len(draft))
    assert len(kept) == wrong + 1, "everything up to the first wrong guess is kept"


@pytest.mark.parametrize(("fixed", "each"), [(0.05, 0.0), (0.05, 0.001), (0.0, 0.002)])
def test_costs_of_a_step_are_found_from_its_size(fixed, each):
    costs, pick = StepCosts(), random.Random(1)
    costs.note(8, fixed + 8 * each)
    assert costs.share(8) is None, "one size says nothing of others"
    for _ in range(60):
        size = pick.randint(4, 60)
        costs.note(size, (fixed + each * size) * pick.uniform(0.97, 1.03))
    for size in (4, 60):
        assert costs.share(size) == pytest.approx(each * size / (fixed + each * size), abs=0.06)


def drive(policy: Measured, num_rows: int, num_steps: int, fixed: float, each: float, chance: float) -> float:
    """Steps of a made-up device and text; tokens a second, without drafts being 1."""
    pick, seconds, num_tokens = random.Random(3), 0.0, 0
    for _ in range(num_steps):
        left, drafted, kept = policy.budget(num_rows, 64), 0, 0
        for row in range(num_rows):
            guesses = min(left, policy.draft_len(ROWS[row], num_rows)) if left > 0 else 0
            right = next((at for at in range(guesses) if pick.random() >= chance), guesses)
            if guesses:
                ROWS[row].note(guesses, right, 0.9)
                policy.note_row(guesses, right)
            left, drafted, kept = left - guesses, drafted + guesses, kept + right
        took = fixed + each * (num_rows + drafted)
        policy.note(num_rows, drafted, kept, took * pick.uniform(0.98, 1.02))
        seconds, num_tokens = seconds + took, num_tokens + num_rows + kept
    return num_tokens / seconds * (fixed + each * num_rows) / num_rows


@pytest.fixture(autouse=True)
def _rows() -> None:
    from engine.speculation.policy import Acceptance

    ROWS[:] = [Acceptance() for _ in range(64)]


ROWS: list = []


def test_drafts_go_on_where_they_pay():
    policy = Measured(8)
    assert drive(policy, 4, 400, fixed=0.03, each=0.001, chance=0.8) > 2.0
    assert policy.is_on


@pytest.mark.parametrize(
    ("num_rows", "fixed", "each", "chance"),
    [
        (64, 0.0, 0.002, 0.6),  # tokens cost what they cost, in any company
        (64, 0.05, 0.002, 0.3),
        (4, 0.03, 0.001, 0.0),  # nothing is ever right
        (1, 0.03, 0.02, 0.3),
    ],
)
def test_drafts_cost_nearly_nothing_where_they_do_not_pay(num_rows, fixed, each, chance):
    policy = Measured(8)
    assert drive(policy, num_rows, 800, fixed, each, chance) > 0.97
    assert not policy.is_on


def test_few_rows_are_tried_again_at_once():
    """At the end of a run a draft may pay that did not before."""
    policy = Measured(8)
    drive(policy, 64, 600, fixed=0.03, each=0.001, chance=0.5)
    assert not policy.is_on
    assert drive(policy, 4, 60, fixed=0.03, each=0.001, chance=0.8) > 1.3
    assert policy.is_on


def test_a_policy_that_rests_looks_again_and_less_and_less_often():
    policy, asked = Measured(8), []
    for step in range(6000):
        if policy.budget(16, 64):
            asked.append(step)
        policy.note(16, 0, 0, 0.1)
    gaps = [after - before - 1 for before, after in itertools.pairwise(asked) if after - before > 1]
    assert gaps == sorted(gaps)
    assert gaps[0] < 80
    assert gaps[-1] == MAX_REST
