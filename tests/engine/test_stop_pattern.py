"""Stop patterns: which are taken, and that a text ends at the first match, whatever its pieces."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.detokenizer import IncrementalDetokenizer
from engine.errors import RequestError
from engine.sampling_params import SamplingParams
from engine.stop_pattern import MAX_WIDTH, StopPattern

PATTERNS = ["END", r"\d{2,3}", "[.!?] ", "a(b|cd)e?", "x{3}", "(?:no|yes), .{0,4};"]


class Characters:
    """A tokenizer whose tokens are characters."""

    def decode(self, token_ids, *, skip_special_tokens=True):
        return "".join(map(chr, token_ids))


def stopped(pattern: str, text: str, sizes: list[int], **options) -> tuple[str, list[str], str | None]:
    """The text, its deltas, and what stopped it, when `text` comes in pieces of these sizes."""
    detokenizer = IncrementalDetokenizer(Characters(), stop_pattern=StopPattern.of(pattern), **options)
    deltas, start = [], 0
    for size in [*sizes, len(text)]:
        piece = text[start : start + size]
        start += size
        if piece and detokenizer.stopped_by is None:
            deltas.append(detokenizer.push([ord(character) for character in piece]))
    deltas.append(detokenizer.finish())
    return detokenizer.text, deltas, detokenizer.stopped_by


def first_to_end(pattern: str, text: str) -> tuple[int, int] | None:
    """(start, end) of the match that is complete first."""
    for end in range(1, len(text) + 1):
        for start in range(end):
            if re.compile(pattern).fullmatch(text, start, end):
                return start, end
    return None


@given(
    st.sampled_from(PATTERNS),
    st.text("ENDabcde12x.! no,yes;", max_size=30),
    st.lists(st.integers(1, 5), max_size=8),
)
def test_a_text_ends_before_the_match_that_is_complete_first(pattern, text, sizes):
    whole, deltas, stop = stopped(pattern, text, sizes)
    match = first_to_end(pattern, text)
    assert whole == "".join(deltas) == (text if match is None else text[: match[0]])
    assert stop == (None if match is None else pattern)
    kept, _, _ = stopped(pattern, text, sizes, include_stop_str_in_output=True)
    assert kept == (text if match is None else text[: match[1]])


def test_stop_strings_and_a_pattern_together():
    whole, _, stop = stopped(r"\d{3}", "ab12c.d345", [1] * 20, stop=["c."])
    assert (whole, stop) == ("ab12", "c.")
    whole, _, stop = stopped(r"\d{2}", "ab12c.d345", [1] * 20, stop=["c."])
    assert (whole, stop) == ("ab", r"\d{2}")


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("", "must have 1 to"),
        ("(", "no regular expression"),
        ("a*", "empty text"),
        ("a+", "longer than"),
        ("x" * (MAX_WIDTH + 1), "must have 1 to"),
        ("(ab){1,200}", "longer than"),
        ("(?=a)b", "not supported"),
        ("a$", "not supported"),
        (r"\bend", "not supported"),
        (r"(a)\1", "not supported"),
        ("(a|a?){1,30}b", "too many ways"),
        (".{0,20}.{0,20}.{0,20}x", "too many ways"),
        ("(a{1,9}){1,9}b", "too many ways"),
    ],
)
def test_a_pattern_that_could_leak_or_cost_too_much_is_refused(pattern: str, why: str):
    with pytest.raises(RequestError, match=why) as caught:
        SamplingParams(stop_pattern=pattern)
    assert caught.value.reason == "bad_sampling"
    assert "sampling.stop_pattern" in str(caught.value)


def test_the_dearest_pattern_that_is_taken_costs_little():
    pattern = StopPattern.of("(a|a|a|a){1,4}b" + "c" * 100)
    started = time.process_time()
    assert pattern.find("a" * 256, 200) is None
    assert time.process_time() - started < 1.0
