"""Ids: what a column gives, and what a hash depends on."""

from __future__ import annotations

import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.row_ids import content_id, named_id
from pipeline.rows import Refused


@pytest.mark.parametrize(
    ("value", "expected"), [("a/ b\n", "a/ b\n"), (7, "7"), (-7, "-7"), ("é", "é"), (0, "0")]
)
def test_text_and_integers_are_ids(value, expected):
    assert named_id(value, "id") == expected


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "null_value"),
        (True, "wrong_type"),
        (1.0, "wrong_type"),
        (["a"], "wrong_type"),
        ("", "bad_id"),
        ("x" * 513, "bad_id"),
        (10**600, "bad_id"),
        ("\ud800", "lone_surrogate"),
    ],
)
def test_what_is_no_id_has_a_reason_and_names_the_column(value, reason):
    with pytest.raises(Refused, match="'key'") as caught:
        named_id(value, "key")
    assert caught.value.reason == reason


values = st.none() | st.integers() | st.text() | st.lists(st.text(), max_size=2)


@given(
    source=st.text(),
    row=st.integers(0, 2**40),
    content=st.dictionaries(st.text(), values, max_size=3),
    other=st.tuples(st.text(), st.integers(0, 2**40), st.dictionaries(st.text(), values, max_size=3)),
)
def test_ids_are_equal_exactly_when_place_and_content_are(source, row, content, other):
    mine = content_id(source, row, content)
    assert mine == content_id(source, row, dict(reversed(content.items())))
    assert len(mine) == 32
    assert (mine == content_id(*other)) == ((source, row, content) == other)


def test_the_hash_is_the_same_in_every_version():
    assert content_id("a.jsonl", 3, {"prompt": "é"}) == "9ebad0ac53d898ae2eba098c13d5e13f"


def test_values_json_has_not_are_told_apart():
    day = datetime.date(2024, 1, 2)
    ids = [content_id("a", 0, {"x": value}) for value in (day, str(day), b"\x01", b"\x02", "01")]
    assert len(set(ids)) == len(ids)
