"""What was drawn since the last look, read off all seats at once, is what a plain loop finds."""

from __future__ import annotations

import random

import pytest

from engine.request import Request
from engine.scheduler import Scheduler
from engine.seat_watch import Drawn, SeatWatch
from tests.engine.host import make_request, make_scheduler, overlapped_step


def tokens_since(drawn: Drawn | None, known: dict[Request, int]) -> dict[str, list[int]]:
    """The new tokens of each request, as a reader that knows so many of each takes them."""
    found = {}
    if drawn is not None:
        rows = zip(drawn.requests, drawn.lens.tolist(), drawn.token_ids.tolist(), strict=True)
        for request, length, token_ids in rows:
            num_new = length - request.prompt_len - known.get(request, 0)
            assert 0 <= num_new <= len(token_ids)
            found[request.request_id] = token_ids[len(token_ids) - num_new :]
            known[request] = length - request.prompt_len
    return {name: tokens for name, tokens in found.items() if tokens}


def plainly(scheduler: Scheduler, shown: dict[Request, int]) -> dict[str, list[int]]:
    found = {}
    for request in scheduler.tables[0].running():
        if request.output_token_ids[shown.get(request, 0) :]:
            found[request.request_id] = request.output_token_ids[shown.get(request, 0) :]
            shown[request] = request.num_output_tokens
    return found


@pytest.mark.parametrize("seed", range(6))
def test_a_look_finds_what_a_loop_finds(seed: int):
    """Requests come, end, are aborted, lose their pages and come back; a look comes now and then."""
    pick = random.Random(seed)
    scheduler = make_scheduler(max_num_seqs=5, num_pages=24, policy=pick.choice(["fcfs", "priority"]))
    watch = SeatWatch(scheduler.tables[0])
    by_look: dict[Request, int] = {}
    by_loop: dict[Request, int] = {}
    plan, num_found, num_preempted = None, 0, 0
    for number in range(150):
        if number % 4 == 0 and number < 120:
            prompt = [pick.randint(1, 9) for _ in range(pick.randint(1, 20))]
            request = make_request(f"r{number}", prompt, pick.randint(1, 40), priority=pick.randint(0, 2))
            scheduler.add(request)
        if number % 17 == 16:
            scheduler.abort(f"r{number - 12}")
        plan, _ = overlapped_step(scheduler, plan)
        num_preempted += len(plan.preempted)
        if pick.random() < 0.4:
            found = tokens_since(watch.look(), by_look)
            assert found == plainly(scheduler, by_loop)
            num_found += len(found)
    assert num_found > 50
    assert num_preempted > 0
    assert watch.look() is None or scheduler.has_unfinished
