"""Pinned prefixes are evicted after all others, deepest page first, and remembered when they are gone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.page_pool import PagePool
from engine.prefix_cache import PrefixCache
from engine.request import Request
from tests.engine.host import make_request

PAGE_SIZE = 4


def make_cache(num_pages: int) -> tuple[PagePool, PrefixCache]:
    pool = PagePool(num_pages)
    return pool, PrefixCache(PAGE_SIZE, pool)


def hold(pool: PagePool, cache: PrefixCache, request: Request) -> list[int]:
    """Compute a request's tokens, with pages for them, those it finds first."""
    found = cache.match(request, request.num_tokens)
    pool.share(found)
    request.page_ids = found + pool.allocate(-(-request.num_tokens // PAGE_SIZE) - len(found))
    request.num_shared_pages = len(found)
    request.num_computed = request.num_tokens
    cache.insert(request)
    check(pool, cache)
    return list(request.page_ids)


def compute(pool: PagePool, cache: PrefixCache, request: Request) -> list[int]:
    """As `hold`, and let the pages go again."""
    pages = hold(pool, cache, request)
    pool.release(request.page_ids)
    check(pool, cache)
    return pages


def check(pool: PagePool, cache: PrefixCache) -> None:
    pool.check_integrity()
    cache.check_integrity()


def evictions(pool: PagePool, cache: PrefixCache) -> list[int]:
    """All pages in the order in which they are given out."""
    order = []
    while pool.num_available:
        order += pool.allocate(1)
        check(pool, cache)
    return order


def test_a_pinned_prefix_outlives_what_was_used_after_it():
    pool, cache = make_cache(6)
    cache.pin(range(10), None)  # two full pages, and two tokens of no account
    assert compute(pool, cache, make_request("a", range(10))) == [0, 1, 2]
    assert compute(pool, cache, make_request("b", range(50, 62))) == [2, 3, 4]
    assert pool.num_pinned == 2
    assert evictions(pool, cache) == [5, 4, 3, 2, 1, 0]


def test_pages_that_are_known_already_can_be_pinned():
    pool, cache = make_cache(6)
    compute(pool, cache, make_request("a", range(8)))
    compute(pool, cache, make_request("b", range(50, 58)))
    cache.pin(range(8), None)
    check(pool, cache)
    assert evictions(pool, cache) == [4, 5, 3, 2, 1, 0]


def test_a_pin_on_part_of_a_chain_keeps_that_part():
    pool, cache = make_cache(4)
    compute(pool, cache, make_request("a", range(16)))
    cache.pin(range(4), None)
    assert evictions(pool, cache) == [3, 2, 1, 0]


def test_a_released_prefix_counts_as_used_last():
    pool, cache = make_cache(4)
    cache.pin(range(8), None)
    compute(pool, cache, make_request("a", range(8)))
    compute(pool, cache, make_request("b", range(50, 58)))
    cache.release(range(8), None)
    check(pool, cache)
    assert pool.num_pinned == 0
    assert evictions(pool, cache) == [3, 2, 1, 0]


def test_pins_add_up():
    pool, cache = make_cache(4)
    for _ in range(2):
        cache.pin(range(8), None)
    cache.pin(range(4), None)
    compute(pool, cache, make_request("a", range(8)))
    cache.release(range(8), None)
    assert pool.num_pinned == 2
    cache.release(range(8), None)
    assert pool.num_pinned == 1
    compute(pool, cache, make_request("b", range(50, 58)))
    assert evictions(pool, cache) == [1, 3, 2, 0]


def test_a_pinned_prefix_that_had_to_go_is_pinned_again_when_it_comes_back():
    pool, cache = make_cache(2)
    cache.pin(range(8), None)
    compute(pool, cache, make_request("a", range(8)))
    hold(pool, cache, other := make_request("b", range(50, 58)))
    assert pool.num_pinned == 0
    pool.release(other.page_ids)
    compute(pool, cache, make_request("c", range(8)))
    assert pool.num_pinned == 2
    assert cache.match(make_request("d", range(8)), 8)


def test_a_held_page_can_be_pinned_and_released():
    pool, cache = make_cache(4)
    hold(pool, cache, request := make_request("a", range(8)))
    cache.pin(range(8), None)
    assert (pool.num_pinned, pool.num_held) == (2, 2)
    pool.release(request.page_ids)
    check(pool, cache)
    cache.release(range(8), None)
    assert pool.num_cached == 2


def test_salts_are_pinned_apart():
    pool, cache = make_cache(4)
    cache.pin(range(4), "x")
    compute(pool, cache, make_request("a", range(4)))
    assert pool.num_pinned == 0
    compute(pool, cache, make_request("b", range(4), cache_salt="x"))
    assert pool.num_pinned == 1
    with pytest.raises(ValueError, match="has its first 0 pages"):
        cache.release(range(4), None)
    check(pool, cache)


def test_only_what_is_pinned_can_be_released():
    _, cache = make_cache(4)
    cache.pin(range(8), None)
    with pytest.raises(ValueError, match=r"of 12 tokens is released but not pinned .* its first 2 pages"):
        cache.release(range(12), None)
    with pytest.raises(ValueError, match="release what was pinned"):
        cache.release(range(4), None)  # covered by a pin, but none of its own
    cache.release(range(8), None)
    with pytest.raises(ValueError, match="release what was pinned, once"):
        cache.release(range(8), None)


prompts = st.lists(st.integers(0, 1), min_size=1, max_size=4).map(
    lambda pages: tuple(token for page in pages for token in [page] * PAGE_SIZE)
)


@given(
    st.lists(st.tuples(st.sampled_from(["pin", "release", "compute"]), prompts), max_size=30),
    st.integers(4, 8),
)
def test_nothing_pinned_goes_before_anything_that_is_not(
    operations: list[tuple[str, tuple[int, ...]]], size: int
):
    pool, cache = make_cache(size)
    pins: list[tuple[int, ...]] = []
    for name, prompt in operations:
        if name == "pin":
            cache.pin(prompt, None)
            pins.append(prompt)
        elif name == "release":
            if prompt in pins:
                pins.remove(prompt)
                cache.release(prompt, None)
        else:
            compute(pool, cache, make_request("a", prompt))
        check(pool, cache)
    pinned = {page for prompt in pins for page in cache.match(make_request("a", prompt), len(prompt))}
    assert pool.num_pinned == len(pinned)
    order = evictions(pool, cache)
    assert set(order[len(order) - len(pinned) :]) == pinned
    for prompt in pins:
        cache.release(prompt, None)
    check(pool, cache)
