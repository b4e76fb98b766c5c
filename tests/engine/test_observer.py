"""Observers see every request once and every step, and change nothing."""

from __future__ import annotations

from engine.observer import EngineObserver, StepFacts
from engine.outputs import RequestOutput
from engine.sampling_params import SamplingParams
from engine.step_times import StepTimes
from tests.engine.engines import tiny_engine, tokens_of

PROMPTS = ["the answer is in the region", "an ion on the", "the answer is in", "er" * 30]
GREEDY = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)


class Notes(EngineObserver):
    def __init__(self) -> None:
        self.added: list[tuple[str, int]] = []
        self.finished: list[RequestOutput] = []
        self.aborted: list[str] = []
        self.steps: list[StepFacts] = []
        self.num_scheduled = 0

    def on_added(self, request_id: str, num_prompt_tokens: int, sampling: SamplingParams) -> None:
        self.added.append((request_id, num_prompt_tokens))

    def on_scheduled(self, seconds: float) -> None:
        assert seconds >= 0
        self.num_scheduled += 1

    def on_step(self, facts: StepFacts) -> None:
        self.steps.append(facts)

    def on_finished(self, output: RequestOutput) -> None:
        self.finished.append(output)

    def on_aborted(self, request_id: str) -> None:
        self.aborted.append(request_id)


def test_observers_see_each_request_and_step_and_change_no_token():
    engine, notes = tiny_engine(), Notes()
    sampled = SamplingParams(temperature=0.9, max_tokens=9, seed=3, n=2)
    before = engine.generate(PROMPTS, GREEDY) + engine.generate(PROMPTS, sampled)
    first, computed = engine.totals().num_steps, engine.totals().num_computed_tokens
    engine.add_observer(notes)
    try:
        during = engine.generate(PROMPTS, GREEDY) + engine.generate(PROMPTS, sampled)
    finally:
        engine.remove_observer(notes)
    assert tokens_of(during) == tokens_of(before)

    assert [length for _, length in notes.added] == [len(output.prompt_token_ids) for output in during]
    assert sorted(output.request_id for output in notes.finished) == sorted(name for name, _ in notes.added)
    assert not notes.aborted
    assert len(notes.steps) == engine.totals().num_steps - first
    assert notes.num_scheduled >= len(notes.steps)
    assert sum(step.num_tokens for step in notes.steps) == engine.totals().num_computed_tokens - computed
    assert all(step.execution_seconds >= 0 and 1 <= step.num_sequences <= 8 for step in notes.steps)

    engine.generate(PROMPTS[0], GREEDY)
    assert len(notes.finished) == 8, "an observer that was removed is told no more"


def test_followers_and_aborted_requests_are_told_of_once():
    engine, notes = tiny_engine(), Notes()
    engine.add_observer(notes)
    try:
        for name in ("leads", "follows", "leaves"):
            engine.add_request(name, prompt=PROMPTS[0], sampling=GREEDY)
        engine.step()
        assert engine.abort_request("leaves")
        assert engine.abort_request("leads")
        assert not engine.abort_request("leads")
        assert not engine.abort_request("unknown")
        while engine.has_unfinished:
            engine.step()
    finally:
        engine.remove_observer(notes)
    assert [name for name, _ in notes.added] == ["leads", "follows", "leaves"]
    assert notes.aborted == ["leaves", "leads"]
    assert [output.request_id for output in notes.finished] == ["follows"]


def test_totals_take_nothing_from_the_reader_of_step_times():
    engine = tiny_engine()
    engine.stats()
    engine.generate(PROMPTS[:2], GREEDY)
    totals = engine.totals()
    assert totals.step_seconds == totals.batch_occupancy == ()
    stats = engine.stats()
    assert len(stats.step_seconds) == len(stats.batch_occupancy) > 0
    assert stats.num_steps == totals.num_steps
    assert engine.stats().step_seconds == ()


def test_step_times_that_nobody_takes_are_bounded():
    times = StepTimes(max_steps=3)
    for step in range(5):
        times.add(float(step), step)
    assert times.take() == ((2.0, 3.0, 4.0), (2, 3, 4))
    assert times.take() == ((), ())
