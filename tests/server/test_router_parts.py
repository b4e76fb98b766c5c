"""What a router decides with: where a prompt belongs, who is too busy, who is left alone, and how much was
used."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ConfigError
from engine.server.router.beginning import prompt_beginning
from engine.server.router.breaker import CircuitBreaker
from engine.server.router.ring import HashRing, by_load, by_prefix
from engine.server.router.settings import RouterSettings, UpstreamSettings
from engine.server.router.usage import UsageEventFilter, UsageReader, with_usage_asked

names = st.lists(st.text("abcdef", min_size=1, max_size=3), min_size=1, max_size=8, unique=True)


@given(names, st.binary(max_size=8))
def test_the_order_of_a_key_is_all_names_once_and_the_same_every_time(given_names: list[str], key: bytes):
    order = HashRing(given_names).order(key)
    assert sorted(order) == sorted(given_names)
    assert HashRing(reversed(given_names)).order(key) == order


@given(names, st.integers(0, 10**6))
def test_when_a_name_goes_only_its_keys_move(given_names: list[str], key: int):
    if len(given_names) < 2:
        return
    before = HashRing(given_names).order(str(key).encode())
    for gone in given_names:
        after = HashRing([name for name in given_names if name != gone]).order(str(key).encode())
        assert after == [name for name in before if name != gone]


def test_keys_spread_over_names():
    ring = HashRing(["a", "b", "c", "d"])
    firsts = Counter(ring.order(str(number).encode())[0] for number in range(4000))
    assert min(firsts.values()) > 500, firsts


@given(
    st.lists(st.sampled_from([b"t0", b"t1", b"t2"]), min_size=1, max_size=200),
    st.floats(1.0, 3.0),
    st.integers(1, 5),
)
def test_whatever_the_keys_no_load_passes_its_bound(keys: list[bytes], load_factor: float, num: int):
    ring = HashRing([f"u{number}" for number in range(num)])
    loads = {f"u{number}": 0 for number in range(num)}
    for key in keys:
        bound = math.ceil(load_factor * (sum(loads.values()) + 1) / num)
        chosen = by_prefix(ring.order(key), loads, load_factor)
        assert sorted(chosen) == sorted(loads)
        free = [name for name in ring.order(key) if loads[name] < bound]
        assert chosen[0] == free[0]
        loads[chosen[0]] += 1
        assert max(loads.values()) <= bound


def test_the_least_loaded_comes_first_without_a_key():
    assert by_load({"a": 3, "b": 1, "c": 2}) == ["b", "c", "a"]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_breaker_opens_tries_once_and_waits_twice_as_long_each_time():
    clock = Clock()
    breaker = CircuitBreaker(3, 1.0, 5.0, clock)
    for _ in range(2):
        breaker.begin()
        breaker.failed()
    assert breaker.allows
    breaker.succeeded()
    for _ in range(3):
        assert breaker.allows
        breaker.begin()
        breaker.failed()
    for wait in (1.0, 2.0, 4.0, 5.0, 5.0):
        assert breaker.state == "open"
        clock.now += wait - 0.01
        assert not breaker.allows
        clock.now += 0.01
        assert breaker.state == "half_open"
        breaker.begin()
        assert not breaker.allows  # one trial at a time
        breaker.failed()
    clock.now += 5.0
    breaker.begin()
    breaker.cancelled()
    assert breaker.allows
    breaker.begin()
    breaker.succeeded()
    assert breaker.state == "closed"
    breaker.failed()
    assert breaker.allows


def test_failures_of_requests_sent_before_it_opened_do_not_lengthen_the_wait():
    clock = Clock()
    breaker = CircuitBreaker(1, 1.0, 60.0, clock)
    for _ in range(5):
        breaker.failed()
    clock.now = 1.0
    assert breaker.allows


def chat(*messages: tuple[str, Any], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in messages], **more}


def test_prompts_of_a_template_begin_alike_and_others_do_not():
    system = "You are a judge. " * 200
    first = prompt_beginning(chat(("system", system), ("user", "one")), 512)
    assert first == prompt_beginning(chat(("system", system), ("user", "two")), 512)
    assert first != prompt_beginning(chat(("system", system + "."), ("user", "one")), 512)
    assert first != prompt_beginning(chat(("system", system), ("user", "one"), tools=[{"a": 1}]), 512)
    template = "Summarise: " * 100
    assert prompt_beginning({"prompt": template + "x"}, 512) == prompt_beginning(
        {"prompt": template + "y"}, 512
    )
    assert prompt_beginning({"prompt": "x" + template}, 512) != prompt_beginning({"prompt": template}, 512)
    assert prompt_beginning({"instructions": "a", "input": "x"}, 512) == prompt_beginning(
        {"instructions": "a", "input": "y"}, 512
    )
    assert prompt_beginning({"prompt": template}, 0) is None
    assert prompt_beginning({}, 512) is None


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["role", "content"]), inner)
        ),
        max_leaves=4,
    ),
    st.sampled_from(["messages", "prompt", "input", "instructions", "tools"]),
)
def test_any_body_has_a_beginning_or_none(value: Any, name: str):
    assert isinstance(prompt_beginning({name: value}, 16), bytes | None)


def event(data: Any) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


@given(st.lists(st.integers(1, 40), min_size=1), st.integers(0, 5))
def test_the_usage_event_is_taken_out_however_the_stream_is_cut(sizes: list[int], num: int):
    words = [event({"choices": [{"delta": {"content": f'"usage" {n} "choices": []'}}]}) for n in range(num)]
    usage = event({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": num}})
    end = b"data: [DONE]\n\n"
    stream = b"".join(words) + usage + end
    events, reader, passed, start = UsageEventFilter(), UsageReader(), [], 0
    while start < len(stream):
        piece = stream[start : start + sizes[start % len(sizes)]]
        start += len(piece)
        reader.feed(piece)
        passed += list(events.feed(piece))
    assert b"".join(passed) + events.rest() == b"".join(words) + end
    assert reader.tokens() == (5, num)


def test_what_a_model_writes_is_not_taken_for_usage():
    reader = UsageReader()
    lie = '{"prompt_tokens": 0, "completion_tokens": 0}'
    body = {"usage": {"prompt_tokens": 7, "completion_tokens": 8}, "choices": [{"text": lie}]}
    reader.feed(json.dumps(body).encode())
    assert reader.tokens() == (7, 8)


def test_a_stream_that_breaks_off_counts_a_token_an_event():
    reader = UsageReader()
    reader.feed(event({"choices": [{}]}) * 4)
    assert reader.tokens() == (0, 4)


def test_usage_is_asked_for_where_it_would_not_come():
    asked = with_usage_asked("/v1/completions", {"stream": True, "stream_options": {"x": 1}})
    assert asked == {"stream": True, "stream_options": {"x": 1, "include_usage": True}}
    for path, body in (
        ("/v1/completions", {}),
        ("/v1/completions", {"stream": True, "stream_options": {"include_usage": True}}),
        ("/v1/responses", {"stream": True}),
        ("/v1/completions", {"stream": True, "stream_options": "nonsense"}),
    ):
        assert with_usage_asked(path, body) is None


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://host",
        "gopher://host",
        "host:8000",
        "http://",
        "http://user:password@host",
        "http://host/?a=b",
        "http://host/#a",
        "http://host:port",
        "unix:///run/s",
    ],
)
def test_an_upstreams_url_is_plain_http(url: str):
    with pytest.raises(ConfigError, match="url"):
        UpstreamSettings(name="a", url=url)


def test_upstreams_are_named_apart_and_their_keys_not_shown(monkeypatch: pytest.MonkeyPatch):
    upstream = UpstreamSettings(name="a", url="http://host:1/v1/", api_key="hush")
    assert upstream.base_url == "http://host:1"
    assert "hush" not in repr(upstream)
    with pytest.raises(ConfigError, match="same name"):
        RouterSettings(upstreams=(upstream, upstream))
    with pytest.raises(ConfigError, match="at least one"):
        RouterSettings(upstreams=())
    with pytest.raises(ConfigError, match="load_factor"):
        RouterSettings(upstreams=(upstream,), load_factor=0.5)
    named = UpstreamSettings(name="a", url="http://host", api_key_env="NO_SUCH_KEY")
    with pytest.raises(ConfigError, match="NO_SUCH_KEY is not set"):
        named.key()
    monkeypatch.setenv("NO_SUCH_KEY", "k")
    assert named.key() == "k"
