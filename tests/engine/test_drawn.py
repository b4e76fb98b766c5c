"""A request that is given the tokens an earlier engine drew ends as it would have ended there, to the bit."""

from __future__ import annotations

from typing import Any

import pytest

from engine.drawn import DrawnTokens
from engine.engine import Engine
from engine.errors import RequestError
from engine.outputs import CompletionOutput, RequestOutput, TokenLogprob
from engine.sampling_params import SamplingParams
from tests.engine.engines import tiny_engine
from tests.engine.test_engine_laws import prompts

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
SAMPLINGS = {
    "greedy": GREEDY,
    "greedy with log-probabilities": GREEDY.replace(logprobs=2),
    "drawn": SamplingParams(temperature=1.2, top_p=0.95, max_tokens=24, ignore_eos=True, logprobs=0),
    "drawn thrice": SamplingParams(temperature=1.0, n=3, max_tokens=24, logprobs=2),
    "drawn with a seed": SamplingParams(temperature=1.0, seed=7, n=2, max_tokens=24),
    "with penalties": SamplingParams(
        temperature=1.0, presence_penalty=0.7, frequency_penalty=0.3, repetition_penalty=1.3, max_tokens=24
    ),
    "with bad words": SamplingParams(temperature=1.0, bad_words=("e", "st"), max_tokens=24, ignore_eos=True),
    "with stop tokens": SamplingParams(temperature=1.0, stop_token_ids=tuple(range(40, 60)), max_tokens=24),
}


def add(engine: Engine, index: int, sampling: SamplingParams, drawn: Any = None) -> None:
    engine.add_request(f"r{index}", prompts()[index], sampling=sampling, identity=f"row {index}", drawn=drawn)


def finish(engine: Engine, outputs: dict[str, RequestOutput]) -> dict[str, list[Any]]:
    """What is in a row of data/, of all requests; the engine has given `outputs` so far."""
    while engine.has_unfinished:
        outputs |= {output.request_id: output for output in engine.step()}
        engine.check_integrity()
    assert engine.stats().pages_held == 0
    return {request_id: [result(each) for each in output.outputs] for request_id, output in outputs.items()}


def result(sample: CompletionOutput) -> tuple[Any, ...]:
    return (
        sample.index,
        sample.token_ids,
        sample.text,
        sample.finish_reason,
        sample.stop_reason,
        sample.cumulative_logprob,
        sample.logprobs,
    )


def uninterrupted(sampling: SamplingParams, count: int = 6) -> dict[str, list[Any]]:
    engine = tiny_engine()
    for index in range(count):
        add(engine, index, sampling)
    return finish(engine, {})


def interrupted(
    sampling: SamplingParams, num_steps: int, count: int = 6, **options: Any
) -> dict[str, list[Any]]:
    """The same, stopped after so many steps; another engine goes on with all rows, ended ones too."""
    engine = tiny_engine()
    for index in range(count):
        add(engine, index, sampling)
    outputs: dict[str, RequestOutput] = {}
    for _ in range(num_steps):
        outputs |= {output.request_id: output for output in engine.step()}
    drawn = {f"r{index}": engine.drawn_tokens(f"r{index}") for index in range(count)}
    for request_id, output in outputs.items():
        drawn[request_id] = tuple(map(DrawnTokens.of, output.outputs))
    for index in range(count):
        engine.abort_request(f"r{index}")
    while engine.has_unfinished:
        engine.step()
    heir = tiny_engine(num_pages=40, **options)  # another one: nothing of the first is in its cache
    for index in reversed(range(count)):
        add(heir, index, sampling, drawn[f"r{index}"])
    return finish(heir, {})


@pytest.mark.parametrize("name", SAMPLINGS)
def test_a_row_goes_on_with_the_same_bits_wherever_it_was_cut_short(name: str) -> None:
    sampling = SAMPLINGS[name]
    wanted = uninterrupted(sampling)
    for num_steps in (1, 9, 13, 20, 27, 34):
        assert interrupted(sampling, num_steps) == wanted, num_steps


@pytest.mark.parametrize("options", [{"async_scheduling": False}, {"enable_prefix_caching": False}])
def test_nor_does_it_matter_how_the_engine_works(options: dict[str, Any]) -> None:
    sampling = SAMPLINGS["drawn thrice"]
    assert interrupted(sampling, 17, **options) == uninterrupted(sampling)


@pytest.mark.parametrize("include", [False, True])
def test_stop_strings_across_the_place_where_it_was_cut_are_found(include: bool) -> None:
    """Every string of two to four characters of the text is a stop string once, cut at every token."""
    free = SamplingParams(temperature=1.0, max_tokens=16, ignore_eos=True)
    [(_, tokens, text, *_)] = uninterrupted(free, count=1)["r0"]
    assert len(tokens) == 16
    num_stops = 0
    for start in range(4, 12, 2):
        for length in (2, 3, 4):
            stop = text[start : start + length]
            sampling = free.replace(stop=(stop,), include_stop_str_in_output=include)
            wanted = uninterrupted(sampling, count=1)
            num_stops += wanted["r0"][0][3] == "stop"
            for num_steps in range(3, 14, 2):
                assert interrupted(sampling, num_steps, count=1) == wanted, (stop, num_steps)
    assert num_stops == 12


def test_a_sample_that_has_ended_draws_its_last_token_again() -> None:
    top = ((5, -0.5),)
    logprobs = tuple(TokenLogprob(token, -0.5, top) for token in (5, 6, 7))
    ended = CompletionOutput(
        index=0, token_ids=(5, 6, 7), finish_reason="stop", text="", stop_reason=None, logprobs=logprobs
    )
    assert DrawnTokens.of(ended) == DrawnTokens((5, 6), logprobs[:2])
    running = CompletionOutput(index=0, token_ids=(5, 6, 7), finish_reason=None, text="")
    assert DrawnTokens.of(running) == DrawnTokens((5, 6, 7), None)


@pytest.mark.parametrize(
    ("sampling", "drawn", "message"),
    [
        (GREEDY, [], "0 samples of 1"),
        (GREEDY, [DrawnTokens(tuple(range(24)))], "24 tokens leave none to draw"),
        (GREEDY, [DrawnTokens((100_000,))], "100000"),
        (GREEDY.replace(logprobs=1), [DrawnTokens((5, 6))], "lack their log-probabilities"),
        (GREEDY.replace(prompt_logprobs=1), [DrawnTokens((5,))], "log-probabilities of the prompt"),
    ],
)
def test_tokens_that_cannot_be_a_requests_are_refused(
    sampling: SamplingParams, drawn: list[DrawnTokens], message: str
) -> None:
    engine = tiny_engine()
    with pytest.raises(RequestError, match=message):
        add(engine, 0, sampling, drawn)
    assert not engine.has_unfinished
