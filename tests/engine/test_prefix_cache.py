"""Full pages are shared by content; a hit is verified; what was evicted is gone. Exact page numbers."""

import pytest

from engine.packed_tokens import pack_tokens
from engine.page_pool import PagePool
from engine.prefix_cache import HashPage, PrefixCache, page_hash, root_hash
from engine.request import Request
from tests.engine.host import make_request

PAGE_SIZE = 4


def make_cache(num_pages: int = 8, hash_page: HashPage = page_hash) -> tuple[PagePool, PrefixCache]:
    pool = PagePool(num_pages)
    return pool, PrefixCache(PAGE_SIZE, pool, hash_page)


def compute(pool: PagePool, cache: PrefixCache, request: Request) -> list[int]:
    """Hold pages for all of a request's tokens, those it finds first, and say they are computed."""
    found = cache.match(request, request.num_tokens)
    pool.share(found)
    num_pages = -(-request.num_tokens // PAGE_SIZE)
    request.page_ids = found + pool.allocate(num_pages - len(found))
    request.num_shared_pages = len(found)
    request.num_computed = request.num_tokens
    cache.insert(request)
    check(pool, cache)
    return list(request.page_ids)


def check(pool: PagePool, cache: PrefixCache) -> None:
    pool.check_integrity()
    cache.check_integrity()


def closest(cache: PrefixCache, request: Request, pages: list[int], max_tokens: int) -> tuple[int, int]:
    return cache.closest(pages, request.packed_tokens(len(pages) * PAGE_SIZE, max_tokens), request.cache_salt)


def test_a_hash_covers_the_tokens_the_parent_and_the_salt():
    root = root_hash(None)
    assert page_hash(root, pack_tokens([1, 2, 3])) == page_hash(root, pack_tokens((1, 2, 3)))
    assert page_hash(root, pack_tokens([1, 2, 3])) != page_hash(root, pack_tokens([1, 3, 2]))
    one, two = pack_tokens([1]), pack_tokens([2])
    assert page_hash(page_hash(root, one), two) != page_hash(page_hash(root, two), two)
    salted = {root_hash(salt) for salt in (None, "", "a", "b")}
    assert len(salted) == 4
    assert len({page_hash(salt, one) for salt in salted}) == 4


def test_full_pages_of_a_common_beginning_are_found():
    pool, cache = make_cache()
    assert compute(pool, cache, make_request("a", range(10))) == [0, 1, 2]
    same_start = make_request("b", [*range(8), 90, 91, 92, 93])
    assert cache.match(same_start, 12) == [0, 1]
    assert cache.match(same_start, 7) == [0]
    assert cache.match(same_start, 3) == []
    assert cache.match(make_request("c", [9, *range(1, 12)]), 12) == []
    # The third page was not full, so it is nobody else's.
    assert cache.match(make_request("d", range(12)), 12) == [0, 1]
    assert not cache.knows(2)


def test_a_salt_separates():
    pool, cache = make_cache()
    compute(pool, cache, make_request("a", range(8), cache_salt="x"))
    assert cache.match(make_request("b", range(8), cache_salt="x"), 8) == [0, 1]
    assert cache.match(make_request("c", range(8), cache_salt="y"), 8) == []
    assert cache.match(make_request("d", range(8)), 8) == []


def test_pages_computed_twice_become_one():
    """Two requests prefilled the same pages in one step; the second one's copies go back to the pool."""
    pool, cache = make_cache()
    requests = [make_request(name, range(10)) for name in "ab"]
    for request in requests:
        request.page_ids = pool.allocate(3)
        request.num_computed = 10
    for request in requests:
        cache.insert(request)
        check(pool, cache)
    assert [request.page_ids for request in requests] == [[0, 1, 2], [0, 1, 5]]
    assert (pool.num_holders(0), pool.num_holders(5), pool.num_free) == (2, 1, 4)


def test_the_deepest_page_is_evicted_first_and_cannot_be_reached_again():
    pool, cache = make_cache(num_pages=4)
    first = make_request("a", range(16))
    assert compute(pool, cache, first) == [0, 1, 2, 3]
    pool.release(first.page_ids)
    again = make_request("b", range(16))
    for evicted, left in ((3, [0, 1, 2]), (2, [0, 1]), (1, [0]), (0, [])):
        assert pool.allocate(1) == [evicted]
        assert cache.match(again, 16) == left
        assert not cache.knows(evicted)
        check(pool, cache)


def test_a_branch_is_evicted_before_the_stem_it_shares():
    pool, cache = make_cache(num_pages=5)
    stem = list(range(8))
    one, two = make_request("a", [*stem, 50, 51, 52, 53]), make_request("b", [*stem, 60, 61, 62, 63])
    assert compute(pool, cache, one) == [0, 1, 2]
    assert compute(pool, cache, two) == [0, 1, 3]
    pool.release(one.page_ids)  # only its own page 2 is left without a holder
    assert (pool.num_cached, pool.num_held, pool.num_free) == (1, 3, 1)
    pool.release(two.page_ids)
    assert pool.allocate(5) == [4, 2, 3, 1, 0]


def test_using_a_page_makes_it_the_last_to_be_evicted():
    pool, cache = make_cache(num_pages=4)
    old, young = make_request("old", range(8)), make_request("young", range(100, 108))
    for request in (old, young):
        compute(pool, cache, request)
    pool.release(old.page_ids)
    pool.release(young.page_ids)
    pages = cache.match(old, 8)
    pool.share(pages)
    pool.release(pages)
    assert pool.allocate(3) == [3, 2, 1]
    assert cache.match(old, 8) == [0]


class CollidingHash:
    """Every page has the same hash."""

    def __call__(self, parent: bytes, tokens: bytes) -> bytes:
        return b"collision"


def test_a_collision_is_a_miss():
    pool, cache = make_cache(hash_page=CollidingHash())
    compute(pool, cache, make_request("a", [1, 1, 1, 1]))
    assert cache.match(make_request("b", [2, 2, 2, 2]), 4) == []
    assert cache.match(make_request("c", [1, 1, 1, 1], cache_salt="x"), 4) == []
    assert cache.match(make_request("d", [1, 1, 1, 1]), 4) == [0]


def test_equal_tokens_elsewhere_in_a_prompt_are_not_a_hit_even_with_equal_hashes():
    """The second page's tokens, salt and hash are those of page 0, but it continues another page."""
    pool, cache = make_cache(hash_page=CollidingHash())
    compute(pool, cache, make_request("a", [1, 1, 1, 1]))
    assert cache.match(make_request("b", [1] * 8), 8) == [0]


def test_a_collision_on_insertion_leaves_both_requests_their_own_pages():
    pool, cache = make_cache(hash_page=CollidingHash())
    assert compute(pool, cache, make_request("a", [1] * 4)) == [0]
    other = make_request("b", [2] * 12)
    assert compute(pool, cache, other) == [1, 2, 3]
    assert other.num_shared_pages == 0
    assert cache.num_known == 1
    pool.release(other.page_ids)
    assert (pool.num_free, pool.num_cached, pool.num_held) == (7, 0, 1)


def test_hashes_are_computed_once_and_only_as_far_as_needed():
    calls: list[bytes] = []

    def counting(parent: bytes, tokens: bytes) -> bytes:
        calls.append(tokens)
        return page_hash(parent, tokens)

    pool, cache = make_cache(hash_page=counting)
    request = make_request("a", range(16))
    for _ in range(3):
        assert cache.match(request, 16) == []
    assert calls == [pack_tokens(range(4))]  # the first page misses: the rest is not worth hashing
    compute(pool, cache, request)
    assert cache.match(request, 16) == [0, 1, 2, 3]
    assert len(calls) == 4


def test_the_page_that_begins_most_alike_is_found():
    pool, cache = make_cache(num_pages=12)
    compute(pool, cache, make_request("a", [*range(4), 10, 11, 12, 13]))
    compute(pool, cache, make_request("b", [*range(4), 10, 11, 20, 21]))
    wanted = make_request("c", [*range(4), 10, 11, 12, 90, 91])
    assert cache.match(wanted, 8) == [0]
    assert closest(cache, wanted, [0], 8) == (1, 3)
    assert closest(cache, wanted, [0], 6)[1] == 2
    assert closest(cache, wanted, [0], 4) == (0, 0)
    # The same tokens continue another page, another prompt's beginning, or another salt.
    assert closest(cache, wanted, [1], 8) == (0, 0)
    assert closest(cache, make_request("d", [10, 11, 12, 13]), [], 4) == (0, 0)
    assert closest(cache, make_request("e", [0, 1, 2, 90], cache_salt="x"), [], 4) == (0, 0)
    assert closest(cache, make_request("f", [0, 1, 2, 90]), [], 4) == (0, 3)


def test_what_lies_behind_the_last_full_page_is_found_until_it_is_part_of_a_full_page():
    pool, cache = make_cache()
    owner = make_request("a", range(7))
    compute(pool, cache, owner)
    wanted = make_request("b", [*range(6), 90])
    assert closest(cache, wanted, [0], 6) == (0, 0)
    cache.insert_rest(owner)
    check(pool, cache)
    assert closest(cache, wanted, [0], 6) == (1, 2)
    assert cache.match(wanted, 7) == [0]
    assert not cache.knows(1)
    owner.output_token_ids = [7]
    owner.num_computed = 8
    cache.insert(owner)
    check(pool, cache)
    assert cache.knows(1)
    assert closest(cache, wanted, [0], 6) == (1, 2)


def test_the_rest_of_a_request_is_evicted_before_the_pages_it_continues():
    pool, cache = make_cache(num_pages=3)
    owner = make_request("a", range(10))
    compute(pool, cache, owner)
    cache.insert_rest(owner)
    pool.release(owner.page_ids)
    assert pool.num_cached == 3
    for page in (2, 1, 0):
        assert pool.allocate(1) == [page]
        check(pool, cache)
    assert cache.num_known == 0


def test_a_rest_that_grows_into_a_page_known_already_is_swapped_and_freed():
    pool, cache = make_cache()
    owner, other = make_request("a", range(6)), make_request("b", range(8))
    compute(pool, cache, owner)
    cache.insert_rest(owner)
    assert compute(pool, cache, other) == [0, 2]
    owner.output_token_ids = [6, 7]
    owner.num_computed = 8
    cache.insert(owner)
    check(pool, cache)
    assert owner.page_ids == [0, 2]
    assert (pool.num_free, pool.num_held) == (6, 2)


def test_the_rest_behind_a_collision_is_nobody_elses():
    pool, cache = make_cache(hash_page=CollidingHash())
    compute(pool, cache, make_request("a", [1] * 4))
    other = make_request("b", [2] * 6)
    compute(pool, cache, other)
    cache.insert_rest(other)  # it continues a page that could not be made known
    assert cache.num_known == 1
    check(pool, cache)


def test_a_page_holds_at_least_one_token():
    with pytest.raises(ValueError, match="at least one token"):
        PrefixCache(0, PagePool(1))
