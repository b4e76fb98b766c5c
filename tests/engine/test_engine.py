"""The engine's calls: what they accept, give back, honour and refuse."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import ConfigError, RequestError, RetraceError
from engine.models.dense import dense_forward
from engine.models.llama import Layer
from engine.models.packed import Wanted, pack_model
from engine.sampling_params import SamplingParams
from kernels.paged_attention import available_backends
from tests.engine.engines import tiny_engine, tokens_of, varied_model

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def text_of(prompt, sampling, engine=None):
    (output,) = (engine or tiny_engine()).generate(prompt, sampling)
    return output.outputs[0]


def test_prompts_of_every_form_in_input_order():
    engine = tiny_engine()
    chat = [{"role": "user", "content": "the answer"}]
    ids = engine.tokenizer("the answer")["input_ids"]
    rendered = engine.tokenizer.apply_chat_template(
        chat, tokenize=True, add_generation_prompt=True, return_dict=False
    )
    alone = [engine.generate(one, GREEDY)[0] for one in ("the answer", ids, chat, list(rendered))]
    assert alone[0].outputs[0].token_ids == alone[1].outputs[0].token_ids
    assert alone[2].outputs[0].token_ids == alone[3].outputs[0].token_ids
    many = engine.generate(["the answer", "is", "the answer"], GREEDY)
    assert [output.prompt for output in many] == ["the answer", "is", "the answer"]
    assert tokens_of(engine.generate([ids, list(rendered)], GREEDY)) == tokens_of([alone[1], alone[3]])
    assert tokens_of(engine.generate([chat, chat], GREEDY)) == tokens_of([alone[2]] * 2)


def test_long_and_short_requests_come_back_in_input_order():
    engine = tiny_engine()
    lengths = [20, 1, 9, 2, 15]
    outputs = engine.generate(["the"] * 5, [GREEDY.replace(max_tokens=length) for length in lengths])
    assert [len(output.outputs[0].token_ids) for output in outputs] == lengths
    assert {output.outputs[0].finish_reason for output in outputs} == {"length"}


def test_no_prompts_no_outputs():
    assert tiny_engine().generate([], GREEDY) == []


def test_a_prompt_that_cannot_run_is_named_and_leaves_nothing_behind():
    engine = tiny_engine()
    with pytest.raises(RequestError, match=r"prompt 1: .*128"):
        engine.generate([[5] * 4, [5] * 128], GREEDY)
    assert not engine.has_unfinished
    with pytest.raises(RequestError, match="prompt token 1 is 99999"):
        engine.generate([[5, 99999]], GREEDY)
    with pytest.raises(ConfigError, match="2 prompts were given 1"):
        engine.generate(["a", "b"], [GREEDY])
    engine.add_request("twice", [5], sampling=GREEDY)
    with pytest.raises(RequestError, match="unfinished already"):
        engine.add_request("twice", [5], sampling=GREEDY)
    assert engine.abort_request("twice")
    assert not engine.abort_request("twice")
    engine.check_integrity()


def test_streamed_deltas_join_to_the_text_and_split_no_character():
    engine = tiny_engine()
    for seed in range(6):
        sampling = SamplingParams(max_tokens=40, seed=seed, temperature=1.5, stop=("e",), ignore_eos=True)
        outputs = list(engine.stream("the", sampling))
        whole = text_of("the", sampling)
        assert "".join(output.delta_text for output in outputs) == outputs[-1].outputs[0].text == whole.text
        assert outputs[-1].finished
        assert outputs[-1].outputs[0].token_ids == whole.token_ids
        assert all("e" not in output.delta_text for output in outputs)
    assert not engine.has_unfinished


def test_a_stream_left_early_aborts_and_other_requests_keep_their_outputs():
    engine = tiny_engine()
    engine.add_request("other", prompt="is", sampling=GREEDY)
    stream = engine.stream("the", GREEDY.replace(max_tokens=100))
    next(stream)
    for _ in range(12):  # the other one finishes while the stream runs
        next(stream)
    stream.close()
    outputs = [output for _ in iter(lambda: engine.has_unfinished, False) for output in engine.step()]
    assert [output.request_id for output in outputs] == ["other"]
    engine.check_integrity()


def test_priority_runs_first():
    engine = tiny_engine(max_num_seqs=1, scheduling_policy="priority", num_pages=16)
    for index, priority in enumerate([5, 1, 3]):
        engine.add_request(f"p{priority}", [index + 5] * 4, sampling=GREEDY, priority=priority)
    finished = [o.request_id for _ in iter(lambda: engine.has_unfinished, False) for o in engine.step()]
    assert finished == ["p1", "p3", "p5"]


def test_stop_strings_stop_ids_and_end_of_sequence():
    free = text_of("the", SamplingParams(temperature=1.0, seed=1, max_tokens=40, ignore_eos=True))
    stop = free.text[6:8]
    cut = text_of(
        "the", SamplingParams(temperature=1.0, seed=1, max_tokens=40, ignore_eos=True, stop=(stop,))
    )
    assert cut.text == free.text[: free.text.index(stop)]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    kept = text_of(
        "the",
        SamplingParams(
            temperature=1.0,
            seed=1,
            max_tokens=40,
            ignore_eos=True,
            stop=(stop,),
            include_stop_str_in_output=True,
        ),
    )
    assert kept.text == free.text[: free.text.index(stop) + len(stop)]
    token = free.token_ids[5]
    first = free.token_ids.index(token)
    by_id = text_of(
        "the",
        SamplingParams(temperature=1.0, seed=1, max_tokens=40, ignore_eos=True, stop_token_ids=(token,)),
    )
    assert by_id.token_ids == free.token_ids[: first + 1]
    assert (by_id.finish_reason, by_id.stop_reason) == ("stop", token)
    eos = varied_model().config.eos_token_ids[0]
    only_eos = SamplingParams(temperature=0, max_tokens=9, allowed_token_ids=(eos,))
    assert text_of("the", only_eos).token_ids == (eos,)
    assert text_of("the", only_eos).stop_reason is None
    assert len(text_of("the", only_eos.replace(ignore_eos=True)).token_ids) == 9


def test_min_tokens_bans_every_end():
    eos = varied_model().config.eos_token_ids[0]
    wants_to_end = SamplingParams(temperature=0, max_tokens=9, logit_bias=((eos, 100.0),))
    assert text_of("the", wants_to_end).token_ids == (eos,)
    late = text_of("the", wants_to_end.replace(min_tokens=4))
    assert late.token_ids[4:] == (eos,)
    assert eos not in late.token_ids[:4]


def test_bad_words_never_appear():
    engine = tiny_engine()
    (token,) = engine.tokenizer("is", add_special_tokens=False)["input_ids"]
    eager = GREEDY.replace(logit_bias={token: 100.0})
    assert set(text_of("the", eager).token_ids) == {token}
    assert token not in text_of("the", eager.replace(bad_words=("is",))).token_ids
    # "isis" bans only the second one in a row.
    alternating = text_of("the", eager.replace(bad_words=("isis",))).token_ids
    assert alternating[::2] == (token,) * 4
    assert token not in alternating[1::2]


def test_allowed_tokens_and_bias():
    allowed = (40, 41, 42)
    got = text_of("the", SamplingParams(temperature=2.0, seed=3, max_tokens=30, allowed_token_ids=allowed))
    assert set(got.token_ids) == set(allowed)
    assert set(text_of("the", GREEDY.replace(logit_bias={77: 100.0})).token_ids) == {77}


def test_penalties_act_on_what_was_generated():
    repeating = text_of("the", GREEDY.replace(logit_bias={77: 30.0}, max_tokens=20))
    assert repeating.token_ids.count(77) > 10
    for penalty in ({"frequency_penalty": 2.0}, {"presence_penalty": 2.0}):
        # A logit bias that a penalty of 2 can overcome.
        free = text_of("the", GREEDY.replace(max_tokens=40))
        tame = text_of("the", GREEDY.replace(max_tokens=40, **penalty))
        assert len(set(tame.token_ids)) >= len(set(free.token_ids))
        assert tame.token_ids != free.token_ids
    assert text_of("the", GREEDY.replace(max_tokens=40, repetition_penalty=50.0)).token_ids != free.token_ids


def test_log_probabilities_of_output_and_prompt():
    engine = tiny_engine()
    rng = np.random.default_rng(0)
    prompt = rng.integers(4, 250, 70).tolist()  # three chunks, since each step has 8 rows of logits
    sampling = GREEDY.replace(logprobs=3, prompt_logprobs=2, n=1)
    for _ in range(2):  # the second time the cache holds the prompt, which must not matter
        (output,) = engine.generate([prompt], sampling)
        completion = output.outputs[0]
        tokens = prompt + list(completion.token_ids)
        padded = np.zeros(128, np.int32)
        padded[: len(tokens)] = tokens
        logits = np.asarray(dense_forward(varied_model().model, padded[None]))[0].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        assert output.prompt_logprobs is not None
        assert output.prompt_logprobs[0] is None
        assert len(output.prompt_logprobs) == len(prompt)
        for position, entry in enumerate(output.prompt_logprobs[1:]):
            assert entry is not None
            assert entry.token_id == prompt[position + 1]
            assert entry.logprob == pytest.approx(logits[position, entry.token_id], abs=1e-4)
            assert [token for token, _ in entry.top] == np.argsort(-logits[position])[:2].tolist()
        assert completion.logprobs is not None
        for position, entry in enumerate(completion.logprobs):
            row = logits[len(prompt) - 1 + position]
            assert entry.logprob == pytest.approx(row[entry.token_id], abs=1e-4)
            assert len(entry.top) == 3
        assert completion.cumulative_logprob == pytest.approx(sum(e.logprob for e in completion.logprobs))


def test_special_tokens_are_skipped_or_shown():
    eos = varied_model().config.eos_token_ids[0]
    sampling = GREEDY.replace(max_tokens=3, allowed_token_ids=(eos,))
    assert text_of("the", sampling).text == ""
    assert text_of("the", sampling.replace(skip_special_tokens=False)).text == "<|im_end|>" * 3


def test_output_ends_at_the_models_length():
    (output,) = tiny_engine().generate([[9] * 120], GREEDY.replace(max_tokens=50))
    assert len(output.outputs[0].token_ids) == 8
    assert output.outputs[0].finish_reason == "length"


def test_a_shape_that_was_not_declared_is_refused_naming_the_argument():
    engine = tiny_engine()
    runner = engine._runner
    bucket = runner.buckets[0]
    arrays = runner._batch.idle_arrays(bucket)
    wrong = dataclasses.replace(arrays, numbers=arrays.numbers[:-1])
    with pytest.raises(RetraceError, match="numbers"):
        runner._call(bucket, wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"page_size": 48}, "engine.page_size=48: give a power of two"),
        ({"page_size": -16}, "engine.page_size=-16"),
        ({"max_num_seqs": 0}, "engine.max_num_seqs=0"),
        ({"max_num_seqs": True}, "engine.max_num_seqs=True"),
        ({"max_num_seqs": 64, "max_num_batched_tokens": 32}, "at least engine.max_num_seqs"),
        ({"hbm_utilization": 1.5}, "engine.hbm_utilization=1.5"),
        ({"dtype": "float8"}, "choose one of float32, bfloat16"),
        ({"attention_backend": "cuda"}, "choose one of auto, cpu, xla"),
        ({"scheduling_policy": "lifo"}, "choose one of fcfs, priority"),
        ({"async_scheduling": "no"}, "engine.async_scheduling=.no.: give true or false"),
    ],
)
def test_impossible_options_are_refused_by_name(options, message):
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**options)


def test_more_than_the_model_or_the_memory_holds_is_refused_with_the_numbers():
    with pytest.raises(ConfigError, match="made for at most"):
        Engine(varied_model(), EngineConfig(max_model_len=10**6))
    with pytest.raises(ConfigError, match=r"room for \d+ pages .* needs 8"):
        Engine(varied_model(), EngineConfig(max_model_len=128, page_size=16, kv_cache_bytes=10_000))


def test_statistics_add_up():
    engine = tiny_engine(num_pages=44)
    outputs = engine.generate([[7] * 40, [7] * 39 + [9], [8] * 5], GREEDY)
    stats = engine.stats()
    assert stats.num_steps == len(stats.step_seconds) == len(stats.batch_occupancy)
    assert stats.num_generated_tokens == sum(len(output.outputs[0].token_ids) for output in outputs)
    assert stats.num_prompt_tokens == 85
    assert stats.num_cached_tokens == sum(output.num_cached_tokens for output in outputs) == 32
    assert stats.num_computed_tokens == 85 - 32 + stats.num_generated_tokens - 3
    assert stats.pages_free + stats.pages_cached == engine.num_pages
    assert engine.stats().step_seconds == ()


@pytest.mark.parametrize("options", [{"kv_dtype": "bfloat16"}, {"dtype": "bfloat16"}])
def test_half_the_width_holds_twice_the_pages_and_says_nearly_the_same(options):
    """`dtype` widens or narrows the pages too, unless `kv_dtype` says otherwise."""
    sampling = GREEDY.replace(logprobs=0)
    narrow, wide = tiny_engine(**options), tiny_engine()
    assert narrow.num_pages == 2 * wide.num_pages
    near, exact = text_of("the answer", sampling, narrow), text_of("the answer", sampling, wide)
    assert near.cumulative_logprob != exact.cumulative_logprob
    assert near.cumulative_logprob == pytest.approx(exact.cumulative_logprob, rel=0.05)


@pytest.mark.parametrize(
    "options", [{"weight_dtype": "int8"}, {"weight_dtype": "int4"}, {"kv_dtype": "int8"}]
)
@pytest.mark.parametrize("backend", available_backends())
def test_narrow_numbers_say_nearly_the_same_whatever_the_kernels(options, backend):
    sampling = GREEDY.replace(logprobs=0)
    narrow = tiny_engine(**options, attention_backend=backend, linear_backend=backend)
    near, exact = text_of("the answer", sampling, narrow), text_of("the answer", sampling, tiny_engine())
    assert near.cumulative_logprob != exact.cumulative_logprob
    far = 0.3 if "int4" in options.values() else 0.1
    assert near.cumulative_logprob == pytest.approx(exact.cumulative_logprob, rel=far)
    if "kv_dtype" in options:  # a float32 scale beside each head of 16 numbers
        assert tiny_engine(20, **options).num_pages == 20 * 16 * 4 // (16 + 4)


@pytest.mark.parametrize("weight_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("backend", available_backends())
def test_how_weights_are_stored_does_not_narrow_activations(tiny, weight_dtype, backend):
    """With tied embeddings too, which come out of the packed head."""
    packed = pack_model(tiny.model, weight_dtype, backend)
    assert packed.embedded(jnp.arange(3)).dtype == jnp.float32


@pytest.mark.parametrize("backend", available_backends())
def test_behind_the_last_attention_only_wanted_tokens_are_computed(tiny, backend):
    """Their hidden states have the bits that they have among all; what others come to is not looked at."""
    packed = pack_model(tiny.model, "float32", backend)
    num_heads, width = tiny.config.num_heads, tiny.config.num_heads * tiny.config.head_dim
    shapes = []

    def attend(layer, q, k, v, pages):
        group = num_heads // k.shape[1]
        return q + jnp.repeat(k, group, axis=1) * jnp.repeat(v, group, axis=1), pages + 1

    class Watched(Layer):
        def rest(self, x, attended, num_rows=None):
            shapes.append(attended.shape)
            return super().rest(x, attended, num_rows)

    layer_graph = nnx.graphdef(nnx.eval_shape(lambda: Watched(tiny.config, jnp.float32)))
    watched = dataclasses.replace(packed, layer_graph=layer_graph)
    ids = jnp.arange(64, dtype=jnp.int32) % tiny.config.vocab_size
    tokens = jnp.array([3, 17, 39, *[0] * 13], jnp.int32)

    @jax.jit
    def run(model, wanted):
        return model.forward(ids, ids, jnp.int32(0), attend, jnp.int32(64), wanted)

    every, pages = run(watched, None)
    some, same_pages = run(watched, Wanted(tokens, jnp.int32(3)))
    np.testing.assert_array_equal(some[:3], every[tokens[:3]])
    assert pages == same_pages == tiny.config.num_layers, "the last layer's keys and values are written too"
    assert shapes[-1] == (16, width)
