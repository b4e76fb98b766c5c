"""Who starts next: fairness between tenants, bounds on waiting, places taken from the less urgent.

Counted in steps of a scheduler whose device costs nothing.
"""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ConfigError
from engine.plan import PlannedRow, StepPlan
from engine.request import Request, RequestStatus
from engine.scheduler import Scheduler
from engine.waiting_queue import WaitingQueue
from tests.engine.host import make_request, make_scheduler, overlapped_step, pretend, run, step


def add(scheduler: Scheduler, name: str, tenant: str | None, count: int = 1, **fields) -> list[Request]:
    """Requests of prompts that have nothing in common."""
    prompt_len = fields.pop("prompt_len", 4)
    added = []
    for index in range(count):
        prompt = [hash((name, index)) % 900 + 1, *range(1, prompt_len)]
        added.append(make_request(f"{name}{index}", prompt, tenant=tenant, **fields))
        scheduler.add(added[-1])
    return added


def quick_step(scheduler: Scheduler) -> StepPlan:
    """A step after which nothing is checked, where a thousand wait."""
    plan = scheduler.schedule()
    scheduler.update(plan, pretend(plan))
    return plan


def steps_until(scheduler: Scheduler, request: Request, limit: int = 2000) -> int:
    """Steps until it runs or has run."""
    for num_steps in range(limit):
        if request.status is not RequestStatus.WAITING:
            return num_steps
        quick_step(scheduler)
    raise AssertionError(f"{request.request_id} still waits after {limit} steps")


def num_served(row: PlannedRow) -> int:
    """Tokens of the prompt that it computes, and the one that it draws."""
    return max(0, min(row.stop, row.request.prompt_len) - row.start) + row.samples


# -- tenants -----------------------------------------------------------------------------------------------


def test_a_thousand_waiting_do_not_keep_one_of_another_tenant_waiting():
    """It starts with the next seat that becomes free, however long the other's queue is."""
    scheduler = make_scheduler(max_num_seqs=4, num_pages=64)
    add(scheduler, "many", "a", 1000)
    for _ in range(10):
        step(scheduler)
    (one,) = add(scheduler, "one", "b")
    assert steps_until(scheduler, one) <= 4 + 1  # a request here takes 4 steps
    alone = make_scheduler(max_num_seqs=4, num_pages=64)
    many = add(alone, "many", "a", 1000)
    assert many[999].tenant == "a"
    (late,) = add(alone, "one", "a")  # of the same tenant it is the last in the queue
    assert steps_until(alone, late) > 900


def test_a_tenants_many_keys_of_work_are_served_alike():
    """Tenants that all have work waiting get equal tokens, within a request a seat."""
    scheduler = make_scheduler(max_num_seqs=4, num_pages=64, max_num_batched_tokens=32)
    add(scheduler, "short", "a", 400, max_tokens=2)
    add(scheduler, "long", "b", 400, max_tokens=10)
    add(scheduler, "wide", "c", 400, max_tokens=2, prompt_len=16)
    served: Counter[str] = Counter()
    for _ in range(300):
        for row in quick_step(scheduler).rows:
            served[row.request.tenant or ""] += num_served(row)
    assert max(served.values()) - min(served.values()) <= 4 * 18
    assert min(served.values()) > 300


def test_one_that_asked_for_nothing_has_saved_up_no_turns():
    scheduler = make_scheduler(max_num_seqs=1, num_pages=64)
    add(scheduler, "early", "b")
    add(scheduler, "busy", "a", 400)
    for _ in range(400):
        quick_step(scheduler)
    add(scheduler, "again", "b", 400)
    served: Counter[str] = Counter()
    for _ in range(100):
        for row in quick_step(scheduler).rows:
            served[row.request.tenant or ""] += num_served(row)
    assert abs(served["a"] - served["b"]) <= 16


def test_requests_of_one_tenant_start_by_age():
    scheduler = make_scheduler(max_num_seqs=1, num_pages=64)
    requests = add(scheduler, "r", "a", 20)
    add(scheduler, "s", "b", 20)
    finished = [request for request in run(scheduler) if request.tenant == "a"]
    assert finished == requests


def test_without_tenants_nothing_is_reckoned():
    scheduler = make_scheduler()
    requests = add(scheduler, "r", None, 30)
    assert run(scheduler) == requests
    assert all(request.num_charged == 0 for request in requests)


# -- levels ------------------------------------------------------------------------------------------------


def test_priorities_are_overtaken_for_a_bounded_number_of_steps():
    """One that waits is overtaken by those more urgent by p that come less than p x aging_steps after it."""
    aging_steps, gap = 20, 3
    scheduler = make_scheduler(policy="priority", aging_steps=aging_steps, max_num_seqs=2, num_pages=64)
    add(scheduler, "first", None, 2, priority=0)
    (meek,) = add(scheduler, "meek", None, priority=gap)
    overtaken_by: list[tuple[Request, int]] = []
    for number in range(2000):
        (urgent,) = add(scheduler, f"urgent{number}-", None, priority=0)
        step(scheduler)
        overtaken_by.append((urgent, number))
        if meek.status is not RequestStatus.WAITING:
            break
    else:
        raise AssertionError("it starved")
    started = [number for urgent, number in overtaken_by if urgent.status is not RequestStatus.WAITING]
    assert max(started) <= gap * aging_steps
    # All those together take 4 steps each on 2 seats.
    assert len(overtaken_by) <= 2 * gap * aging_steps + 2 * 4


