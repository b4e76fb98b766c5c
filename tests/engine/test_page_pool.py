"""Pages are free, cached or held, exactly one of them; exact page numbers and eviction order."""

import pytest

from engine.page_pool import PagePool


def counts(pool: PagePool) -> tuple[int, int, int]:
    pool.check_integrity()
    return pool.num_free, pool.num_cached, pool.num_held


def forget_nothing(page: int) -> None:
    pass


def test_pages_are_handed_out_in_order_and_the_last_released_first():
    pool = PagePool(6)
    assert pool.allocate(3) == [0, 1, 2]
    assert pool.allocate(1) == [3]
    pool.release([1, 2])
    assert counts(pool) == (4, 0, 2)
    assert pool.allocate(4) == [1, 2, 4, 5]
    assert counts(pool) == (0, 0, 6)


def test_a_shared_page_is_free_when_its_last_holder_lets_go():
    pool = PagePool(2)
    [page] = pool.allocate(1)
    pool.share([page])
    assert pool.num_holders(page) == 2
    pool.release([page])
    assert counts(pool) == (1, 0, 1)
    pool.release([page])
    assert counts(pool) == (2, 0, 0)


def test_kept_pages_are_evicted_oldest_release_first_and_deepest_first():
    pool = PagePool(5)
    forgotten: list[int] = []
    first, second = pool.allocate(2), pool.allocate(3)
    for page in (*first, *second):
        pool.keep(page, forgotten.append)
    pool.release(second)
    pool.release(first)
    assert counts(pool) == (0, 5, 0)
    assert pool.allocate(4) == [4, 3, 2, 1]
    assert forgotten == [4, 3, 2, 1]
    assert pool.num_evictions == 4
    assert counts(pool) == (0, 1, 4)


def test_free_pages_go_before_cached_ones():
    pool = PagePool(3)
    pages = pool.allocate(2)
    pool.keep(pages[0], forget_nothing)
    pool.release(pages)
    assert counts(pool) == (2, 1, 0)
    assert pool.allocate(3) == [1, 2, 0]
    assert pool.num_evictions == 1


def test_sharing_a_cached_page_takes_it_out_of_the_queue_and_releasing_puts_it_last():
    pool = PagePool(3)
    pages = pool.allocate(3)
    for page in pages:
        pool.keep(page, forget_nothing)
    pool.release([2, 1, 0])  # 0 is the oldest release
    pool.share([0])
    assert counts(pool) == (0, 2, 1)
    pool.release([0])
    assert pool.allocate(3) == [1, 2, 0]


def test_an_evicted_page_is_not_kept_again_unless_told():
    pool = PagePool(1)
    pool.keep(pool.allocate(1)[0], forget_nothing)
    pool.release([0])
    assert pool.allocate(1) == [0]
    pool.release([0])
    assert counts(pool) == (1, 0, 0)


def test_what_cannot_be_is_refused_and_changes_nothing():
    pool = PagePool(2)
    [page] = pool.allocate(1)
    with pytest.raises(ValueError, match="2 pages asked for, 1 available"):
        pool.allocate(2)
    with pytest.raises(ValueError, match="asked for"):
        pool.allocate(-1)
    with pytest.raises(ValueError, match="page 1 is free"):
        pool.share([1])
    with pytest.raises(ValueError, match="page 1 is to be kept"):
        pool.keep(1, forget_nothing)
    pool.release([page])
    with pytest.raises(ValueError, match="page 0 is released but nobody holds it"):
        pool.release([page])
    assert counts(pool) == (2, 0, 0)
    with pytest.raises(ValueError, match="at least one page"):
        PagePool(0)


def test_no_more_pages_are_cached_than_may_be():
    pool, forgotten = PagePool(6, max_cached=2), []
    pages = pool.allocate(5)
    for page in pages:
        pool.keep(page, forgotten.append)
    pool.release(pages[:3])
    assert (pool.num_cached, pool.num_free, pool.num_held) == (2, 2, 2)
    assert forgotten == [pages[2]], "the deepest of a chain goes first"
    pool.pin([pages[0]])
    pool.release(pages[3:])
    assert forgotten == [pages[2], pages[1], pages[4]]
    assert pool.is_cached_pinned(pages[0])
    pool.check_integrity()
    pool.evict_all()
    assert (pool.num_cached, pool.num_free) == (0, 6)
    pool.check_integrity()


def test_a_pool_that_caches_nothing_frees_what_is_released():
    pool = PagePool(3, max_cached=0)
    pages = pool.allocate(3)
    for page in pages:
        pool.keep(page, lambda page: None)
    pool.release(pages)
    assert (pool.num_cached, pool.num_free) == (0, 3)
    pool.check_integrity()
