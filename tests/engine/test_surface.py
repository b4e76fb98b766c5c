"""The engine by the names that eSurge's users know: each option does what it says."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest

from engine.engine import Engine
from engine.errors import ConfigError, ModelError, RequestError
from engine.options import CacheConfig, SchedulerConfig
from engine.sampling_params import SamplingParams
from tests.engine.engines import (
    PAGE_BYTES,
    TINY,
    engine_with,
    last_outputs,
    tiny_engine,
    tokens_of,
    varied_model,
)

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
DRAWN = SamplingParams(temperature=1.0, seed=7, max_tokens=24, ignore_eos=True)


# -- the constructor ---------------------------------------------------------------------------------


def test_one_constructor_for_all_the_ways_to_say_it():
    by_config = tiny_engine()
    tokenizer = varied_model().tokenizer
    by_name = Engine(
        model=varied_model(),
        tokenizer=tokenizer,
        max_model_len=128,
        scheduler_config=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=32),
        cache_config=CacheConfig(page_size=16, kv_cache_bytes=48 * 16 * PAGE_BYTES),
        min_token_pad=32,
    )
    assert by_name.config == by_config.config
    assert by_name.num_pages == by_config.num_pages
    assert tokens_of(by_name.generate("the", GREEDY)) == tokens_of(by_config.generate("the", GREEDY))


def test_a_model_by_its_path_with_another_tokenizer(tiny_folder):
    engine = Engine(
        model=str(tiny_folder),
        tokenizer=str(tiny_folder),
        max_num_seqs=4,
        max_num_batched_tokens=16,
        max_model_len=64,
        kv_cache_bytes=1 << 20,
        compile_runner=False,
    )
    assert engine.esurge_name == engine.model_name
    assert len(engine.generate("the", GREEDY)[0].outputs[0].token_ids) == 8


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (object(), {}, "model is a object"),
        (None, {"page_sizes": 16}, "nearest name is 'page_size'"),
        (None, {"tokenizer": object()}, "fast tokenizer"),
        (None, {"revision": "main"}, "loaded already"),
        (None, {"extra_eos_token_ids": [10**6]}, "vocabulary has"),
        (None, {"reserve_tokens": 127, "max_model_len": 128}, "leaves no room"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_compiled(model, options, message):
    with pytest.raises(ConfigError, match=message):
        Engine(varied_model() if model is None else model, **options)


def test_a_tokenizer_of_another_model_is_refused():
    larger = copy.deepcopy(varied_model().tokenizer)
    larger.add_tokens(["more"])
    with pytest.raises(ModelError, match="do not belong together"):
        Engine(varied_model(), TINY, tokenizer=larger)


# -- requests ----------------------------------------------------------------------------------------


def test_requests_without_an_id_get_one_and_show_how_they_grow():
    engine = tiny_engine()
    engine.add_request("request-0", prompt="is", sampling=GREEDY)
    request_id = engine.add_request(prompt="the", sampling_params=DRAWN)
    others = {engine.add_request(prompt="an", sampling_params=GREEDY) for _ in range(3)}
    assert len({request_id, "request-0", *others}) == 5
    seen: dict[str, list[Any]] = {}
    while engine.has_unfinished:
        for output in engine.step():
            seen.setdefault(output.request_id, []).append(output)
    assert seen.keys() == {request_id, "request-0", *others}
    assert len(seen["request-0"]) == 1, "a request with an id is whole when it comes"
    streamed = seen[request_id]
    whole = engine.generate("the", sampling_params=DRAWN)[0].outputs[0].text
    assert "".join(output.delta_text for output in streamed) == whole
    assert [output.update_seq for output in streamed] == [*range(1, len(streamed) + 1)]
    assert [output.accumulated_text for output in streamed][-1] == whole
    assert len(streamed) > 3


def test_both_names_of_the_sampling_and_not_both_at_once():
    engine = tiny_engine()
    assert tokens_of(engine.generate("the", GREEDY)) == tokens_of(
        engine.generate("the", sampling_params=GREEDY)
    )
    with pytest.raises(ConfigError, match="give one of them"):
        engine.generate("the", GREEDY, sampling_params=GREEDY)
    assert SamplingParams(max_new_tokens=5) == SamplingParams(max_tokens=5)  # type: ignore[call-arg]
    with pytest.raises(RequestError, match="nearest name is 'temperature'"):
        SamplingParams(temprature=0.5)  # type: ignore[call-arg]


def test_an_output_tells_its_times_and_counts():
    (output,) = tiny_engine().generate("the", DRAWN.replace(n=2))
    assert output.num_generated_tokens == sum(len(each.token_ids) for each in output.outputs) == 48
    assert output.accumulated_text == output.outputs[0].text
    first, generating, whole = output.first_token_time, output.time_spent_generating, output.processing_time
    assert first is not None
    assert generating is not None
    assert whole is not None
    assert 0 < first <= whole
    assert 0 < generating <= whole
    assert output.tokens_per_second == pytest.approx(48 / generating)
    assert (output.update_seq, output.num_truncated_tokens) == (1, 0)
    assert (output.tool_calls, output.reasoning_content) == ((), None)


# -- options of requests -----------------------------------------------------------------------------


def test_long_prompts_are_refused_or_cut_as_the_engine_was_told(caplog: pytest.LogCaptureFixture):
    text = "the answer is in the " * 12
    plain = tiny_engine()
    tokens = plain.tokenizer(text)["input_ids"]
    assert len(tokens) > 128
    with pytest.raises(RequestError, match=r"max_model_len.*128"):
        plain.generate(text, GREEDY)
    cutting = engine_with(truncate_mode="left", reserve_tokens=20, esurge_name="cutter")
    with caplog.at_level(logging.INFO, "engine"):
        (output,) = cutting.generate(text, GREEDY)
    assert output.prompt_token_ids == tuple(tokens[-100:])
    assert output.num_truncated_tokens == len(tokens) - 100
    assert output.prompt == plain.tokenizer.decode(tokens[-100:])
    assert tokens_of([output]) == tokens_of(plain.generate([tokens[-100:]], GREEDY))
    assert "of its prompt's" in caplog.text
    caplog.clear()
    silent = engine_with(truncate_mode="right", decode_truncated_prompt=False, silent_mode=True)
    with caplog.at_level(logging.INFO):
        (output,) = silent.generate(text, GREEDY)
    assert output.prompt == text
    assert output.prompt_token_ids == tuple(tokens[:120])
    assert caplog.text == ""
    strict = engine_with(strict_context=True)
    with pytest.raises(RequestError, match="at most 128 tokens"):
        strict.generate([[5] * 121], GREEDY)


def test_an_engine_says_its_name(caplog: pytest.LogCaptureFixture):
    assert tiny_engine().esurge_name == varied_model().name
    with caplog.at_level(logging.INFO, "engine"):
        named = Engine(varied_model(), TINY, esurge_name="mill", compile_runner=False)
        assert "'mill'" in caplog.text
        caplog.clear()
        Engine(varied_model(), TINY, esurge_name="mute", silent_mode=True, compile_runner=False)
        assert caplog.text == ""
    assert named.esurge_name == named.model_name == "mill"


def test_extra_ends_and_stop_strings_are_every_requests():
    free = tiny_engine().generate("the", DRAWN)[0].outputs[0]
    token = free.token_ids[5]
    ends = engine_with(extra_eos_token_ids=(token,))
    (stopped,) = ends.generate("the", DRAWN.replace(ignore_eos=False))
    assert stopped.outputs[0].token_ids == free.token_ids[: free.token_ids.index(token) + 1]
    assert stopped.outputs[0].finish_reason == "stop"
    stop = free.text[3:5]
    stops = engine_with(extra_stops=stop)
    assert stops.generate("the", DRAWN)[0].outputs[0].text == free.text[: free.text.index(stop)]
    with pytest.raises(RequestError, match="detokenize"):
        stops.generate("the", DRAWN.replace(detokenize=False))


def test_a_callback_sees_and_changes_what_each_request_runs_with():
    seen = []

    def shorten(sampling, facts):
        seen.append((dict(sampling.extra_args), facts["prompt"], facts["prompt_token_ids"]))
        most = dict(sampling.extra_args).get("most")
        return None if most is None else sampling.replace(max_tokens=most)

    engine = engine_with(sampling_params_callback=shorten)
    lengths = [
        len(engine.generate("the", GREEDY.replace(extra_args=extra))[0].outputs[0].token_ids)
        for extra in ({"most": 3}, {})
    ]
    assert lengths == [3, 8]
    ids = tuple(engine.tokenizer("the")["input_ids"])
    assert seen == [({"most": 3}, "the", ids), ({}, "the", ids)]
    with pytest.raises(RequestError, match="this engine has none"):
        tiny_engine().generate("the", GREEDY.replace(extra_args={"most": 3}))
    wrong = engine_with(sampling_params_callback=lambda sampling, facts: {"max_tokens": 3})
    with pytest.raises(RequestError, match="gave a dict"):
        wrong.generate("the", GREEDY)


def test_the_last_outputs_are_kept():
    engine = engine_with(max_request_outputs=2)
    outputs = engine.generate(["the", "is", "an"], [GREEDY.replace(max_tokens=n) for n in (2, 4, 6)])
    assert engine.request_output(outputs[0].request_id) is None
    assert [engine.request_output(output.request_id) for output in outputs[1:]] == outputs[1:]
    assert tiny_engine().request_output(outputs[0].request_id) is None


def test_idleness_forgets_cached_prefixes():
    prompt = [*range(10, 60)]
    for seconds, num_found in ((0.0, 0), (1000.0, 49), (None, 49)):
        engine = engine_with(idle_reset_seconds=seconds)
        engine.generate([prompt], GREEDY)
        assert engine.generate([prompt], GREEDY)[0].num_cached_tokens == num_found


def test_a_pause_gives_memory_back_unless_it_is_to_be_kept():
    prompt = [*range(10, 60)]
    expected = tokens_of(tiny_engine().generate([prompt], DRAWN))
    for destroys in (True, False):
        engine = engine_with(destroy_pages_on_pause=destroys)
        engine.add_request("r", prompt, sampling=DRAWN)
        for _ in range(8):
            engine.step()
        engine.pause()
        assert (engine._runner._kv_pages is None) == destroys
        assert (engine.stats().pages_cached == 0) == destroys
        engine.resume()
        assert tokens_of([last_outputs(engine)["r"]]) == expected
        engine.check_integrity()


def test_draws_are_counted_and_nobody_sees_it():
    engine = engine_with(sampler_metrics=True)
    known = tiny_engine().generate(["the", "is"], [DRAWN.replace(logprobs=0), GREEDY.replace(logprobs=0)])
    logprobs = [entry.logprob for output in known for entry in output.outputs[0].logprobs or ()]
    outputs = engine.generate(["the", "is"], [DRAWN, GREEDY])
    assert tokens_of(outputs) == tokens_of(known)
    assert [output.outputs[0].logprobs for output in outputs] == [None, None]
    stats = engine.sampler_stats()
    assert (stats.num_tokens, stats.num_greedy_tokens) == (32, 8)
    assert stats.mean_logprob == pytest.approx(sum(logprobs) / 32)
    assert stats.min_logprob == pytest.approx(min(logprobs))
    assert engine.sampler_stats().num_tokens == 0
    with pytest.raises(ConfigError, match="sampler_metrics"):
        tiny_engine().sampler_stats()


def test_cached_prefixes_hold_no_more_pages_than_they_may():
    prompts = [[*range(start, start + 40)] for start in range(10, 200, 40)]
    for capacity, num_pages in ((3, 3), (0.25, 12), (0, 0)):
        engine = Engine(varied_model(), TINY, prefix_cache_capacity=capacity)
        engine.generate(prompts, GREEDY)
        assert engine.stats().pages_cached == num_pages
        engine.check_integrity()
    whole = tiny_engine(max_num_seqs=4)
    whole.generate(prompts, GREEDY)
    assert whole.stats().pages_cached > 12
