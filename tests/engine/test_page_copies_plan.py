"""A prompt that goes on like a known page for a while copies that while, whatever the page size."""

from __future__ import annotations

import pytest

from engine.admission import MAX_LOOKED_UP
from engine.plan import PageCopy
from tests.engine.host import make_request, make_scheduler, pretend, run, shape, step

TEMPLATE = range(250)


@pytest.mark.parametrize("page_size", [8, 16, 64, 128, 256, 512])
def test_a_template_is_computed_once_at_any_page_size(page_size: int):
    scheduler = make_scheduler(
        max_num_seqs=64,
        max_num_batched_tokens=2048,
        max_model_len=512,
        page_size=page_size,
        num_pages=64 * 512 // page_size,
    )
    requests = [make_request(f"r{index}", [*TEMPLATE, 1000 + index, 7, 8]) for index in range(64)]
    for request in requests:
        scheduler.add(request)
    plans = [step(scheduler)[0] for _ in range(2)]
    assert shape(plans[0]) == [("r0", 0, 253)]
    assert sorted(shape(plans[1])[1:]) == sorted((f"r{index}", 250, 3) for index in range(1, 64))
    assert {copy.num_tokens for copy in plans[1].copies} == {250 % page_size}
    assert [request.num_cached_tokens for request in requests] == [0, *[250] * 63]
    run(scheduler)
    # Later ones find it too, although nobody runs.
    late = make_request("late", [*TEMPLATE, 5])
    scheduler.add(late)
    assert shape(step(scheduler)[0]) == [("late", 250, 1)]


def test_samples_of_a_prompt_compute_its_last_token_alone():
    for prompt_len in (23, 24, 25):
        scheduler = make_scheduler(max_num_batched_tokens=32, page_size=8)
        for index in range(4):
            scheduler.add(make_request("a", range(prompt_len), sample_index=index))
        assert shape(step(scheduler)[0]) == [("a", 0, prompt_len)]
        last = prompt_len - 1
        assert shape(step(scheduler)[0]) == [("a", prompt_len, 1), *[("a", last, 1)] * 3]


def test_a_token_in_common_is_neither_waited_for_nor_copied():
    scheduler = make_scheduler(max_num_batched_tokens=64)
    for name in "abc":
        scheduler.add(make_request(name, [1, ord(name), 3]))
    assert shape(step(scheduler)[0]) == [("a", 0, 3), ("b", 0, 3), ("c", 0, 3)]
    scheduler.add(make_request("d", [1, 2, 3]))
    plan, _ = step(scheduler)
    assert ("d", 0, 3) in shape(plan)
    assert plan.copies == ()


def test_the_page_to_be_copied_is_held_until_the_step_is_dispatched():
    scheduler = make_scheduler(min_shared_tokens=1, num_pages=4)
    scheduler.add(make_request("a", range(3), max_tokens=1))
    run(scheduler)
    scheduler.add(make_request("b", [0, 1, 9], max_tokens=1))
    plan = scheduler.schedule()
    assert plan.copies == (PageCopy(0, 1, 2),)
    assert shape(plan) == [("b", 2, 1)]
    assert scheduler.stats().num_held_pages == 2
    # The plan is given up: the next one still has to make the copy.
    assert scheduler.schedule().copies == (PageCopy(0, 1, 2),)
    again = scheduler.schedule()
    scheduler.update(again, pretend(again))
    assert scheduler.stats().num_held_pages == 0


def test_an_aborted_request_is_copied_for_no_more_and_leaves_nothing_behind():
    scheduler = make_scheduler(min_shared_tokens=1, num_pages=4)
    scheduler.add(make_request("a", range(3), max_tokens=1))
    run(scheduler)
    scheduler.add(make_request("b", [0, 1, 9], max_tokens=1))
    scheduler.schedule()
    scheduler.abort("b")
    scheduler.check_integrity()
    assert scheduler.stats().num_held_pages == 0
    assert scheduler.stats().num_cached_pages == 1  # b's page holds nothing yet, so nobody may find it
    assert scheduler.schedule().copies == ()


def test_without_room_to_hold_the_source_nothing_is_copied():
    scheduler = make_scheduler(min_shared_tokens=1, num_pages=2, max_num_seqs=1)
    scheduler.add(make_request("a", range(3), max_tokens=1))
    run(scheduler)
    scheduler.add(make_request("b", [0, 1, 9], max_tokens=3))
    plan, _ = step(scheduler)
    assert plan.copies == ()
    assert shape(plan) == [("b", 0, 3)]


def test_looking_up_those_who_wait_is_bounded_and_nobody_is_forgotten(monkeypatch: pytest.MonkeyPatch):
    """Sixty wait for one long prompt: each is looked up once or twice, not at every step."""
    scheduler = make_scheduler(
        max_num_seqs=64, max_num_batched_tokens=64, max_model_len=512, page_size=16, num_pages=2048
    )
    assert scheduler.cache is not None
    match, looked_up = scheduler.cache.match, []
    monkeypatch.setattr(
        scheduler.cache, "match", lambda request, most: looked_up.append(request) or match(request, most)
    )
    for index in range(60):
        scheduler.add(make_request(f"r{index}", [*TEMPLATE, 1000 + index], max_tokens=2))
    scheduler.add(make_request("other", range(5000, 5004), max_tokens=2))
    assert [shape(step(scheduler)[0]) for _ in range(3)] == [[("r0", at, 64)] for at in (0, 64, 128)]
    plan, _ = step(scheduler)  # the last 59 tokens, with room for others: those at the head of the line
    assert shape(plan)[0] == ("r0", 192, 59)
    assert len(looked_up) == 1 + MAX_LOOKED_UP
    plan, _ = step(scheduler)
    assert shape(plan)[:3] == [("r0", 251, 1), ("r1", 250, 1), ("r2", 250, 1)]
    assert len(run(scheduler)) == 60  # all but r0, which ended in that step
    assert len(looked_up) <= 2 * 61
