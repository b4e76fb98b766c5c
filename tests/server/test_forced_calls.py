"""Calls written under a schema are read the same in any pieces."""

from __future__ import annotations

import json
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from engine.parsers import message_of
from engine.server.forced_calls import NamedCall, RequiredCalls

VALUES = st.dictionaries(
    st.text(max_size=4),
    st.one_of(st.text(alphabet='a"\\{}[],:', max_size=6), st.integers(), st.lists(st.booleans(), max_size=2)),
    max_size=3,
)
CALLS = st.lists(st.tuples(st.sampled_from(["a", "get_b", 'c"d']), VALUES), min_size=1, max_size=3)


def pieces(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[start:stop] for start, stop in pairwise(edges)]


@given(calls=CALLS, cuts=st.lists(st.integers(0, 500), max_size=8), indent=st.sampled_from([None, 1]))
def test_required_calls_in_any_pieces(calls: list[tuple[str, dict]], cuts: list[int], indent: int | None):
    text = json.dumps([{"name": name, "arguments": values} for name, values in calls], indent=indent)
    reader = RequiredCalls()
    events = [event for piece in pieces(text, cuts) for event in reader.push(piece)] + reader.finish()
    message = message_of(events)
    assert [(call.name, json.loads(call.arguments)) for call in message.tool_calls] == calls
    assert message.content == ""


@given(values=VALUES, cuts=st.lists(st.integers(0, 500), max_size=4))
def test_a_named_call_in_any_pieces(values: dict, cuts: list[int]):
    text = json.dumps(values)
    reader = NamedCall("f")
    events = [event for piece in pieces(text, cuts) for event in reader.push(piece)] + reader.finish()
    (call,) = message_of(events).tool_calls
    assert (call.name, call.arguments) == ("f", text)


def test_a_call_that_was_cut_off_keeps_what_was_written():
    reader = RequiredCalls()
    events = reader.push('[{"name": "f", "arguments": {"city": "Pa') + reader.finish()
    (call,) = message_of(events).tool_calls
    assert (call.name, call.arguments) == ("f", '{"city": "Pa')
