"""One step in flight while the next is planned changes when things happen, and nothing else.

The engine, its scheduler and its texts are the real ones; the device is arithmetic: a token follows from all
the tokens before it, and log-probabilities from their places.
"""

from __future__ import annotations

import random
import time
from typing import Any, cast

import numpy as np
import pytest

from engine.config import EngineConfig
from engine.engine import Engine
from engine.in_flight import Draws, InFlight
from engine.plan import RowLogprobs, StepPlan, StepResults
from engine.request import Request
from engine.sampling_params import SamplingParams
from tests.engine.engines import varied_model
from tests.engine.host import make_request, make_scheduler, overlapped_step, pretend, shape

EOS = 7
NUM_PAGES = 24


class ArithmeticRunner:
    """A StepRunner without a device. Its draws are done when a step is dispatched, as on a device."""

    num_pages = NUM_PAGES
    num_compiled = num_loaded = num_computed_tokens = num_padded_tokens = 0
    compile_seconds = 0.0
    device_name = "arithmetic"

    def __init__(self, fail_at: int | None = None) -> None:
        self.fail_at = fail_at
        self.log: list[str] = []
        self.num_dropped = 0
        self._drawn: dict[Request, list[int]] = {}
        self._results: dict[int, StepResults] = {}

    def dispatch(self, plan: StepPlan, before: InFlight | None) -> InFlight:
        number = len([entry for entry in self.log if entry.startswith("dispatch")])
        self.log.append(f"dispatch {number}")
        token_ids: list[int | None] = []
        logprobs: dict[int, RowLogprobs] = {}
        any_history = False
        for index, row in enumerate(plan.rows):
            request, sampling = row.request, row.request.sampling
            drawn = self._drawn.setdefault(request, [])
            tokens = [*request.prompt_token_ids, *drawn][: row.stop]
            assert len(tokens) == row.stop, "a row's tokens are all drawn when its step is dispatched"
            assert len(request.output_token_ids) + request.num_pending == len(drawn)
            needs_history = sampling.presence_penalty != 0 or bool(request.bad_words_token_ids)
            if row.samples and needs_history:
                assert request.num_pending == 0, "a draw that depends on a token waits for it"
                any_history = True
            any_history |= row.num_prompt_logprobs > 0
            token = None
            if row.samples:
                token = 4 + (sum(tokens) * 31 + len(tokens) * request.key[0]) % 97
                del drawn[row.stop - request.prompt_len :]
                drawn.append(token)
            prompt = [
                (-float(position), ())
                for position in range(
                    row.stop - row.num_logits, row.stop - row.num_logits + row.num_prompt_logprobs
                )
            ]
            if prompt or sampling.logprobs is not None:
                logprobs[index] = RowLogprobs(-row.stop / 8 if row.samples else None, (), prompt)
            token_ids.append(token)
        self._results[number] = StepResults(token_ids, logprobs)
        draws = Draws(np.zeros(0, np.int32), bool(logprobs), any_history)
        return InFlight(plan, cast("Any", number), draws, time.monotonic())

    def collect(self, step: InFlight) -> StepResults:
        number = cast("Any", step.outputs)
        self.log.append(f"collect {number}")
        if number == self.fail_at:
            raise RuntimeError("the device failed")
        self.num_dropped += sum(row.samples and row.request.is_finished for row in step.plan.rows)
        return self._results.pop(number)


def make_engine(fail_at: int | None = None, **options: Any) -> tuple[Engine, ArithmeticRunner]:
    defaults: dict[str, Any] = {
        "max_num_seqs": 6,
        "max_num_batched_tokens": 24,
        "max_model_len": 64,
        "page_size": 8,
        "min_token_pad": 8,
    }
    runner = ArithmeticRunner(fail_at)
    engine = Engine(varied_model(), EngineConfig(**(defaults | options)), runner=cast("Any", runner))
    return engine, runner


