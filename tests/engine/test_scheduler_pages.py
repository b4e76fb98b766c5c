"""The scheduler and its pages: prefixes that are shared, and who gives way when pages run out."""

from __future__ import annotations

from engine.plan import PageCopy
from tests.engine.host import make_request, make_scheduler, next_token, pretend, run, shape, step

# -- shared prefixes -------------------------------------------------------------------------------


def test_a_shared_prefix_is_computed_once_and_found_by_those_that_waited():
    scheduler = make_scheduler(max_num_batched_tokens=32)
    requests = [make_request(name, [*range(9), ord(name)]) for name in "abc"]
    for request in requests:
        scheduler.add(request)
    other = make_request("x", range(50, 55))
    scheduler.add(other)
    # b and c would compute what a is computing: they are passed over, x behind them is not.
    assert shape(step(scheduler)[0]) == [("a", 0, 10), ("x", 0, 5)]
    plan, _ = step(scheduler)
    assert shape(plan) == [("a", 10, 1), ("x", 5, 1), ("b", 9, 1), ("c", 9, 1)]
    assert [list(row.page_ids) for row in plan.rows] == [[0, 1, 2], [3, 4], [0, 1, 5], [0, 1, 6]]
    assert [request.num_cached_tokens for request in (*requests, other)] == [0, 9, 9, 0]
    assert (scheduler.stats().num_prefix_queries, scheduler.stats().num_prefix_hits) == (35, 18)


def test_those_who_wait_for_a_prefix_wait_through_all_its_chunks():
    scheduler = make_scheduler(max_num_batched_tokens=6)
    scheduler.add(make_request("a", [*range(20), 90], max_tokens=1))
    scheduler.add(make_request("b", [*range(20), 91], max_tokens=1))
    assert [shape(step(scheduler)[0]) for _ in range(5)] == [
        [("a", 0, 6)], [("a", 6, 6)], [("a", 12, 6)], [("a", 18, 3)], [("b", 20, 1)]
    ]  # fmt: skip


def test_a_page_is_waited_for_even_when_a_chunk_ends_inside_it():
    scheduler = make_scheduler(long_prefill_token_threshold=2)
    for name in "ab":
        scheduler.add(make_request(name, [*range(4), ord(name)]))
    assert [shape(step(scheduler)[0]) for _ in range(3)] == [
        [("a", 0, 2)], [("a", 2, 2)], [("a", 4, 1), ("b", 4, 1)]
    ]  # fmt: skip


def test_samples_of_one_prompt_share_its_pages():
    scheduler = make_scheduler()
    for index in range(3):
        scheduler.add(make_request("a", range(10), sample_index=index))
    assert shape(step(scheduler)[0]) == [("a", 0, 10)]
    plan, _ = step(scheduler)
    assert shape(plan) == [("a", 10, 1), ("a", 9, 1), ("a", 9, 1)]
    assert [list(row.page_ids)[:2] for row in plan.rows] == [[0, 1]] * 3


def test_a_full_hit_still_computes_the_last_token_in_a_page_of_its_own():
    scheduler = make_scheduler()
    scheduler.add(make_request("a", range(8), max_tokens=1))
    run(scheduler)
    scheduler.add(make_request("b", range(8), max_tokens=1))
    plan = scheduler.schedule()
    assert shape(plan) == [("b", 7, 1)]
    assert list(plan.rows[0].page_ids) == [0, 2]
    assert plan.copies == (PageCopy(1, 2, 3),)
    # Once computed, page 2 holds what page 1 does: the cached one stays, the copy is free again.
    scheduler.update(plan, pretend(plan))
    assert (scheduler.stats().num_free_pages, scheduler.stats().num_cached_pages) == (30, 2)


def test_generated_pages_are_shared_too():
    scheduler = make_scheduler()
    first = make_request("a", range(4), max_tokens=6)
    scheduler.add(first)
    run(scheduler)
    scheduler.add(make_request("b", [*range(4), *first.output_token_ids, 7], max_tokens=1))
    # The last of the six was drawn and never computed.
    assert shape(step(scheduler)[0]) == [("b", 9, 2)]


