"""The engine by the names that eSurge's users know: each option and each sampling field does what it says."""

from __future__ import annotations

import copy
import functools
import logging
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import ConfigError, ModelError, RequestError
from engine.options import CacheConfig, SchedulerConfig
from engine.sampling_params import SamplingParams
from tests.engine.engines import PAGE_BYTES, tiny_engine, tokens_of, varied_model

TINY = EngineConfig(
    max_num_seqs=8,
    max_num_batched_tokens=32,
    min_token_pad=32,
    max_model_len=128,
    page_size=16,
    kv_cache_bytes=48 * 16 * PAGE_BYTES,
)
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
DRAWN = SamplingParams(temperature=1.0, seed=7, max_tokens=24, ignore_eos=True)


@functools.cache
def engine_with(**options: Any) -> Engine:
    return Engine(varied_model(), TINY, **options)


def finish(engine: Engine) -> dict[str, Any]:
    """Step to the end; the last output of each request."""
    outputs = {}
    while engine.has_unfinished:
        outputs |= {output.request_id: output for output in engine.step()}
    return outputs


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
    assert tokens_of(engine.generate("the", GREEDY)) == tokens_of(engine.generate("the", sampling_params=GREEDY))
    with pytest.raises(ConfigError, match="give one of them"):
        engine.generate("the", GREEDY, sampling_params=GREEDY)
    assert SamplingParams(max_new_tokens=5) == SamplingParams(max_tokens=5)
    with pytest.raises(RequestError, match="nearest name is 'temperature'"):
        SamplingParams(temprature=0.5)


def test_an_output_tells_its_times_and_counts():
    (output,) = tiny_engine().generate("the", DRAWN.replace(n=2))
    assert output.num_generated_tokens == sum(len(each.token_ids) for each in output.outputs) == 48
    assert output.accumulated_text == output.outputs[0].text
    assert 0 < output.first_token_time <= output.processing_time
    assert 0 < output.time_spent_generating <= output.processing_time
    assert output.tokens_per_second == pytest.approx(48 / output.time_spent_generating)
    assert (output.update_seq, output.num_truncated_tokens) == (1, 0)
    assert (output.tool_calls, output.reasoning_content) == ((), None)


# -- sampling ----------------------------------------------------------------------------------------


def test_best_of_returns_the_likeliest_of_all_that_were_drawn():
    engine = tiny_engine()
    sampling = DRAWN.replace(n=6, logprobs=1, max_tokens=6)
    every = engine.generate("the", sampling)[0].outputs
    ranked = sorted(every, key=lambda each: each.cumulative_logprob, reverse=True)
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
    assert finish(engine)["on"].outputs[0].token_ids == whole.token_ids


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
        SamplingParams(detokenize=False, stop=["x"])


def test_special_tokens_can_be_set_apart():
    engine = tiny_engine()
    tokenizer = engine.tokenizer
    plain = tokenizer("the", add_special_tokens=False)["input_ids"]
    special = tokenizer.convert_tokens_to_ids("<|im_start|>")
    sampling = SamplingParams(temperature=1, seed=1, max_tokens=30, ignore_eos=True, skip_special_tokens=False)
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
        SamplingParams(output_kind="whole")


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
        assert tokens_of([finish(engine)["r"]]) == expected
        engine.check_integrity()


def test_draws_are_counted_and_nobody_sees_it():
    engine = engine_with(sampler_metrics=True)
    known = tiny_engine().generate(["the", "is"], [DRAWN.replace(logprobs=0), GREEDY.replace(logprobs=0)])
    logprobs = [entry.logprob for output in known for entry in output.outputs[0].logprobs]
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


# -- chat --------------------------------------------------------------------------------------------

CHAT = [{"role": "user", "content": "the answer"}]
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% if enable_thinking is defined %}"
    "<think={{ enable_thinking }}>{% endif %}{{ name | default('') }}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_a_chat_is_answered_through_the_template():
    engine = tiny_engine()
    output = engine.chat(CHAT, GREEDY)
    assert tokens_of([output]) == tokens_of(engine.generate([CHAT], GREEDY))
    streamed = list(engine.chat(CHAT, sampling_params=DRAWN, stream=True))
    assert "".join(each.delta_text for each in streamed) == engine.chat(CHAT, DRAWN).outputs[0].text
    assert not engine.has_unfinished


def test_tools_reasoning_and_variables_reach_the_template():
    engine = tiny_engine(max_model_len=192)
    tools = [{"type": "function", "function": {"name": "f"}}]
    output = engine.chat(
        CHAT,
        GREEDY,
        tools=tools,
        reasoning=False,
        chat_template=TEMPLATE,
        chat_template_kwargs={"name": "Ada"},
        request_id="mine",
    )
    text = (
        '[{"function": {"name": "f"}, "type": "function"}]<think=False>Adauser: the answer\nassistant: '
    )
    read = engine.tokenizer.decode(output.prompt_token_ids)
    assert sorted(read) == sorted(text)
    assert read.endswith("<think=False>Adauser: the answer\nassistant: ")
    assert output.request_id == "mine"
    with pytest.raises(RequestError, match="'tools'"):
        engine.chat(CHAT, GREEDY, tools=tools, chat_template_kwargs={"tools": []})
    assert engine.chat(CHAT, GREEDY, chat_template=TEMPLATE, add_generation_prompt=False).prompt_token_ids == (
        tuple(engine.tokenizer("user: the answer\n")["input_ids"])
    )


def test_completions_are_read_by_the_parsers_of_the_engine():
    parsers = pytest.importorskip("engine.parsers", reason="merged separately")
    engine = engine_with(tool_parser="hermes", reasoning_parser="deepseek_r1")
    output = engine.chat(CHAT, DRAWN, tools=[{"type": "function", "function": {"name": "f"}}])
    sample = output.outputs[0]
    expected = parsers.parse_message(
        sample.text, "hermes", "deepseek_r1", [{"type": "function", "function": {"name": "f"}}]
    )
    assert sample.message == expected
    assert (output.reasoning_content, output.tool_calls) == (expected.reasoning, expected.tool_calls)
    with pytest.raises(ConfigError, match=r"engine\.tool_parser='no'"):
        Engine(varied_model(), TINY, tool_parser="no")
    assert Engine(varied_model(), TINY, tool_parser="auto", compile_runner=False).chat(CHAT, GREEDY)


def test_stop_strings_inside_the_reasoning_stop_only_where_asked():
    pytest.importorskip("engine.parsers", reason="merged separately")
    free = tiny_engine().chat(CHAT, DRAWN).outputs[0].text
    stop = free[3:5]
    thinking = engine_with(tool_parser="hermes", reasoning_parser="deepseek_r1")
    assert thinking.chat(CHAT, DRAWN.replace(stop=[stop])).outputs[0].text == free
    strict = engine_with(reasoning_parser="deepseek_r1", ignore_stop_strings_in_reasoning=False)
    assert strict.chat(CHAT, DRAWN.replace(stop=[stop])).outputs[0].text == free[: free.index(stop)]
