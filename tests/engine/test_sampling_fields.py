"""The sampling fields that eSurge's users know, and what an engine behind a thread makes of them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from engine.async_engine import AsyncEngine
from engine.engine import Engine
from engine.errors import RequestError
from engine.sampling_params import SamplingParams
from tests.engine.engines import TINY, engine_with, last_outputs, tiny_engine, tokens_of, varied_model

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
DRAWN = SamplingParams(temperature=1.0, seed=7, max_tokens=24, ignore_eos=True)


def test_best_of_returns_the_likeliest_of_all_that_were_drawn():
    engine = tiny_engine()
    sampling = DRAWN.replace(n=6, logprobs=1, max_tokens=6)
    every = engine.generate("the", sampling)[0].outputs
    ranked = sorted(every, key=lambda each: each.cumulative_logprob or 0.0, reverse=True)
    (best,) = engine.generate("the", sampling.replace(n=2, best_of=6))
    assert [each.token_ids for each in best.outputs] == [each.token_ids for each in ranked[:2]]
    assert [each.index for each in best.outputs] == [0, 1]
    assert [each.logprobs for each in best.outputs] == [each.logprobs for each in ranked[:2]]
    (plain,) = engine.generate("the", sampling.replace(n=2, best_of=6, logprobs=None))
    assert [each.token_ids for each in plain.outputs] == [each.token_ids for each in best.outputs]
    assert [each.logprobs for each in plain.outputs] == [None, None]
    assert plain.outputs[0].cumulative_logprob == pytest.approx(best.outputs[0].cumulative_logprob)
    with pytest.raises(RequestError, match="best_of"):
        engine.add_request(prompt="the", sampling=DRAWN.replace(best_of=3), stream=True)


def test_a_request_with_best_of_goes_on_from_drawn_tokens():
    engine, sampling = tiny_engine(), DRAWN.replace(best_of=3)
    whole = engine.generate([[5, 6]], sampling.replace(seed=3))[0].outputs[0]
    engine.add_request("cut", [5, 6], sampling=sampling.replace(seed=3))
    for _ in range(6):
        engine.step()
    drawn = engine.drawn_tokens("cut")
    engine.abort_request("cut")
    assert drawn is not None
    assert len(drawn) == 3
    engine.add_request("on", [5, 6], sampling=sampling.replace(seed=3), drawn=drawn)
    assert last_outputs(engine)["on"].outputs[0].token_ids == whole.token_ids


def test_a_stop_pattern_stops_as_a_stop_string_would():
    engine = tiny_engine()
    free = engine.generate("the", DRAWN)[0].outputs[0].text
    at = next(index for index in range(4, len(free)) if free[index].isascii() and free[index].isalnum())
    first = next(index for index, character in enumerate(free) if character == free[at])
    (cut,) = engine.generate("the", DRAWN.replace(stop_pattern=f"[{free[at]}]"))
    assert cut.outputs[0].text == free[:first]
    assert (cut.outputs[0].finish_reason, cut.outputs[0].stop_reason) == ("stop", f"[{free[at]}]")
    deltas = [each.delta_text for each in engine.stream("the", DRAWN.replace(stop_pattern=f"[{free[at]}]"))]
    assert "".join(deltas) == free[:first]


def test_without_detokenizing_there_are_tokens_and_no_text():
    engine = tiny_engine()
    whole = engine.generate("the", DRAWN)[0].outputs[0]
    (bare,) = engine.generate("the", DRAWN.replace(detokenize=False))
    assert (bare.outputs[0].text, bare.outputs[0].token_ids) == ("", whole.token_ids)
    streamed = list(engine.stream("the", DRAWN.replace(detokenize=False)))
    assert [len(output.outputs[0].token_ids) for output in streamed] == [*range(1, 25)]
    with pytest.raises(RequestError, match="detokenize"):
        SamplingParams(detokenize=False, stop=("x",))


def test_special_tokens_can_be_set_apart():
    engine = tiny_engine()
    tokenizer = engine.tokenizer
    plain = tokenizer("the", add_special_tokens=False)["input_ids"]
    special = tokenizer.convert_tokens_to_ids("<|im_start|>")
    sampling = SamplingParams(
        temperature=1, seed=1, max_tokens=30, ignore_eos=True, skip_special_tokens=False
    )
    sampling = sampling.replace(allowed_token_ids=(*plain, special))
    joined = engine.generate("a", sampling)[0].outputs[0]
    apart = engine.generate("a", sampling.replace(spaces_between_special_tokens=True))[0].outputs[0]
    streamed = "".join(
        each.delta_text for each in engine.stream("a", sampling.replace(spaces_between_special_tokens=True))
    )
    assert joined.token_ids == apart.token_ids
    assert special in joined.token_ids
    # As transformers' slow tokenizers do it: runs of plain tokens and single special ones, joined by spaces.
    parts, run = [], []
    for token in joined.token_ids:
        if token == special:
            parts += [tokenizer.decode(run)] * bool(run) + ["<|im_start|>"]
            run = []
        else:
            run.append(token)
    parts += [tokenizer.decode(run)] * bool(run)
    assert apart.text == streamed == " ".join(parts)
    assert joined.text == "".join(parts)


def test_output_kinds():
    engine = tiny_engine()
    whole = engine.generate("the", DRAWN)[0].outputs[0]
    assert engine.generate("the", DRAWN.replace(output_kind="delta"))[0].outputs[0] == whole

    def outputs_of(kind: str) -> list[Any]:
        engine.add_request("r", prompt="the", sampling=DRAWN.replace(output_kind=kind, logprobs=0))
        return [output for _ in iter(lambda: engine.has_unfinished, False) for output in engine.step()]

    (final,) = outputs_of("final_only")
    cumulative, delta = outputs_of("cumulative"), outputs_of("delta")
    assert final.outputs[0].text == cumulative[-1].outputs[0].text == whole.text
    assert [each.outputs[0].text for each in cumulative] == [each.accumulated_text for each in delta]
    assert "".join(each.outputs[0].text for each in delta) == whole.text
    assert sum((each.outputs[0].token_ids for each in delta), ()) == whole.token_ids
    assert sum((each.outputs[0].logprobs for each in delta), ()) == cumulative[-1].outputs[0].logprobs
    assert len(delta) > 3
    only = list(engine.stream("the", DRAWN.replace(output_kind="final_only")))
    assert [each.outputs[0].text for each in only] == [whole.text]
    with pytest.raises(RequestError, match="cumulative, delta, final_only"):
        DRAWN.replace(output_kind="whole")


def test_a_prompt_is_cut_where_its_sampling_says_so():
    engine = tiny_engine()
    tokens = list(range(10, 40))
    (cut,) = engine.generate([tokens], GREEDY.replace(truncate_prompt_tokens=7))
    assert cut.prompt_token_ids == tuple(tokens[-7:])
    assert cut.num_truncated_tokens == 23
    assert tokens_of([cut]) == tokens_of(engine.generate([tokens[-7:]], GREEDY))
    middle = engine_with(truncate_mode="middle", auto_truncate_prompt=False)
    (cut,) = middle.generate([tokens], GREEDY.replace(truncate_prompt_tokens=4))
    assert cut.prompt_token_ids == (10, 11, 38, 39)


# -- behind a thread ---------------------------------------------------------------------------------


def test_what_a_thread_of_streams_shows_and_what_it_refuses():
    whole = tiny_engine().generate("the", DRAWN)[0].outputs[0]
    with AsyncEngine(Engine(varied_model(), TINY, truncate_mode="left")) as threaded:

        async def all_of(sampling: SamplingParams) -> list[Any]:
            return [output async for output in threaded.stream("the", sampling)]

        outputs = asyncio.run(all_of(DRAWN))
        assert outputs[-1].accumulated_text == outputs[-1].outputs[0].text == whole.text
        bare = asyncio.run(all_of(DRAWN.replace(detokenize=False)))
        assert {output.outputs[0].text for output in bare} == {""}
        assert bare[-1].outputs[0].token_ids == whole.token_ids
        for refused in (DRAWN.replace(output_kind="delta"), DRAWN.replace(best_of=2)):
            with pytest.raises(RequestError, match=r"sampling\.(output_kind|best_of)"):
                asyncio.run(all_of(refused))
        best = asyncio.run(threaded.generate("the", DRAWN.replace(best_of=3)))
        assert len(best.outputs) == 1
        cut = asyncio.run(threaded.generate([*range(10, 210)], GREEDY))
        assert cut.num_truncated_tokens == 80
