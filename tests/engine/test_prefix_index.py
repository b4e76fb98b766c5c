"""The continuation that has most in common with another is found, whatever else there is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.packed_tokens import num_common_tokens, pack_tokens
from engine.prefix_index import PrefixIndex

# Numbers that differ in their first bytes, in their last, and in their order as bytes.
sequences = st.lists(st.sampled_from([0, 1, 2, 256, 257, 1 << 24]), min_size=1, max_size=6).map(tuple)


def common_len(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    return length


@given(sequences, sequences)
def test_common_tokens_are_counted(one: tuple[int, ...], other: tuple[int, ...]):
    assert num_common_tokens(pack_tokens(one), pack_tokens(other)) == common_len(one, other)


@given(st.lists(st.tuples(st.sampled_from("ab"), sequences), max_size=20), sequences, st.data())
def test_the_closest_of_those_that_are_left(
    known: list[tuple[str, tuple[int, ...]]], wanted: tuple[int, ...], data: st.DataObject
):
    index = PrefixIndex()
    entries = [(prefix, tokens, page) for page, (prefix, tokens) in enumerate(known)]
    for prefix, tokens, page in entries:
        index.add(prefix, pack_tokens(tokens), page)
    removed = data.draw(st.sets(st.sampled_from(range(len(known))))) if known else set()
    for prefix, tokens, page in entries:
        if page in removed:
            index.remove(prefix, pack_tokens(tokens), page)
    left = [entry for entry in entries if entry[2] not in removed]
    assert index.num_entries() == len(left)
    assert bool(index) == bool(left)
    candidates = {page: common_len(tokens, wanted) for prefix, tokens, page in left if prefix == "a"}
    most = max(candidates.values(), default=0)
    if most:
        page, num_common = index.closest("a", pack_tokens(wanted)) or (-1, -1)
        assert num_common == most == candidates[page]
    else:
        assert index.closest("a", pack_tokens(wanted)) is None
    same = [page for prefix, tokens, page in left if prefix == "a" and tokens == wanted]
    assert index.find("a", pack_tokens(wanted)) in (same or [None])


def test_only_what_is_there_can_be_removed():
    index = PrefixIndex()
    index.add("a", b"1122", 7)
    for entry in (("a", b"1122", 8), ("a", b"11", 7), ("b", b"1122", 7)):
        with pytest.raises(KeyError):
            index.remove(*entry)
    assert index.find("a", b"1122") == 7
