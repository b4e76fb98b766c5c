"""A request is fitted into the context as it was asked to be, or refused; nothing is cut unasked."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.context_rules import cut, fit_context
from engine.errors import RequestError
from engine.options import RequestOptions


def fit(prompt_len: int, max_tokens: int, max_model_len: int = 100, **options):
    """(prompt tokens kept, new tokens granted)."""
    fitted = fit_context("r", tuple(range(prompt_len)), max_tokens, max_model_len, RequestOptions(**options))
    return len(fitted.token_ids), fitted.max_total_len - len(fitted.token_ids)


@given(st.integers(0, 150), st.integers(1, 150), st.integers(2, 120))
def test_by_default_new_tokens_are_capped_and_prompts_left_alone(prompt_len, max_tokens, max_model_len):
    total = max(prompt_len + 1, min(prompt_len + max_tokens, max_model_len))
    assert fit(prompt_len, max_tokens, max_model_len) == (prompt_len, total - prompt_len)


def test_what_fits_is_left_alone_whatever_the_options():
    assert fit(80, 20, strict_context=True) == (80, 20)
    assert fit(80, 20, truncate_mode="middle") == (80, 20)
    assert fit(80, 20, auto_cap_new_tokens=False) == (80, 20)


def test_reserved_tokens_are_given_to_nobody():
    assert fit(80, 20, reserve_tokens=5) == (80, 15)
    with pytest.raises(RequestError, match=r"room for 95 tokens \(max_model_len 100, reserve_tokens 5\)"):
        fit(95, 20, reserve_tokens=5)


def test_strict_context_refuses_what_does_not_fit_whole():
    with pytest.raises(RequestError, match="80 tokens and asks for 21 more") as caught:
        fit(80, 21, strict_context=True)
    assert caught.value.reason == "request_too_long"


def test_without_capping_the_prompt_is_cut_or_the_request_refused():
    with pytest.raises(RequestError, match="ask for fewer"):
        fit(80, 30, auto_cap_new_tokens=False)
    assert fit(80, 30, auto_cap_new_tokens=False, truncate_mode="left") == (70, 30)
    with pytest.raises(RequestError):
        fit(80, 100, auto_cap_new_tokens=False, truncate_mode="left")


def test_which_of_the_two_gives_way_first():
    assert fit(80, 30, truncate_mode="left", prefer_preserve_prompt=True) == (80, 20)
    assert fit(80, 30, truncate_mode="left", prefer_preserve_prompt=False) == (70, 30)


def test_a_cut_prompt_leaves_room_for_what_was_asked_up_to_half():
    assert fit(300, 30, truncate_mode="left") == (70, 30)
    assert fit(300, 90, truncate_mode="left") == (50, 50)


def test_what_each_mode_keeps():
    tokens = tuple(range(10))
    assert cut(tokens, 4, "left") == (6, 7, 8, 9)
    assert cut(tokens, 4, "right") == (0, 1, 2, 3)
    assert cut(tokens, 4, "middle") == (0, 1, 8, 9)
    assert cut(tokens, 5, "middle") == (0, 1, 2, 8, 9)
    assert cut(tokens, 1, "middle") == (0,)
    assert cut(tokens, 10, "left") == cut(tokens, 11, "middle") == tokens


@given(
    st.integers(1, 150),
    st.integers(1, 150),
    st.integers(4, 120),
    st.builds(
        RequestOptions,
        reserve_tokens=st.integers(0, 2),
        truncate_mode=st.sampled_from([None, "left", "right", "middle"]),
        auto_cap_new_tokens=st.booleans(),
        prefer_preserve_prompt=st.booleans(),
        strict_context=st.booleans(),
    ),
)
def test_it_fits_or_is_refused(prompt_len, max_tokens, max_model_len, options):
    tokens, room = tuple(range(prompt_len)), max_model_len - options.reserve_tokens
    try:
        kept, total = fit_context("r", tokens, max_tokens, max_model_len, options)
    except RequestError:
        assert prompt_len + max_tokens > room
        return
    num_new = total - len(kept)
    if kept == tokens and prompt_len >= max_model_len:
        return  # the scheduler's to refuse
    assert 1 <= num_new <= max_tokens
    assert 1 <= len(kept) <= prompt_len
    assert total <= room
    assert kept == tokens or options.truncates
    assert list(kept) == sorted(set(kept) & set(tokens))
    assert num_new == max_tokens or options.auto_cap_new_tokens
