"""The engine with the real model: transformers' greedy tokens, and the same bits under any schedule."""

from __future__ import annotations

import math
from typing import Any

import pytest

from engine.checkpoints import LoadedModel
from engine.config import EngineConfig
from engine.engine import Engine
from engine.sampling_params import SamplingParams
from jobs.demo.docstrings import docstrings
from tests.parity.cases import NEAR_TIE, REAL_FILE
from tests.parity.compare import load_references

GREEDY = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)


@pytest.fixture(scope="module")
def engine(real: LoadedModel) -> Engine:
    return Engine(
        real,
        EngineConfig(
            max_num_seqs=16,
            max_num_batched_tokens=64,
            min_token_pad=16,
            max_model_len=512,
            kv_cache_bytes=300 << 20,
        ),
    )


def test_greedy_continuations_equal_transformers(engine):
    """64 tokens of 16 chats, all in flight together; they may part where the top two were that close."""
    references = load_references(str(REAL_FILE))
    assert len(references) == 16
    outputs = engine.generate([reference.prompt_ids.tolist() for reference in references], GREEDY)
    near_ties = 0
    for output, reference in zip(outputs, references, strict=True):
        got = output.outputs[0].token_ids
        for index, (mine, theirs) in enumerate(zip(got, reference.output_ids.tolist(), strict=True)):
            if mine != theirs:
                assert reference.gaps[index] < NEAR_TIE, (output.request_id, index)
                near_ties += 1
                break  # past a near tie the two texts are different texts
    print(f"continuations that parted at a near tie: {near_ties} of 16")


def test_bits_do_not_depend_on_the_schedule(engine):
    """The prompts again, each alone and from the cache: the same tokens and log-probabilities."""
    references = load_references(str(REAL_FILE))[:4]
    prompts = [reference.prompt_ids.tolist() for reference in references]
    drawn = SamplingParams(temperature=1.0, seed=7, max_tokens=16, ignore_eos=True, logprobs=1)
    together = [output.outputs[0] for output in engine.generate(prompts, drawn)]
    for prompt, wanted in zip(prompts, together, strict=True):
        (alone,) = engine.generate([prompt], drawn)
        assert alone.outputs[0].token_ids == wanted.token_ids
        assert alone.outputs[0].cumulative_logprob == wanted.cumulative_logprob


@pytest.fixture(scope="module")
def text_ids(real: LoadedModel) -> list[list[int]]:
    """8 pieces of 512 tokens of real text."""
    text = "\n\n".join(entry.text for entry in docstrings(min_chars=200, max_chars=20_000))
    ids = real.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return [ids[start : start + 512] for start in range(0, 4096, 512)]


def perplexity(real: LoadedModel, pieces: list[list[int]], **options: Any) -> float:
    engine = Engine(real, EngineConfig(max_model_len=513, kv_cache_bytes=400 << 20, **options))
    outputs = engine.generate(pieces, GREEDY.replace(max_tokens=1, prompt_logprobs=0))
    entries = [entry for output in outputs for entry in output.prompt_logprobs or () if entry is not None]
    assert len(entries) == 8 * 511
    return math.exp(-sum(entry.logprob for entry in entries) / len(entries))


def test_narrow_numbers_cost_at_most_a_hundredth_of_perplexity(real, text_ids):
    exact = perplexity(real, text_ids)
    weights = perplexity(real, text_ids, weight_dtype="int8") / exact - 1
    pages = perplexity(real, text_ids, kv_dtype="int8") / exact - 1
    both = perplexity(real, text_ids, weight_dtype="int8", kv_dtype="int8") / exact - 1
    print(f"perplexity {exact:.2f}; int8 weights {weights:+.2%}, pages {pages:+.2%}, both {both:+.2%}")
    assert abs(weights) < 0.01
    assert abs(pages) < 0.01
    assert abs(both) < 0.01
