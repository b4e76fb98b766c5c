"""The scheduler in exact steps: budgets, order, ends, log-probabilities of prompts, refusals."""

from __future__ import annotations

import pytest

from engine.errors import ConfigError, RequestError
from engine.plan import StepResults
from engine.request import RequestStatus
from engine.scheduler import SchedulerSettings
from tests.engine.host import logprob_at, make_request, make_scheduler, next_token, pretend, run, shape, step

# -- one counter toward another --------------------------------------------------------------------


def test_a_prompt_is_computed_in_chunks_and_then_token_by_token():
    scheduler = make_scheduler(max_num_batched_tokens=8)
    request = make_request("a", range(20), max_tokens=3)
    scheduler.add(request)
    plans = []
    while scheduler.has_unfinished:
        plans.append(step(scheduler)[0])
    assert [shape(plan) for plan in plans] == [
        [("a", 0, 8)], [("a", 8, 8)], [("a", 16, 4)], [("a", 20, 1)], [("a", 21, 1)]
    ]  # fmt: skip
    assert [plan.rows[0].samples for plan in plans] == [False, False, True, True, True]
    assert [plan.num_logits for plan in plans] == [0, 0, 1, 1, 1]
    assert request.finish_reason == "length"
    expected: list[int] = []
    for _ in range(3):
        expected.append(next_token([*range(20), *expected]))
    assert request.output_token_ids == expected


def test_page_ids_cover_the_row_and_grow_only_when_a_page_is_full():
    scheduler = make_scheduler()
    scheduler.add(make_request("a", range(6), max_tokens=5))
    pages = []
    while scheduler.has_unfinished:
        plan = scheduler.schedule()
        pages.append(list(plan.rows[0].page_ids))
        scheduler.update(plan, pretend(plan))
    assert pages == [[0, 1], [0, 1], [0, 1], [0, 1, 2], [0, 1, 2]]


def test_running_requests_come_first_and_single_tokens_before_chunks():
    scheduler = make_scheduler(max_num_batched_tokens=8)
    scheduler.add(make_request("long", range(100, 112)))
    scheduler.add(make_request("b", range(3)))
    assert shape(step(scheduler)[0]) == [("long", 0, 8)]
    assert shape(step(scheduler)[0]) == [("long", 8, 4), ("b", 0, 3)]
    scheduler.add(make_request("c", range(50, 63)))
    assert shape(step(scheduler)[0]) == [("long", 12, 1), ("b", 3, 1), ("c", 0, 6)]
    scheduler.add(make_request("d", [7]))
    assert shape(step(scheduler)[0]) == [("long", 13, 1), ("b", 4, 1), ("c", 6, 6)]
    # c's last token is a chunk of one; d has one token; both come with the single ones.
    assert shape(step(scheduler)[0]) == [("long", 14, 1), ("b", 5, 1), ("c", 12, 1), ("d", 0, 1)]


def test_the_number_of_running_requests_is_bounded():
    scheduler = make_scheduler(max_num_seqs=2)
    for name in "abc":
        scheduler.add(make_request(name, [ord(name)], max_tokens=2))
    assert shape(step(scheduler)[0]) == [("a", 0, 1), ("b", 0, 1)]
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 1)
    step(scheduler)
    assert shape(step(scheduler)[0]) == [("c", 0, 1)]


def test_a_long_prompt_leaves_room_for_others():
    scheduler = make_scheduler(long_prefill_token_threshold=6)
    scheduler.add(make_request("long", range(100, 120)))
    scheduler.add(make_request("b", range(5)))
    assert shape(step(scheduler)[0]) == [("long", 0, 6), ("b", 0, 5)]
    assert shape(step(scheduler)[0]) == [("b", 5, 1), ("long", 6, 6)]


def test_a_step_with_nothing_to_do_has_no_rows():
    scheduler = make_scheduler()
    plan = scheduler.schedule()
    assert plan.rows == ()
    assert (plan.num_tokens, plan.num_logits, plan.preempted) == (0, 0, ())
    assert scheduler.update(plan, StepResults([])) == []