def random_requests(seed: int) -> list[dict[str, Any]]:
    """What `add_request` takes: every way to end, to be counted and to be drawn."""
    pick = random.Random(seed)
    stem = [pick.randint(4, 99) for _ in range(20)]
    made = []
    for index in range(14):
        max_tokens = pick.choice([1, 2, 5, 20, 30])
        sampling = SamplingParams(
            n=pick.choice([1, 1, 1, 3]),
            max_tokens=max_tokens,
            min_tokens=pick.choice([0, 0, min(3, max_tokens)]),
            stop=pick.choice([(), (), ("e",), ("an", "th")]),
            stop_token_ids=pick.choice([(), (), tuple(range(4, 12))]),
            ignore_eos=pick.choice([True, False]),
            presence_penalty=pick.choice([0.0] * 6 + [0.5]),
            bad_words=pick.choice([()] * 6 + [("is",)]),
            logprobs=pick.choice([None, None, 0]),
            prompt_logprobs=pick.choice([None] * 6 + [0]),
            seed=pick.randint(0, 5),
        )
        prompt = [
            *stem[: pick.choice([0, 8, 13, 20])],
            *(pick.randint(4, 99) for _ in range(pick.randint(1, 12))),
        ]
        made.append(
            {
                "request_id": f"r{index}",
                "prompt_token_ids": prompt,
                "sampling": sampling,
                "priority": pick.randint(0, 2),
                "stream": sampling.n == 1 and pick.random() < 0.3,
            }
        )
    return made


def finish(engine: Engine, seed: int) -> dict[str, Any]:
    """Add the requests little by little, abort some, and return what came of the others."""
    pick = random.Random(seed)
    waiting = random_requests(seed)
    aborted = {request["request_id"] for request in waiting if pick.random() < 0.15}
    found: dict[str, Any] = {}
    deltas: dict[str, str] = {}
    while waiting or engine.has_unfinished:
        for _ in range(pick.randint(0, 4)):
            if waiting:
                engine.add_request(**waiting.pop())
        for output in engine.step():
            deltas[output.request_id] = deltas.get(output.request_id, "") + output.delta_text
            if output.finished:
                found[output.request_id] = (
                    [
                        (s.token_ids, s.text, s.finish_reason, s.stop_reason, s.logprobs)
                        for s in output.outputs
                    ],
                    output.prompt_logprobs,
                    deltas[output.request_id],
                )
        for name in aborted:
            if pick.random() < 0.1:
                engine.abort_request(name)
        engine.check_integrity()
    for name in aborted:
        found.pop(name, None)
    stats = engine.stats()
    assert stats.pages_held == stats.running == stats.waiting == 0
    assert engine.step() == [], "an idle engine has nothing in flight"
    return found


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
@pytest.mark.parametrize("caching", [True, False])
def test_overlap_changes_no_output(policy: str, caching: bool):
    num_preemptions = num_dropped = num_ahead = num_steps = 0
    for seed in range(25):
        found = []
        for overlap in (False, True):
            engine, runner = make_engine(
                async_scheduling=overlap, scheduling_policy=policy, enable_prefix_caching=caching
            )
            found.append(finish(engine, seed))
            log = runner.log
            starts, ends = (
                [entry for entry in log if entry.startswith(kind)] for kind in ("dispatch", "collect")
            )
            assert len(starts) == len(ends), "no step is lost"
            if overlap:
                num_preemptions += engine.stats().preemptions
                num_dropped += runner.num_dropped
                num_steps += len(ends)
                num_ahead += sum(
                    log.index(f"dispatch {number + 1}") < log.index(f"collect {number}")
                    for number in range(len(ends) - 1)
                )
            else:
                assert log == [entry for pair in zip(starts, ends, strict=True) for entry in pair]
                assert runner.num_dropped == 0
        assert found[0].keys() == found[1].keys()
        for name, output in found[0].items():
            assert found[1][name] == output, (seed, name)
    assert num_preemptions > 0, "the pool is there to be too small"
    assert num_dropped > 0, "some requests end by a token while their next row runs"
    assert num_ahead > num_steps / 4, "many of them wait for nothing"


def test_each_step_is_dispatched_before_the_one_before_it_is_taken_back():
    engine, runner = make_engine()
    engine.add_request("a", [5, 6], sampling=SamplingParams(max_tokens=4, ignore_eos=True))
    assert engine.step() == []
    assert runner.log == ["dispatch 0"]
    engine.step()
    assert runner.log[1:] == ["dispatch 1", "collect 0"]
    while engine.has_unfinished:
        engine.step()
    # Its last token was known to be the last one: no fifth step was made for it.
    assert runner.log[3:] == ["dispatch 2", "collect 1", "dispatch 3", "collect 2", "collect 3"]
    assert runner.num_dropped == 0


