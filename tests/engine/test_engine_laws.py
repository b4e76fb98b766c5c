"""A request's tokens depend on the model, its prompt, its sampling and its identity, and on nothing else."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine import batch as batch_module
from engine.compilation import counting_compiles
from engine.group_costs import GroupCosts
from engine.models.dense import dense_forward
from engine.sampling_params import SamplingParams
from tests.engine.engines import tiny_engine, tokens_of, varied_model

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
DRAWN = SamplingParams(temperature=1.2, top_p=0.95, max_tokens=12, ignore_eos=True, logprobs=2)


def prompts(count: int = 10, shared: int = 37, seed: int = 0) -> list[list[int]]:
    """Prompts of 3 to 70 tokens; the even ones begin alike."""
    rng = np.random.default_rng(seed)
    head = rng.integers(4, 250, shared).tolist()
    return [
        (head if index % 2 == 0 else []) + rng.integers(4, 250, rng.integers(3, 33)).tolist()
        for index in range(count)
    ]


def run(engine, token_ids, sampling, order=None):
    """Tokens and log-probabilities by prompt, requests added in `order`."""
    for index in order or range(len(token_ids)):
        engine.add_request(f"r{index}", token_ids[index], sampling=sampling, identity=f"row {index}")
    outputs = {}
    while engine.has_unfinished:
        outputs.update({output.request_id: output for output in engine.step()})
        engine.check_integrity()
    stats = engine.stats()
    assert stats.pages_held == 0, "an idle engine holds no pages"
    return [
        [(sample.token_ids, sample.cumulative_logprob) for sample in outputs[f"r{index}"].outputs]
        for index in range(len(token_ids))
    ]


def dense_greedy(token_ids: list[int], num_tokens: int) -> list[int]:
    """Greedy continuation by the plain causal model, one sequence at a time."""
    tokens = list(token_ids)
    for _ in range(num_tokens):
        padded = np.zeros(128, np.int32)
        padded[: len(tokens)] = tokens
        logits = np.asarray(dense_forward(varied_model().model, padded[None]))[0]
        tokens.append(int(logits[len(tokens) - 1].argmax()))
    return tokens[len(token_ids) :]


def test_greedy_tokens_are_the_dense_models():
    token_ids = prompts(6)
    got = run(tiny_engine(), token_ids, GREEDY)
    for prompt, samples in zip(token_ids, got, strict=True):
        assert list(samples[0][0]) == dense_greedy(prompt, GREEDY.max_tokens)


@pytest.mark.parametrize(
    "options",
    [
        {"enable_prefix_caching": False},
        {"async_scheduling": False},
        {"long_prefill_token_threshold": 7},
        {"scheduling_policy": "priority"},
        {"max_num_seqs": 3, "max_num_batched_tokens": 32},
        {"max_num_batched_tokens": 64, "min_token_pad": 16},
    ],
)
@pytest.mark.parametrize("sampling", [GREEDY, DRAWN])
def test_nothing_about_the_engine_changes_a_bit(options, sampling):
    """Cache, chunk size, batch mix and order, step size: the same tokens and log-probabilities to the bit."""
    token_ids = prompts()
    wanted = run(tiny_engine(), token_ids, sampling)
    engine = tiny_engine(**options)
    assert run(engine, token_ids, sampling, order=list(reversed(range(len(token_ids))))) == wanted


def test_preemption_changes_no_bit():
    token_ids = [prompt[:12] for prompt in prompts(8)]
    sampling = DRAWN.replace(max_tokens=70)
    wanted = run(tiny_engine(), token_ids, sampling)
    engine = tiny_engine(num_pages=11)  # room for two of them at their full length
    assert run(engine, token_ids, sampling) == wanted
    assert engine.stats().preemptions > 0, "the case is there to preempt"


def test_a_second_run_from_the_cache_gives_the_same_bits():
    engine = tiny_engine()
    token_ids = prompts(seed=5)
    first = run(engine, token_ids, DRAWN)
    hits = engine.stats().num_cached_tokens
    assert run(engine, token_ids, DRAWN) == first
    assert engine.stats().num_cached_tokens > hits


@pytest.mark.parametrize("page_size", [8, 64, 128])
def test_page_size_changes_no_token(page_size):
    token_ids = prompts(6)
    wanted = run(tiny_engine(), token_ids, GREEDY)
    got = run(tiny_engine(page_size=page_size, num_pages=128 // page_size * 8), token_ids, GREEDY)
    assert [[s[0] for s in samples] for samples in got] == [[s[0] for s in samples] for samples in wanted]


def test_alone_or_in_company():
    engine = tiny_engine()
    token_ids = prompts(seed=9)
    together = run(engine, token_ids, DRAWN)
    for index, prompt in enumerate(token_ids):
        engine.add_request("me", prompt, sampling=DRAWN, identity=f"row {index}")
        (output,) = [output for _ in iter(lambda: engine.has_unfinished, False) for output in engine.step()]
        assert [(s.token_ids, s.cumulative_logprob) for s in output.outputs] == together[index]


def test_samples_share_their_prompts_pages():
    engine = tiny_engine(num_pages=47)
    before = engine.stats()
    prompt = prompts(1, shared=64)[0]
    sampling = DRAWN.replace(n=4)
    outputs = engine.generate([prompt], sampling)
    after = engine.stats()
    assert len(set(tokens_of(outputs)[0])) == 4, "four samples that differ"
    # The prompt is computed once; the others compute its last token, which their first draws come from.
    assert after.num_cached_tokens - before.num_cached_tokens == 3 * (len(prompt) - 1)
    computed = after.num_computed_tokens - before.num_computed_tokens
    assert computed == len(prompt) + 3 + 4 * (sampling.max_tokens - 1)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN])
def test_reading_shared_pages_once_changes_no_bit(sampling):
    token_ids = prompts()
    wanted = run(tiny_engine(enable_prefix_caching=False), token_ids, sampling)
    engine = tiny_engine(num_pages=46)  # an engine of its own: what it counts as cheap is changed
    if engine._runner.backends.attention != "cpu":
        pytest.skip("this backend reads shared pages by row")
    batch, grouped = engine._runner._batch, []
    batch._group_costs = GroupCosts(token=1.0, query=0.0, group=0.0)
    find = batch_module.find_groups

    def noting(*args):
        groups = find(*args)
        grouped.append(bool(groups))
        return groups

    batch_module.find_groups = noting
    try:
        assert run(engine, token_ids, sampling) == wanted
    finally:
        batch_module.find_groups = find
    assert sum(grouped) > 10, "most steps have a group"


def test_identity_not_request_id_decides_a_draw():
    engine = tiny_engine()
    prompt = prompts(1)[0]

    def draw(request_id, **given):
        engine.add_request(request_id, prompt, **given)
        return [
            o.outputs[0].token_ids for _ in iter(lambda: engine.has_unfinished, False) for o in engine.step()
        ]

    mine = draw("a", sampling=DRAWN, identity="row")
    assert draw("b", sampling=DRAWN, identity="row") == mine
    assert draw("c", sampling=DRAWN, identity="other row") != mine
    seeded = DRAWN.replace(seed=5)
    assert draw("d", sampling=seeded, identity="x") == draw("e", sampling=seeded, identity="y")


def test_nan_in_pages_nobody_holds_changes_nothing():
    token_ids = prompts(5)
    wanted = run(tiny_engine(), token_ids, DRAWN)
    poisoned = tiny_engine(num_pages=45)  # an engine of its own, none of whose pages is cached yet
    runner = poisoned._runner
    runner._kv_pages = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), runner._kv_pages)
    assert run(poisoned, token_ids, DRAWN) == wanted


def test_nothing_is_traced_after_the_start():
    engine = tiny_engine()
    with counting_compiles() as count:
        run(
            engine,
            prompts(seed=3),
            DRAWN.replace(presence_penalty=0.5, bad_words=("the",), logit_bias={7: 1.0}),
        )
    assert count.num_requests == 0
