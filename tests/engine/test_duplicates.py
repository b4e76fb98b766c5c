"""Exact duplicates run once: each is given the result that it would have had, at a time that makes sense."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from engine.duplicates import duplicate_key
from engine.engine import Engine
from engine.errors import RequestError
from engine.outputs import RequestOutput
from engine.packed_tokens import pack_tokens
from engine.sampling_params import SamplingParams
from tests.engine.engines import tiny_engine

PROMPT = [5, 6, 7, 8, 9, 10, 11]
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
SEEDED = SamplingParams(temperature=1.1, seed=3, max_tokens=6, ignore_eos=True)
FREE = SEEDED.replace(seed=None)


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = tiny_engine(enable_prefix_caching=False)
    yield engine
    assert not engine.has_unfinished
    assert engine.num_unfinished == 0
    assert engine.stats().pages_held == 0


def run(engine: Engine) -> dict[str, RequestOutput]:
    outputs: dict[str, RequestOutput] = {}
    while engine.has_unfinished:
        for output in engine.step():
            assert output.request_id not in outputs
            outputs[output.request_id] = output
        engine.check_integrity()
    return outputs


def one(engine: Engine, sampling: SamplingParams) -> RequestOutput:
    """The result of a request that runs alone."""
    engine.add_request("alone", PROMPT, sampling=sampling)
    return run(engine)["alone"]


@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        SEEDED,
        SEEDED.replace(n=3),
        GREEDY.replace(logprobs=2, prompt_logprobs=1),
        GREEDY.replace(stop=("e",), ignore_eos=False, max_tokens=20),
    ],
)
def test_duplicates_run_once_and_come_out_alike(engine: Engine, sampling: SamplingParams):
    wanted = one(engine, sampling)
    before = engine.stats()
    for name in "abc":
        engine.add_request(name, PROMPT, sampling=sampling)
    assert engine.num_unfinished == 3
    outputs = run(engine)
    after = engine.stats()
    assert after.num_duplicates - before.num_duplicates == 2
    assert after.num_prompt_tokens - before.num_prompt_tokens == len(PROMPT) * sampling.n
    drawn = sum(len(sample.token_ids) for sample in wanted.outputs)
    assert after.num_generated_tokens - before.num_generated_tokens <= drawn + sampling.n
    for name in "abc":
        output = outputs[name]
        assert output.request_id == name
        assert output.outputs == wanted.outputs
        assert output.prompt_logprobs == wanted.prompt_logprobs
        assert output.finished
        assert output.num_cached_tokens == (0 if name == "a" else len(PROMPT) - 1)
        times = output.metrics
        stamps = (times.arrival_time, times.first_scheduled_time, times.first_token_time, times.finished_time)
        came = [stamp for stamp in stamps if stamp is not None]
        assert len(came) == 4
        assert came == sorted(came)


def test_one_that_comes_later_is_given_the_same_and_no_time_before_it_came(engine: Engine):
    engine.add_request("a", PROMPT, sampling=GREEDY)
    for _ in range(3):
        assert engine.step() == []
    engine.add_request("b", PROMPT, sampling=GREEDY)
    outputs = run(engine)
    assert outputs["a"].outputs == outputs["b"].outputs
    early, late = outputs["a"].metrics, outputs["b"].metrics
    assert late.arrival_time > early.arrival_time
    assert late.first_token_time == late.first_scheduled_time == late.arrival_time
    assert late.finished_time == early.finished_time


def test_what_differs_runs_by_itself(engine: Engine):
    others = [
        ("prompt", [*PROMPT, 5], GREEDY, {}),
        ("salt", PROMPT, GREEDY, {"cache_salt": "x"}),
        ("length", PROMPT, GREEDY.replace(max_tokens=5), {}),
        ("seed", PROMPT, SEEDED, {}),
        ("other seed", PROMPT, SEEDED.replace(seed=4), {}),
        ("penalty", PROMPT, GREEDY.replace(presence_penalty=0.5), {}),
        ("free", PROMPT, FREE, {}),
        ("free too", PROMPT, FREE, {}),
        ("stream", PROMPT, GREEDY, {"stream": True}),
    ]
    before = engine.stats().num_duplicates
    engine.add_request("a", PROMPT, sampling=GREEDY)
    for name, prompt, sampling, options in others:
        engine.add_request(name, prompt, sampling=sampling, **options)
    while engine.has_unfinished:
        engine.step()
    assert engine.stats().num_duplicates == before


def test_what_shapes_a_draw_means_nothing_to_greedy_requests():
    keys = {
        duplicate_key(pack_tokens((1, 2)), None, sampling)
        for sampling in (GREEDY, GREEDY.replace(seed=4), GREEDY.replace(top_k=3, top_p=0.5, min_p=0.1))
    }
    assert len(keys) == 1
    assert duplicate_key(pack_tokens((1, 2)), None, FREE) is None


def test_when_the_leader_is_aborted_the_first_follower_goes_on_with_what_was_computed(engine: Engine):
    wanted = one(engine, SEEDED.replace(n=2))
    for name in "abc":
        engine.add_request(name, PROMPT, sampling=SEEDED.replace(n=2))
    for _ in range(3):
        engine.step()
    before = engine.stats().num_computed_tokens
    assert engine.abort_request("a")
    assert not engine.abort_request("a")
    assert engine.num_unfinished == 2
    # Its id is free again, and leads to nobody else's result.
    engine.add_request("a", [9, 9, 9], sampling=GREEDY)
    engine.add_request("d", PROMPT, sampling=SEEDED.replace(n=2))
    outputs = run(engine)
    assert outputs.keys() == {"a", "b", "c", "d"}
    assert outputs["a"].prompt_token_ids == (9, 9, 9)
    for name in "bcd":
        assert outputs[name].outputs == wanted.outputs
    assert engine.stats().num_computed_tokens - before <= 2 * 6 + 3 + 6


def test_a_follower_can_be_aborted(engine: Engine):
    for name in "abc":
        engine.add_request(name, PROMPT, sampling=GREEDY)
    assert engine.abort_request("b")
    assert not engine.abort_request("b")
    assert run(engine).keys() == {"a", "c"}
    for name in "ab":
        engine.add_request(name, PROMPT, sampling=GREEDY)
    assert engine.abort_request("b")
    assert engine.abort_request("a")
    assert run(engine) == {}


def test_an_id_of_a_follower_is_taken(engine: Engine):
    for name in "ab":
        engine.add_request(name, PROMPT, sampling=GREEDY)
    with pytest.raises(RequestError, match="'b' is unfinished already"):
        engine.add_request("b", PROMPT, sampling=GREEDY)
    assert run(engine).keys() == {"a", "b"}


def test_an_urgent_request_does_not_wait_for_one_that_is_not(engine: Engine):
    before = engine.stats().num_duplicates
    engine.add_request("late", PROMPT, sampling=GREEDY, priority=5)
    engine.add_request("urgent", PROMPT, sampling=GREEDY, priority=1)
    engine.add_request("last", PROMPT, sampling=GREEDY, priority=9)
    assert run(engine).keys() == {"late", "urgent", "last"}
    assert engine.stats().num_duplicates - before == 1


def test_the_same_text_may_be_spelled_by_token_ids(engine: Engine):
    token_ids = engine.tokenizer("hello there")["input_ids"]
    outputs = engine.generate(["hello there", "hello there"], GREEDY)
    assert [output.prompt for output in outputs] == ["hello there"] * 2
    engine.add_request("a", token_ids, sampling=GREEDY)
    engine.add_request("b", prompt="hello there", sampling=GREEDY)
    both = run(engine)
    assert both["a"].prompt is None
    assert both["b"].prompt == "hello there"
    assert both["a"].outputs == both["b"].outputs == outputs[0].outputs