def test_without_ageing_priorities_are_strict():
    scheduler = make_scheduler(policy="priority", max_num_seqs=2, num_pages=64)
    (meek,) = add(scheduler, "meek", None, priority=1)
    meek_started = False
    for number in range(300):
        add(scheduler, f"urgent{number}-", None, priority=0)
        step(scheduler)
        meek_started |= number > 0 and meek.status is RequestStatus.RUNNING
    assert not meek_started
    with pytest.raises(ConfigError, match="aging_steps is 0"):
        make_scheduler(aging_steps=0)


@given(
    requests=st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from([None, "a", "b"]), st.integers(1, 6)), max_size=30
    ),
    policy=st.sampled_from(["fcfs", "priority"]),
    aging_steps=st.sampled_from([None, 1, 5]),
)
def test_each_is_taken_out_once_and_single_tenants_by_rank(requests, policy, aging_steps):
    settings = make_scheduler(policy=policy, aging_steps=aging_steps).settings
    queue = WaitingQueue(settings)
    made = []
    for arrival, (priority, tenant, wait) in enumerate(requests):
        request = make_request(f"r{arrival}", [5] * wait, priority=priority, tenant=tenant)
        request.arrival = request.arrival_step = arrival
        made.append(request)
        queue.push(request)
    assert set(queue) == set(made)
    taken = []
    while queue:
        taken.append(queue.pop())
        queue.charge_start(taken[-1])
    assert sorted(taken, key=lambda request: request.arrival) == made
    if len({request.tenant for request in made}) == 1:
        assert taken == sorted(made, key=settings.rank)


# -- places of the less urgent -------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [False, True])
def test_seats_are_taken_from_the_least_urgent_and_outputs_do_not_change(overlap):
    def play(policy: str) -> tuple[dict[str, list[int]], list[str], int]:
        scheduler = make_scheduler(policy=policy, max_num_seqs=3, num_pages=64)
        add(scheduler, "meek", None, 3, priority=5, max_tokens=12)
        order: list[str] = []
        outputs: dict[str, list[int]] = {}
        plan = None
        for number in range(200):
            if number == 4:
                add(scheduler, "urgent", None, 2, priority=1, max_tokens=6)
            if overlap:
                plan, finished = overlapped_step(scheduler, plan)
            else:
                _, finished = step(scheduler)
            order += [request.request_id for request in finished]
            outputs |= {request.request_id: request.output_token_ids for request in finished}
            if number > 4 and not scheduler.has_unfinished:
                break
        return outputs, order, scheduler.stats().num_preemptions

    strict, order, num_preemptions = play("priority")
    fair, _, none = play("fcfs")
    assert strict == fair
    assert num_preemptions == 2
    assert none == 0
    assert order[:2] == ["urgent0", "urgent1"]
    assert order[2] == "meek0"  # the oldest of the others has kept its seat


def test_an_urgent_request_starts_at_once_where_seats_are_full():
    scheduler = make_scheduler(policy="priority", max_num_seqs=4, num_pages=64)
    add(scheduler, "meek", None, 4, priority=5, max_tokens=30)
    step(scheduler)
    (urgent,) = add(scheduler, "urgent", None, priority=0)
    plan, _ = step(scheduler)
    assert urgent.status is RequestStatus.RUNNING
    assert [request.request_id for request in plan.preempted] == ["meek3"]
    # The seat that changed hands has one row, its new owner's.
    assert sorted(row.request.request_id for row in plan.rows) == ["meek0", "meek1", "meek2", "urgent0"]


def test_pages_are_taken_from_no_more_than_is_needed_and_only_where_they_are_enough():
    scheduler = make_scheduler(policy="priority", max_num_seqs=6, num_pages=16, max_num_batched_tokens=32)
    meek = add(scheduler, "meek", None, 4, priority=5, prompt_len=8, max_tokens=6)
    step(scheduler)
    step(scheduler)
    (urgent,) = add(scheduler, "urgent", None, priority=0, prompt_len=20, max_tokens=4)
    step(scheduler)
    assert urgent.status is RequestStatus.RUNNING
    preempted = [request for request in meek if request.num_preemptions]
    assert preempted == meek[-len(preempted) :]
    assert 1 <= len(preempted) < 4
    assert len(run(scheduler)) == 5

    scheduler = make_scheduler(policy="priority", max_num_seqs=6, num_pages=16, max_num_batched_tokens=32)
    same = add(scheduler, "same", None, 3, priority=0, prompt_len=12, max_tokens=6)
    (meek_one,) = add(scheduler, "meek", None, priority=5, prompt_len=4, max_tokens=6)
    step(scheduler)
    step(scheduler)
    (urgent,) = add(scheduler, "urgent", None, priority=0, prompt_len=30, max_tokens=4)
    step(scheduler)
    assert urgent.status is RequestStatus.WAITING
    assert meek_one.num_preemptions == 0  # its pages would not have been enough
    assert all(request.num_preemptions == 0 for request in same)
    assert len(run(scheduler)) == 5


def test_one_that_has_waited_for_what_its_priority_is_worth_keeps_its_seat():
    scheduler = make_scheduler(policy="priority", aging_steps=5, max_num_seqs=1, num_pages=64)
    (meek,) = add(scheduler, "meek", None, priority=2, max_tokens=40)
    for _ in range(11):
        step(scheduler)
    (urgent,) = add(scheduler, "urgent", None, priority=0)
    step(scheduler)
    assert meek.status is RequestStatus.RUNNING
    assert urgent.status is RequestStatus.WAITING


def test_equals_are_never_preempted_for_one_another():
    scheduler = make_scheduler(policy="priority", max_num_seqs=2, num_pages=64)
    add(scheduler, "r", None, 6, priority=3, max_tokens=9)
    run(scheduler)
    assert scheduler.stats().num_preemptions == 0