def test_priority_comes_before_age_only_when_asked_for():
    for policy, order in (("fcfs", ["a", "b", "c"]), ("priority", ["c", "b", "a"])):
        scheduler = make_scheduler(max_num_seqs=1, policy=policy)
        for name, priority in (("a", 2), ("b", 1), ("c", 0)):
            scheduler.add(make_request(name, [ord(name)], max_tokens=1, priority=priority))
        assert [request.request_id for request in run(scheduler)] == order


def test_planning_again_without_an_update_plans_the_same():
    scheduler = make_scheduler(max_num_batched_tokens=8)
    scheduler.add(make_request("a", range(12)))
    first = shape(scheduler.schedule())
    assert shape(scheduler.schedule()) == first
    scheduler.check_integrity()


def test_planning_again_gives_back_the_pages_of_a_longer_chunk():
    scheduler = make_scheduler(max_num_batched_tokens=12, policy="priority")
    scheduler.add(make_request("late", range(20, 40), priority=1, max_tokens=1))
    step(scheduler)
    scheduler.add(make_request("urgent", range(9), priority=0))
    assert shape(scheduler.schedule()) == [("late", 12, 8), ("urgent", 0, 4)]
    plan = scheduler.schedule()
    assert shape(plan) == [("urgent", 0, 9), ("late", 12, 3)]
    assert [len(row.page_ids) for row in plan.rows] == [3, 4]
    scheduler.check_integrity()


# -- ends ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampling", "fields", "tokens", "reason", "stop_reason"),
    [
        ({}, {}, [5, 5, 5, 5], "length", None),
        ({}, {"eos_token_ids": frozenset({5})}, [5], "stop", None),
        ({"ignore_eos": True}, {"eos_token_ids": frozenset({5})}, [5, 5, 5, 5], "length", None),
        ({"stop_token_ids": [4, 5]}, {}, [5], "stop", 5),
        ({"stop_token_ids": [5], "ignore_eos": True}, {"eos_token_ids": frozenset({5})}, [5], "stop", 5),
        ({"min_tokens": 3}, {"eos_token_ids": frozenset({5})}, [5, 5, 5], "stop", None),
        ({"min_tokens": 2, "stop_token_ids": [5]}, {}, [5, 5], "stop", 5),
        ({"min_tokens": 4, "stop_token_ids": [5]}, {}, [5, 5, 5, 5], "stop", 5),
        ({}, {"max_total_len": 8}, [5, 5], "length", None),
    ],
)
def test_why_a_request_ends(
    sampling: dict, fields: dict, tokens: list[int], reason: str, stop_reason: int | None
):
    scheduler = make_scheduler()
    request = make_request("a", range(6), sampling=sampling, **fields)
    scheduler.add(request)
    finished = []
    while scheduler.has_unfinished:
        finished += step(scheduler, {"a": 5})[1]
    assert finished == [request]
    assert request.is_finished
    assert request.output_token_ids == tokens
    assert (request.finish_reason, request.stop_reason) == (reason, stop_reason)
    assert request.page_ids == []
    assert scheduler.stats().num_held_pages == 0


def test_a_stop_found_in_the_text_ends_a_request_once():
    scheduler = make_scheduler()
    request, other = make_request("a", range(6)), make_request("b", range(50, 56))
    scheduler.add(request)
    scheduler.add(other)
    step(scheduler)
    scheduler.finish(request, "stop", "END", now=9.0)
    scheduler.check_integrity()
    assert (request.finish_reason, request.stop_reason, request.finished_time) == ("stop", "END", 9.0)
    assert scheduler.num_running == 1
    with pytest.raises(ValueError, match="has finished before, by 'stop'"):
        scheduler.finish(request, "abort")
    assert scheduler.abort("a") == []
    with pytest.raises(ValueError, match="not in this scheduler"):
        scheduler.finish(make_request("b", range(6)), "abort")
    assert run(scheduler) == [other]


def test_abort_ends_all_samples_wherever_they_are_and_frees_their_pages():
    scheduler = make_scheduler(max_num_seqs=2)
    for index in range(4):
        scheduler.add(make_request("a", range(9), sample_index=index))
    step(scheduler)
    plan = scheduler.schedule()
    aborted = scheduler.abort("a")
    scheduler.check_integrity()
    assert [request.sample_index for request in aborted] == [0, 1, 2, 3]
    assert {request.status for request in aborted} == {RequestStatus.FINISHED}
    assert scheduler.update(plan, pretend(plan)) == []
    assert not scheduler.has_unfinished
    assert (scheduler.num_waiting, scheduler.num_running, scheduler.stats().num_held_pages) == (0, 0, 0)
    assert scheduler.schedule().rows == ()
    assert scheduler.abort("a") == scheduler.abort("never seen") == []


