"""The engine behind a thread: many callers at once, streams, leaving early, time limits, pauses, failures."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from engine.async_engine import AsyncEngine
from engine.outputs import RequestOutput
from engine.sampling_params import SamplingParams
from tests.engine.costless import Gate, assert_nothing_is_left, costless_engine, stream_all
from tests.engine.engines import tiny_engine, tokens_of

LONG = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
SHORT = LONG.replace(max_tokens=6)
PROMPTS = ["the answer", "is", [5, 6, 7], [{"role": "user", "content": "the"}]]


def check_stream(outputs: list[RequestOutput]) -> None:
    """What every stream promises: nothing shown is taken back, and its parts are the whole."""
    last = outputs[-1]
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert "".join(output.delta_text for output in outputs) == last.outputs[0].text
    for before, after in itertools.pairwise(outputs):
        for earlier, later in zip(before.outputs, after.outputs, strict=True):
            assert later.text.startswith(earlier.text)
            assert later.token_ids[: len(earlier.token_ids)] == earlier.token_ids
            assert earlier.finish_reason in (None, later.finish_reason)


# -- the same outputs as the engine's ------------------------------------------------------------------


def test_everybody_gets_what_the_engine_alone_would_give():
    engine = tiny_engine()
    samplings = [SHORT, SHORT.replace(temperature=1.0, seed=3, n=2), SHORT.replace(stop=("e",)), SHORT]
    alone = engine.generate(PROMPTS, samplings)

    async def ask(front: AsyncEngine) -> tuple[list[RequestOutput], list[list[RequestOutput]]]:
        pairs = list(zip(PROMPTS, samplings, strict=True))
        whole = asyncio.gather(*(front.generate(*pair) for pair in pairs))
        grown = asyncio.gather(*(stream_all(front, *pair) for pair in pairs))
        return await whole, await grown

    with AsyncEngine(engine) as front:
        whole, grown = asyncio.run(ask(front))
        assert_nothing_is_left(front)
    for outputs in (whole, [stream[-1] for stream in grown]):
        assert tokens_of(outputs) == tokens_of(alone)
        for output, expected in zip(outputs, alone, strict=True):
            assert output.prompt == expected.prompt
            assert [sample.text for sample in output.outputs] == [sample.text for sample in expected.outputs]
            assert [s.finish_reason for s in output.outputs] == [s.finish_reason for s in expected.outputs]
    for stream in grown:
        check_stream(stream)


@pytest.mark.parametrize("interval", [0, 5])
@pytest.mark.parametrize("stop", [(), ("e",), ("re", "ver", "y t")])
def test_streams_join_to_their_texts_whatever_the_interval(interval: int, stop: tuple[str, ...]):
    engine, _ = costless_engine(num_pages=48, stream_interval_ms=interval)
    sampling = LONG.replace(n=2, temperature=1.0, stop=stop)

    async def ask(front: AsyncEngine) -> list[list[RequestOutput]]:
        prompts = [[20 + index, 7, 9 + index] for index in range(20)]
        return await asyncio.gather(*(stream_all(front, prompt, sampling) for prompt in prompts))

    with AsyncEngine(engine) as front:
        for stream in asyncio.run(ask(front)):
            check_stream(stream)
            for output in stream:
                assert not any(string in sample.text for string in stop for sample in output.outputs)
        assert_nothing_is_left(front)


def test_a_stop_string_over_several_tokens_is_held_back_until_it_is_none(front: AsyncEngine):
    (free,) = front.run_on_step_thread(lambda: front.engine.generate([[5, 6]], LONG)).result()
    text = free.outputs[0].text
    stop = text[10:40]
    shown = asyncio.run(stream_all(front, [5, 6], LONG.replace(stop=(stop,))))
    assert shown[-1].outputs[0].text == text[: text.index(stop)]
    assert shown[-1].outputs[0].stop_reason == stop
    check_stream(shown)


def test_log_probabilities_come_with_the_tokens_that_are_shown():
    with AsyncEngine(tiny_engine()) as front:
        outputs = asyncio.run(stream_all(front, "the", LONG.replace(logprobs=2, n=2)))
    assert len(outputs) > 1
    for output in outputs:
        for sample in output.outputs:
            assert [entry.token_id for entry in sample.logprobs or ()] == list(sample.token_ids)


def test_a_slow_reader_misses_nothing(gate: Gate, gated: AsyncEngine):
    async def read() -> list[RequestOutput]:
        stream = gated.stream([5, 6], LONG)
        first = asyncio.ensure_future(anext(stream))
        while not first.done():
            gate.let(1)
            await asyncio.sleep(0.01)
        outputs = [await first]
        gate.open()
        while gated.num_unfinished:
            await asyncio.sleep(0.01)
        return [*outputs, *[output async for output in stream]]

    outputs = asyncio.run(read())
    check_stream(outputs)
    assert len(outputs) < 10
