"""What requests share of each other's prompts changes no bit of what they draw."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engine.engine import Engine
from engine.outputs import RequestOutput
from engine.sampling_params import SamplingParams
from tests.engine.engines import tiny_engine

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=1)
DRAWN = GREEDY.replace(temperature=1.1, top_p=0.95)


def template_prompts(count: int, template_len: int, seed: int = 3) -> list[list[int]]:
    """Prompts that begin with one template; some end with it, and some leave it before its end."""
    rng = np.random.default_rng(seed)
    template = rng.integers(4, 250, template_len).tolist()
    prompts = [template + rng.integers(4, 250, rng.integers(1, 20)).tolist() for _ in range(count)]
    prompts.append(template)
    prompts.append(template[:-5] + rng.integers(4, 250, 9).tolist())
    return prompts


def run(engine: Engine, prompts: list[list[int]], sampling: SamplingParams) -> list[RequestOutput]:
    for index, prompt in enumerate(prompts):
        # The engines are kept for the process: each test shares with itself.
        salt = f"{sampling.temperature} {sampling.n}"
        engine.add_request(f"r{index}", prompt, sampling=sampling, identity=f"row {index}", cache_salt=salt)
    outputs: dict[str, RequestOutput] = {}
    while engine.has_unfinished:
        outputs.update({output.request_id: output for output in engine.step()})
        engine.check_integrity()
    assert engine.stats().pages_held == 0
    return [outputs[f"r{index}"] for index in range(len(prompts))]


def drawn_of(outputs: list[RequestOutput]) -> list[Any]:
    return [
        [(sample.token_ids, sample.cumulative_logprob, sample.text) for sample in output.outputs]
        for output in outputs
    ]


@pytest.mark.parametrize("page_size", [8, 16, 32, 64])
@pytest.mark.parametrize("sampling", [GREEDY, DRAWN])
def test_a_template_is_found_to_its_last_token_and_the_draws_are_those_without_a_cache(page_size, sampling):
    prompts = template_prompts(8, 53)
    plain = run(tiny_engine(enable_prefix_caching=False), prompts, sampling)
    engine = tiny_engine(num_pages=48 * 16 // page_size, page_size=page_size)
    shared = run(engine, prompts, sampling)
    assert drawn_of(shared) == drawn_of(plain)
    found = [output.num_cached_tokens for output in shared]
    # The first one computes the template; the others find it, or what they have of it and need not compute.
    assert found[0] == 0
    assert min(found[1:8]) >= 53
    assert found[8] >= 52
    assert found[9] >= 48
    again = run(engine, prompts, sampling)
    assert drawn_of(again) == drawn_of(plain)


def test_samples_of_a_prompt_compute_it_once():
    engine = tiny_engine(num_pages=48, page_size=16)
    prompt = template_prompts(0, 41, seed=5)[0]
    before = engine.stats().num_computed_tokens
    [output] = run(engine, [prompt], DRAWN.replace(n=4))
    # The prompt, the last token of it for three samples more, and seven more drawn tokens each.
    assert engine.stats().num_computed_tokens - before == 41 + 3 + 4 * 7
    plain = tiny_engine(enable_prefix_caching=False)
    assert drawn_of([output]) == drawn_of(run(plain, [prompt], DRAWN.replace(n=4)))


def test_a_pinned_prefix_is_still_there_after_a_flood_and_changes_no_bit():
    rng = np.random.default_rng(9)
    template = rng.integers(4, 250, 64).tolist()
    rows = [template + rng.integers(4, 250, 5).tolist() for _ in range(2)]
    flood = [rng.integers(4, 250, 100).tolist() for _ in range(8)]
    plain = drawn_of(run(tiny_engine(enable_prefix_caching=False), rows, GREEDY))
    found = {}
    for is_pinned in (True, False):
        engine = tiny_engine(num_pages=20, seed=7)
        salt = f"{GREEDY.temperature} {GREEDY.n}"
        if is_pinned:
            engine.pin_prefix(template, salt)
        outputs = run(engine, rows[:1], GREEDY)
        run(engine, flood, GREEDY)
        outputs += run(engine, rows[1:], GREEDY)
        assert drawn_of(outputs) == plain
        found[is_pinned] = outputs[-1].num_cached_tokens
        if is_pinned:
            engine.release_prefix(template, salt)
            with pytest.raises(ValueError, match="released but not pinned"):
                engine.release_prefix(template, salt)
            run(engine, flood, GREEDY)  # nothing of it is left for the run without a pin
        engine.check_integrity()
    assert found == {True: 64, False: 0}


def test_without_a_cache_pins_mean_nothing():
    engine = tiny_engine(enable_prefix_caching=False)
    engine.pin_prefix([5] * 64)
    engine.release_prefix([5] * 64)