def test_times_are_those_the_caller_passed():
    scheduler = make_scheduler(max_num_seqs=1)
    request = make_request("a", range(20), max_tokens=2)
    scheduler.add(request, now=1.0)
    for now in (2.0, 4.0, 6.0):
        plan = scheduler.schedule(now)
        scheduler.update(plan, pretend(plan), now + 1)
    assert request.arrival_time == 1.0
    assert request.first_scheduled_time == 2.0
    assert request.first_token_time == 5.0
    assert request.finished_time == 7.0


# -- log-probabilities of prompts ------------------------------------------------------------------


def expected_prompt_logprobs(prompt_len: int, request) -> list[float]:
    return [logprob_at(request, position) for position in range(1, prompt_len)]


def test_prompt_logprobs_take_chunks_that_fit_the_logits_of_a_step():
    scheduler = make_scheduler(max_num_seqs=4, max_num_batched_tokens=16)
    request = make_request("a", range(10), sampling={"prompt_logprobs": 1})
    scheduler.add(request)
    plans = [step(scheduler)[0] for _ in range(3)]
    assert [shape(plan) for plan in plans] == [[("a", 0, 4)], [("a", 4, 4)], [("a", 8, 2)]]
    assert [plan.num_logits for plan in plans] == [4, 4, 2]
    assert [plan.rows[0].num_prompt_logprobs for plan in plans] == [4, 4, 1]
    run(scheduler)
    assert request.prompt_logprobs == expected_prompt_logprobs(10, request)
    assert request.prompt_top_logprobs == [((position, -1.0),) for position in range(9)]


def test_prompt_logprobs_leave_every_running_request_its_logit():
    scheduler = make_scheduler(max_num_seqs=4)
    for name in "abc":
        scheduler.add(make_request(name, [ord(name)], max_tokens=9))
    step(scheduler)
    scheduler.add(make_request("p", range(8), sampling={"prompt_logprobs": 0}))
    plan, _ = step(scheduler)
    assert shape(plan) == [("a", 1, 1), ("b", 1, 1), ("c", 1, 1), ("p", 0, 1)]
    assert plan.num_logits == 4


def test_prompt_logprobs_do_not_read_the_cache_but_fill_it():
    scheduler = make_scheduler(max_num_seqs=16)
    first = make_request("a", range(9), max_tokens=1, sampling={"prompt_logprobs": 0})
    scheduler.add(first)
    run(scheduler)
    second = make_request("b", range(9), max_tokens=1, sampling={"prompt_logprobs": 0})
    scheduler.add(second)
    assert shape(step(scheduler)[0]) == [("b", 0, 9)]
    assert second.prompt_logprobs == first.prompt_logprobs
    assert second.num_cached_tokens == 0
    scheduler.add(make_request("c", range(9), max_tokens=1))
    assert shape(step(scheduler)[0]) == [("c", 8, 1)]


def test_prompt_logprobs_are_recorded_once_though_the_prompt_is_computed_again():
    scheduler = make_scheduler(num_pages=7, policy="priority", long_prefill_token_threshold=1)
    request = make_request("p", range(15), max_tokens=8, priority=5, sampling={"prompt_logprobs": 0})
    scheduler.add(request)
    step(scheduler)
    scheduler.add(make_request("urgent", [77], max_tokens=20, priority=0))
    num_recorded = []
    while scheduler.has_unfinished:
        plan, _ = step(scheduler)
        assert plan.num_logits <= 4
        num_recorded += [len(request.prompt_logprobs)] * len(plan.preempted)
    assert 0 < num_recorded[0] < 14  # it lost its pages in the middle of its prompt
    assert request.prompt_logprobs == expected_prompt_logprobs(15, request)
    assert len(request.output_logprobs) == 8