def test_a_request_that_ends_by_a_token_wastes_one_row_and_no_page():
    free, _ = make_engine()
    free.add_request("a", [5, 6], sampling=SamplingParams(max_tokens=30, ignore_eos=True))
    (whole,) = [output for _ in iter(lambda: free.has_unfinished, False) for output in free.step()]
    stop = whole.outputs[0].token_ids[6]
    engine, runner = make_engine()
    engine.add_request("a", [5, 6], sampling=SamplingParams(max_tokens=30, stop_token_ids=(stop,)))
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
        engine.check_integrity()
    num_tokens = whole.outputs[0].token_ids.index(stop) + 1
    assert outputs[0].outputs[0].token_ids == whole.outputs[0].token_ids[:num_tokens]
    assert runner.num_dropped == 1
    stats = engine.stats()
    assert stats.num_generated_tokens == num_tokens
    assert stats.num_steps == num_tokens + 1


def test_an_error_of_a_step_surfaces():
    for fail_at in (0, 1, 3):
        engine, _ = make_engine(fail_at=fail_at)
        with pytest.raises(RuntimeError, match="the device failed"):
            engine.generate([[5, 6]], SamplingParams(max_tokens=4, ignore_eos=True))


def test_an_error_of_a_step_that_nobody_waits_for_surfaces_too():
    (output,) = make_engine()[0].generate([[5, 6]], SamplingParams(max_tokens=1, seed=0, ignore_eos=True))
    stop = output.outputs[0].token_ids[0]
    engine, _ = make_engine(fail_at=1)  # the step of a row whose request ended by its token before
    with pytest.raises(RuntimeError, match="the device failed"):
        engine.generate([[5, 6]], SamplingParams(max_tokens=9, seed=0, stop_token_ids=(stop,)))


# -- the scheduler, in exact steps -------------------------------------------------------------------


def test_what_ends_by_length_gives_up_its_place_when_its_last_row_is_dispatched():
    scheduler = make_scheduler(max_num_seqs=1)
    first, second = make_request("a", range(3), max_tokens=2), make_request("b", range(50, 53), max_tokens=1)
    scheduler.add(first)
    scheduler.add(second)
    plan, _ = overlapped_step(scheduler, None)
    assert shape(plan) == [("a", 0, 3)]
    plan, finished = overlapped_step(scheduler, plan)
    assert shape(plan) == [("a", 3, 1)]
    assert finished == []
    assert first.page_ids == []
    plan, finished = overlapped_step(scheduler, plan)
    assert shape(plan) == [("b", 0, 3)], "its place is taken before its last token is in"
    assert finished == [first]
    assert first.num_output_tokens == 2
    plan, finished = overlapped_step(scheduler, plan)
    assert plan.rows == ()
    assert finished == [second]
    assert not scheduler.has_unfinished


def test_a_page_filled_by_the_step_in_flight_is_shared_by_the_next():
    scheduler = make_scheduler()
    scheduler.add(make_request("a", range(9), max_tokens=4))
    plan, _ = overlapped_step(scheduler, None)
    scheduler.add(make_request("b", range(9), max_tokens=4))
    plan, _ = overlapped_step(scheduler, plan)
    assert shape(plan) == [("a", 9, 1), ("b", 8, 1)]
    assert plan.rows[0].page_ids[:2] == plan.rows[1].page_ids[:2]


def test_a_request_preempted_with_a_token_in_flight_keeps_the_token():
    scheduler = make_scheduler(num_pages=4, max_num_seqs=2, enable_prefix_caching=False)
    old, young = (make_request(name, [ord(name)], max_tokens=14) for name in "ab")
    scheduler.add(old)
    scheduler.add(young)
    plan = None
    while not young.num_preemptions:
        before, (plan, _) = plan, overlapped_step(scheduler, plan)
    assert young.num_pending == 0, "the token came after its pages went"
    assert young.output_token_ids
    assert young.num_computed == 0
    num_kept = young.num_output_tokens
    assert before is not None
    assert young in [row.request for row in before.rows]
    assert before.rows[-1].stop == young.num_tokens - 1, "it was drawn by the step in flight"
    while scheduler.has_unfinished:
        plan, _ = overlapped_step(scheduler, plan)
    assert young.num_output_tokens == 14 > num_kept


def test_results_come_to_the_plan_they_belong_to():
    scheduler = make_scheduler()
    scheduler.add(make_request("a", range(4), max_tokens=9))
    first = scheduler.schedule()
    scheduler.advance(first)
    second = scheduler.schedule()
    assert shape(second) == [("a", 4, 1)]
    with pytest.raises(ValueError, match="not the last one"):
        scheduler.advance(first)
    scheduler.update(first, pretend(first))
    scheduler.advance(second)
    scheduler.update(second, pretend(second))
    with pytest.raises(ValueError, match="not the last one"):
        scheduler.update(first, pretend(first))