def test_when_the_owner_of_a_prefix_is_aborted_another_computes_it():
    scheduler = make_scheduler(max_num_batched_tokens=8)
    for name in "ab":
        scheduler.add(make_request(name, range(16)))
    assert shape(step(scheduler)[0]) == [("a", 0, 8)]
    plan = scheduler.schedule()
    assert shape(plan) == [("a", 8, 8)]
    [aborted] = scheduler.abort("a")
    assert scheduler.update(plan, pretend(plan)) == []
    assert (aborted.finish_reason, aborted.output_token_ids) == ("abort", [])
    assert shape(step(scheduler)[0]) == [("b", 8, 8)]


def test_without_a_cache_nothing_is_shared_and_nobody_waits():
    scheduler = make_scheduler(enable_prefix_caching=False)
    for name in "ab":
        scheduler.add(make_request(name, range(8)))
    assert shape(step(scheduler)[0]) == [("a", 0, 8), ("b", 0, 8)]
    run(scheduler)
    assert scheduler.stats().num_cached_pages == 0
    assert scheduler.stats().num_prefix_queries == 0


def test_salted_requests_share_only_among_themselves():
    scheduler = make_scheduler(max_num_batched_tokens=32)
    for name, salt in (("a", "x"), ("b", "y"), ("c", "x")):
        scheduler.add(make_request(name, range(8), cache_salt=salt))
    assert shape(step(scheduler)[0]) == [("a", 0, 8), ("b", 0, 8)]
    assert shape(step(scheduler)[0]) == [("a", 8, 1), ("b", 8, 1), ("c", 7, 1)]


def test_an_urgent_request_does_not_wait_for_what_a_less_urgent_one_computes():
    scheduler = make_scheduler(policy="priority", max_num_batched_tokens=12)
    scheduler.add(make_request("later", range(17), priority=2))
    scheduler.schedule()
    scheduler.add(make_request("urgent", range(17), priority=0))
    scheduler.add(make_request("patient", range(17), priority=3))
    assert shape(step(scheduler)[0]) == [("later", 0, 12)]
    # "later" runs, so it goes on first; there is room for one more; "patient" waits for what both compute.
    assert shape(step(scheduler)[0]) == [("later", 12, 5), ("urgent", 12, 5)]
    assert shape(step(scheduler)[0]) == [("urgent", 17, 1), ("later", 17, 1), ("patient", 16, 1)]


def test_pinned_pages_are_left_alone_while_others_run():
    """Six pages: two are pinned and cached, "a" takes two. Another two would fit, but for the last one."""
    for is_pinned in (True, False):
        scheduler = make_scheduler(num_pages=6)
        assert scheduler.cache is not None
        if is_pinned:
            scheduler.cache.pin(range(8), None)
        scheduler.add(make_request("past", range(8), max_tokens=1))
        run(scheduler)
        assert scheduler.pool.num_cached_pinned == (2 if is_pinned else 0)
        scheduler.add(make_request("a", range(50, 55), max_tokens=3))
        scheduler.add(make_request("b", range(60, 69), max_tokens=3))
        assert len(step(scheduler)[0].rows) == (1 if is_pinned else 2)
        # One that wants the pinned pages may have them, and nobody waits for ever.
        scheduler.add(make_request("c", [*range(8), 9], max_tokens=1))
        assert {request.request_id for request in run(scheduler)} == {"a", "b", "c"}


# -- out of pages ----------------------------------------------------------------------------------


def test_out_of_pages_the_youngest_gives_way_and_its_output_is_kept():
    scheduler = make_scheduler(num_pages=6, enable_prefix_caching=False)
    old, young = make_request("old", range(7), max_tokens=10), make_request("young", range(7), max_tokens=6)
    scheduler.add(old)
    assert shape(step(scheduler)[0]) == [("old", 0, 7)]
    scheduler.add(young)
    plans = []
    while scheduler.has_unfinished:
        plans.append(step(scheduler)[0])
    [preempting] = [plan for plan in plans if plan.preempted]
    assert preempting.preempted == (young,)
    assert [row.request for row in preempting.rows] == [old]
    assert young.num_preemptions == 1
    for request in (old, young):
        expected: list[int] = []
        while len(expected) < request.sampling.max_tokens:
            expected.append(next_token([*range(7), *expected]))
        assert request.output_token_ids == expected
        assert len(request.output_logprobs) == len(expected)
    assert scheduler.stats().num_held_pages == 0