def test_prompt_logprobs_known_before_a_preemption_need_no_logits_again():
    scheduler = make_scheduler(max_num_seqs=4, enable_prefix_caching=False)
    request = make_request("a", range(20), sampling={"prompt_logprobs": 0})
    for position in range(8):
        request.prompt_logprobs.append(logprob_at(request, position + 1))
    scheduler.add(request)
    plan, _ = step(scheduler)
    assert shape(plan) == [("a", 0, 12)]
    assert plan.num_logits == 4
    run(scheduler)
    assert request.prompt_logprobs == expected_prompt_logprobs(20, request)


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "reason", "numbers"),
    [
        (make_request("a", [], max_tokens=1), "empty_prompt", ["0 tokens"]),
        (make_request("a", range(64), max_total_len=64), "prompt_too_long", ["64"]),
        (
            make_request("a", range(20), max_tokens=44),
            "request_too_large",
            ["64 tokens", "16 pages", "are 8"],
        ),
    ],
)
def test_a_request_that_can_never_run_is_refused_with_the_numbers(request_, reason: str, numbers: list[str]):
    scheduler = make_scheduler(num_pages=8)
    with pytest.raises(RequestError) as caught:
        scheduler.add(request_)
    assert caught.value.reason == reason
    assert all(number in str(caught.value) for number in numbers)
    assert "\n" not in str(caught.value)
    assert not scheduler.has_unfinished


def test_an_id_in_use_is_refused_until_it_is_free():
    scheduler = make_scheduler()
    scheduler.add(make_request("a", [1], max_tokens=1))
    with pytest.raises(RequestError, match="unfinished already") as caught:
        scheduler.add(make_request("a", [2]))
    assert caught.value.reason == "duplicate_request_id"
    run(scheduler)
    scheduler.add(make_request("a", [2]))
    assert scheduler.num_waiting == 1


@pytest.mark.parametrize("max_total_len", [3, 65])
def test_a_total_length_that_contradicts_the_limits_is_refused(max_total_len: int):
    with pytest.raises(ValueError, match="max_total_len"):
        make_scheduler().add(make_request("a", range(3), max_total_len=max_total_len))


def test_a_request_that_ran_before_is_refused():
    scheduler = make_scheduler()
    request = make_request("a", [1], max_tokens=1)
    scheduler.add(request)
    run(scheduler)
    with pytest.raises(ValueError, match="before"):
        scheduler.add(request)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
        ({"page_size": 0}, "page_size is 0"),
        ({"num_pages": -1}, "num_pages is -1"),
        ({"max_num_batched_tokens": 3}, "must be at least max_num_seqs"),
        ({"max_model_len": 1}, "max_model_len is 1"),
        ({"policy": "lifo"}, "policy is 'lifo'"),
        ({"long_prefill_token_threshold": 0}, "long_prefill_token_threshold is 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        make_scheduler(**settings)
    assert SchedulerSettings.__dataclass_params__.frozen  # type: ignore[attr-defined]


def test_results_that_do_not_fit_the_plan_are_refused():
    scheduler = make_scheduler()
    scheduler.add(make_request("a", range(4), sampling={"prompt_logprobs": 0}))
    plan = scheduler.schedule()
    with pytest.raises(ValueError, match="0 results came for 1 rows"):
        scheduler.update(plan, StepResults([]))
    with pytest.raises(ValueError, match="3 prompt log-probabilities were asked for, 0 came"):
        scheduler.update(plan, StepResults([1]))


def test_missing_log_probabilities_of_a_chunk_that_draws_nothing_are_refused():
    scheduler = make_scheduler(long_prefill_token_threshold=2)
    scheduler.add(make_request("a", range(6), sampling={"prompt_logprobs": 0}))
    plan = scheduler.schedule()
    assert not plan.rows[0].samples
    with pytest.raises(ValueError, match="2 prompt log-probabilities were asked for, 0 came"):
        scheduler.update(plan, StepResults([None]))


def test_a_missing_token_is_refused():
    scheduler = make_scheduler()
    scheduler.add(make_request("a", range(4)))
    plan = scheduler.schedule()
    with pytest.raises(ValueError, match="no token came"):
        scheduler.update(plan, StepResults([None]))


def test_a_plan_is_good_for_one_update():
    scheduler = make_scheduler()
    scheduler.add(make_request("a", range(4)))
    plan = scheduler.schedule()
    scheduler.update(plan, pretend(plan))
    with pytest.raises(ValueError, match="not the last one"):
        scheduler.update(plan, StepResults([1]))
