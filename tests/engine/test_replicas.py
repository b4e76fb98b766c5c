"""Several schedulers behind one face: who gets a request, and that nothing is lost between them."""

from __future__ import annotations

import random

import pytest

from engine.errors import RequestError
from engine.plan import StepResults
from engine.replicas import PrefixRouting, Replicas, make_scheduler
from engine.scheduler import Scheduler
from engine.scheduler_settings import SchedulerSettings
from tests.engine.host import make_request

SETTINGS = SchedulerSettings(
    max_num_seqs=4, max_num_batched_tokens=32, max_model_len=128, page_size=8, num_pages=64
)


def pages(*names: str) -> list[tuple[int, bytes]]:
    return [((index + 1) * 8, name.encode()) for index, name in enumerate(names)]


def place(routing: PrefixRouting, held: list[tuple[int, bytes]], total_len: int) -> int:
    replica, cost = routing.choose(held, total_len)
    routing.take(replica, held, cost)
    return replica


def test_prompts_that_begin_alike_stay_together_while_that_saves_more_than_it_unbalances():
    routing = PrefixRouting(2, 100)
    template = pages(*"abcdefgh")  # 64 tokens
    assert place(routing, template, 80) == 0
    assert place(routing, pages("x"), 80) == 1
    # Balanced: 16 tokens more are to be computed where the template is known, 80 elsewhere.
    assert place(routing, template, 80) == 0
    assert routing.loads == [96, 80]
    others = [place(routing, template, 80) for _ in range(5)]
    assert others == [0, 0, 0, 0, 1]  # 80 tokens apart: the template is computed once more
    assert routing.loads == [160, 160]


def test_what_is_not_shared_goes_where_least_is_left_to_do():
    routing = PrefixRouting(3, 100)
    assert [place(routing, pages(str(index)), 10) for index in range(6)] == [0, 1, 2, 0, 1, 2]
    routing.release(1, 10)
    assert place(routing, pages("new"), 10) == 1


def test_no_more_pages_count_as_known_than_a_replica_holds():
    routing = PrefixRouting(2, 3)
    assert place(routing, pages(*"abc"), 30) == 0
    assert place(routing, pages(*"xyz"), 30) == 1
    assert place(routing, pages(*"pqr"), 30) == 0  # "abc" is gone from 0
    routing.release(0, 60)
    routing.release(1, 30)
    assert routing.choose(pages(*"abc"), 30) == (0, 30)
    assert routing.choose(pages(*"xyz"), 30) == (1, 6)


def replicas(count: int) -> Replicas:
    scheduler = make_scheduler(SETTINGS, count)
    assert isinstance(scheduler, Replicas)
    return scheduler


def run(scheduler: Replicas, steps: int = 1000) -> int:
    """Steps until nothing is planned; each row draws the number of its step."""
    for step in range(steps):
        plan = scheduler.schedule()
        if not plan.num_rows:
            return step
        scheduler.advance(plan)
        scheduler.update(plan, [StepResults([step] * each.num_rows) for each in plan.each])
        scheduler.check_integrity()
    raise AssertionError("it does not end")


def test_every_request_ends_and_nothing_is_left():
    pick = random.Random(0)
    scheduler = replicas(3)
    stem, made = [7] * 20, []
    for index in range(40):
        prompt = (*stem[: pick.choice([0, 20])], *(pick.randint(4, 99) for _ in range(pick.randint(1, 20))))
        for sample in range(pick.choice([1, 1, 3])):
            made.append(make_request(f"r{index}", prompt, sample_index=sample, max_tokens=pick.randint(1, 9)))
            scheduler.add(made[-1])
    scheduler.check_integrity()
    scheduler.abort("r3")
    for request in made:
        if request.request_id == "r4":
            request.request_id = "another"
    scheduler.rename("r4", "another")
    scheduler.abort("another")
    scheduler.check_integrity()
    run(scheduler)
    stats = scheduler.stats()
    assert stats.num_running == stats.num_waiting == stats.num_held_pages == 0
    assert stats.num_free_pages + stats.num_cached_pages == 3 * SETTINGS.num_pages


def test_a_step_runs_the_batches_of_all():
    scheduler = replicas(2)
    for index in range(8):
        scheduler.add(make_request(f"r{index}", [index + 4] * 3))
    plan = scheduler.schedule()
    assert [each.num_rows for each in plan.each] == [4, 4]
    assert (plan.num_rows, plan.num_tokens, plan.size) == (8, 24, (12, 4))
    assert len(plan.drawing) == 8


def test_a_request_is_known_by_its_replica():
    scheduler = replicas(2)
    scheduler.add(make_request("same", [5] * 4))
    with pytest.raises(RequestError, match="unfinished already"):
        scheduler.add(make_request("same", [6] * 4))
    with pytest.raises(RequestError, match="max_model_len"):
        scheduler.add(make_request("long", [6] * 128))
    with pytest.raises(ValueError, match="not in a scheduler"):
        scheduler.finish(make_request("unknown", [6] * 4), "stop")
    run(scheduler)


def test_without_replicas_it_is_one_scheduler():
    assert isinstance(make_scheduler(SETTINGS, None), Scheduler)