def test_a_preempted_request_finds_its_own_pages_again():
    scheduler = make_scheduler(num_pages=6, max_num_seqs=2)
    scheduler.add(make_request("old", range(100, 107), max_tokens=10))
    scheduler.add(make_request("young", range(7), max_tokens=10))
    starts = []
    for _ in range(30):
        plan, _ = step(scheduler)
        starts += [row.start for row in plan.rows if row.request.num_preemptions and row.num_tokens > 1]
    assert scheduler.stats().num_preemptions >= 1
    assert starts
    assert max(starts) >= 4
    assert not scheduler.has_unfinished


def test_the_least_urgent_gives_way_even_when_it_is_older():
    scheduler = make_scheduler(num_pages=6, policy="priority", enable_prefix_caching=False)
    scheduler.add(make_request("old", range(7), max_tokens=12, priority=5))
    step(scheduler)
    scheduler.add(make_request("urgent", range(7), max_tokens=12, priority=1))
    preempted = []
    while scheduler.has_unfinished:
        preempted += [request.request_id for request in step(scheduler)[0].preempted]
    assert preempted
    assert set(preempted) == {"old"}


def test_a_row_already_planned_is_taken_back_when_its_request_gives_way():
    """The young one decodes, so it is planned before the old one's chunk, which then needs its pages."""
    scheduler = make_scheduler(num_pages=11, long_prefill_token_threshold=2, enable_prefix_caching=False)
    old, young = make_request("old", range(31), max_tokens=2), make_request("young", [7], max_tokens=20)
    scheduler.add(old)
    scheduler.add(young)
    for computed in range(0, 28, 2):
        assert ("old", computed, 2) in shape(step(scheduler)[0])
    plan, _ = step(scheduler)
    assert plan.preempted == (young,)
    assert shape(plan) == [("old", 28, 2)]
    assert [request.num_output_tokens for request in run(scheduler)] == [2, 20]


def test_a_running_request_takes_cached_pages_before_those_of_others():
    scheduler = make_scheduler(num_pages=6)
    scheduler.add(make_request("past", range(50, 58), max_tokens=1))
    run(scheduler)
    assert scheduler.stats().num_cached_pages == 2
    for name in "ab":
        scheduler.add(make_request(name, [ord(name)] * 3, max_tokens=9))
    run(scheduler)
    assert scheduler.stats().num_preemptions == 0
    assert scheduler.stats().num_evictions == 2


def test_a_request_is_admitted_only_into_room_that_running_ones_do_not_need():
    scheduler = make_scheduler(num_pages=6, long_prefill_token_threshold=8, enable_prefix_caching=False)
    scheduler.add(make_request("long", range(16), max_tokens=4))
    scheduler.add(make_request("b", range(4), max_tokens=4))
    # Four pages are free, but "long" will need three more and b needs two: it waits.
    assert shape(step(scheduler)[0]) == [("long", 0, 8)]
    assert scheduler.stats().num_free_pages == 4
    assert shape(step(scheduler)[0]) == [("long", 8, 8)]
    run(scheduler)
    assert scheduler.stats().num_preemptions == 0


def test_requests_admitted_in_one_step_leave_one_another_room():
    scheduler = make_scheduler(num_pages=5, enable_prefix_caching=False)
    for name in "ab":
        scheduler.add(make_request(name, range(8)))
    # Three pages are left, enough for b's two and one more, but a will need one of them.
    assert shape(step(scheduler)[0]) == [("a", 0, 8)]
    run(scheduler)
    assert scheduler.stats().num_preemptions == 0
