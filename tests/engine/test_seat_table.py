"""What a step does to all rows at once is what plain loops over the rows would do, one by one."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.plan import PlannedRow, StepPlan, StepResults
from engine.request import Request, RequestStatus
from engine.scheduler import Scheduler
from engine.seat_table import SeatTable
from tests.engine.host import make_request, make_scheduler

END, STOP = 7, 8


@dataclass
class PlainRequest:
    """What is known of a request, kept without the table."""

    request: Request
    output: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_pending: int = 0

    @property
    def remain_len(self) -> int:
        return self.request.prompt_len + len(self.output) + self.num_pending - self.num_computed

    def ends_with(self, token: int) -> str | None:
        sampling = self.request.sampling
        stops = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else (END,))}
        if token in stops and len(self.output) >= sampling.min_tokens:
            return "stop"
        return "length" if len(self.output) >= sampling.max_tokens else None

    def check(self) -> None:
        request = self.request
        assert request.output_token_ids == self.output
        assert request.num_output_tokens == len(self.output)
        assert (request.num_computed, request.num_pending) == (self.num_computed, self.num_pending)
        assert request.remain_len == self.remain_len
        everything = [*request.prompt_token_ids, *self.output]
        assert request.token_ids(0, request.num_tokens) == everything
        assert request.packed_tokens(0, request.num_tokens) == np.array(everything, np.uint32).tobytes()


class PlainRun:
    """A scheduler and beside it the same said with loops."""

    def __init__(self, scheduler: Scheduler, draw: st.DataObject):
        self.scheduler, self.data = scheduler, draw
        self.plain: dict[Request, PlainRequest] = {}
        self.left: set[Request] = set()

    def add(self, request: Request) -> None:
        self.scheduler.add(request)
        self.plain[request] = PlainRequest(request)

    def schedule(self) -> StepPlan:
        running = [r for r in self.plain if r.status is RequestStatus.RUNNING]
        running.sort(key=lambda r: (r.priority, r.arrival))
        decodes = [r for r in running if self.plain[r].remain_len == 1]
        plan = self.scheduler.schedule()
        for request in plan.preempted:
            self.plain[request].num_computed = 0
        decodes = [r for r in decodes if r not in plan.preempted]
        expected = [PlannedRow(r, self.plain[r].num_computed, 1, True, 1, r.page_ids) for r in decodes]
        rows = list(plan.rows)
        assert rows[: len(decodes)] == expected
        for row in rows[len(decodes) :]:
            plain = self.plain[row.request]
            if row.request not in running:  # it starts with what the prefix cache has of it
                plain.num_computed = row.request.num_computed
            assert row.start == plain.num_computed
            assert 1 <= row.num_tokens <= plain.remain_len
            assert row.samples == (row.num_tokens == plain.remain_len)
        assert plan.num_tokens == sum(row.num_tokens for row in rows)
        assert plan.num_logits == sum(row.num_logits for row in rows)
        is_pending = [self.plain[row.request].num_pending == 1 for row in rows]
        assert plan.arrays.is_pending.tolist() == is_pending
        for row, seat in zip(rows, plan.arrays.seats, strict=True):
            if self.plain[row.request].remain_len == 1:
                known = [*row.request.prompt_token_ids, *self.plain[row.request].output]
                if self.plain[row.request].num_pending == 0:
                    assert plan.table.tokens[seat, row.start] == known[row.start]
        return plan

    def advance(self, plan: StepPlan) -> None:
        rows = [row for row in plan.rows if not row.request.is_finished]
        self.scheduler.advance(plan)
        for row in rows:
            plain = self.plain[row.request]
            plain.num_computed, plain.num_pending = row.stop, int(row.samples)

    def update(self, plan: StepPlan, is_array: bool) -> None:
        tokens = [self.data.draw(st.sampled_from([END, STOP, 9, 10, 11])) for _ in plan.rows]
        results = [token if row.samples else None for row, token in zip(plan.rows, tokens, strict=True)]
        expected = []
        for row, token in zip(plan.rows, tokens, strict=True):
            plain = self.plain[row.request]
            if row.samples and not row.request.is_finished:
                plain.output.append(token)
                plain.num_pending = 0
                if reason := plain.ends_with(token):
                    expected.append((row.request, reason))
        given_back = StepResults(np.array(tokens, np.int32) if is_array else results)
        finished = self.scheduler.update(plan, given_back)
        assert [(request, request.finish_reason) for request in finished] == expected


requests = st.builds(
    lambda index, prompt_len, max_tokens, **fields: (index, prompt_len, max_tokens, fields),
    st.integers(0, 2),
    st.integers(1, 11),
    st.integers(1, 13),
    priority=st.integers(0, 2),
    eos_token_ids=st.just(frozenset([END])),
    sampling=st.fixed_dictionaries(
        {"ignore_eos": st.booleans(), "stop_token_ids": st.sampled_from([(), (STOP,)])}
    ),
)


@given(st.lists(requests, min_size=1, max_size=9), st.integers(6, 12), st.booleans(), st.data())
def test_all_at_once_is_one_by_one(wanted: list, num_pages: int, overlap: bool, data: st.DataObject):
    run = PlainRun(
        make_scheduler(num_pages=num_pages, max_num_seqs=4, max_num_batched_tokens=9, policy="priority"), data
    )
    waiting = [
        make_request(f"r{number}", [20 + index] * prompt_len, max_tokens, **fields)
        for number, (index, prompt_len, max_tokens, fields) in enumerate(wanted)
    ]
    in_flight: StepPlan | None = None
    for _ in range(400):
        for _ in range(data.draw(st.integers(0, 2)) if waiting else 0):
            if waiting:
                run.add(waiting.pop())
        if not (waiting or run.scheduler.has_unfinished or in_flight):
            break
        plan = run.schedule()
        if run.plain and data.draw(st.integers(0, 9)) == 0:
            aborted = data.draw(st.sampled_from(list(run.plain)))
            run.scheduler.abort(aborted.request_id)
        if in_flight is not None:
            run.update(in_flight, data.draw(st.booleans()))
        run.advance(plan)
        in_flight = plan
        if not overlap:
            run.update(plan, data.draw(st.booleans()))
            in_flight = None
        run.scheduler.check_integrity()
        for plain in run.plain.values():
            plain.check()
    assert not run.scheduler.has_unfinished


def make_table(num_seats: int = 3) -> SeatTable:
    return SeatTable(num_seats, 32, 4, lambda request: (request.priority, request.arrival))


def test_a_seat_that_was_given_away_has_another_ticket():
    table = make_table(1)
    one, other = make_request("a", [1, 2]), make_request("b", [3])
    table.take(one)
    first = table.tickets.copy()
    table.release(one)
    assert (table.num_taken, table.tickets.tolist()) == (0, [0])
    table.take(other)
    assert table.running() == [other]
    assert table.tickets[0] not in (0, *first)


def test_a_request_takes_its_numbers_along():
    table = make_table()
    request = make_request("a", [1, 2, 3])
    request.output_token_ids, request.num_computed = [4, 5], 4
    table.take(request)
    table.num_pending[request.seat] = 1
    table.append(np.array([request.seat]), np.array([6]))
    table.num_computed[request.seat] = 5
    seen = request.output_token_ids, request.num_computed, request.num_pending, request.num_tokens
    assert seen == ([4, 5, 6], 5, 0, 6)
    table.release(request)
    assert (request.output_token_ids, request.num_computed, request.num_pending, request.num_tokens) == seen
    table.check_integrity()


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0], [1, 0, 2]])
def test_the_seats_are_in_the_order_of_their_requests(order: list[int]):
    table = make_table()
    made = [make_request(str(index), [1], arrival=index) for index in range(3)]
    for index in order:
        table.take(made[index])
    assert table.running() == made
    assert table.last is made[-1]
    table.release(made[1])
    assert table.running() == [made[0], made[2]]
    table.check_integrity()


@pytest.mark.parametrize("num_ends", [1, 2, 16, 17, 40])
def test_every_one_of_many_end_tokens_ends_a_request(num_ends: int):
    ends = tuple(range(100, 100 + num_ends))
    for token in (ends[0], ends[-1], 99, 100 + num_ends):
        scheduler = make_scheduler()
        request = make_request("a", range(4), max_tokens=9, sampling={"stop_token_ids": ends})
        scheduler.add(request)
        scheduler.update(scheduler.schedule(), StepResults([5]))
        finished = scheduler.update(scheduler.schedule(), StepResults([token]))
        assert finished == ([request] if token in ends else [])
