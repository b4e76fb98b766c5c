"""Memory is kept for what requests are expected to generate: full batches without preemption, same
outputs."""

from __future__ import annotations

import pytest

from engine.sampling_params import SamplingParams
from engine.scheduler import Scheduler
from tests.engine.engines import tiny_engine, tokens_of
from tests.engine.host import make_request, make_scheduler, run


def crowd(expected_len: int | None, max_tokens: int = 28) -> Scheduler:
    """Eight requests that generate 28 tokens each; the pool holds two of them at their end."""
    scheduler = make_scheduler(
        num_pages=16, max_num_seqs=8, max_num_batched_tokens=64, enable_prefix_caching=False
    )
    for index in range(8):
        scheduler.add(make_request(f"r{index}", [index] * 4, max_tokens, expected_len=expected_len))
    return scheduler


def outputs(scheduler: Scheduler) -> dict[str, list[int]]:
    return {request.request_id: request.output_token_ids for request in run(scheduler)}


def test_what_is_expected_is_kept_free_so_nobody_is_preempted():
    eager, careful = crowd(None), crowd(32)
    eager.schedule()
    assert eager.num_running > 4, "each is given its prompt's page and one more"
    careful.schedule()
    assert careful.num_running == 2
    assert outputs(eager) == outputs(careful)
    assert eager.stats().num_preemptions > 0
    assert careful.stats().num_preemptions == 0


def test_an_expectation_that_was_too_low_costs_preemptions_and_no_output():
    low = crowd(8)
    assert outputs(low) == outputs(crowd(32))
    assert low.stats().num_preemptions > 0


def test_nobody_is_expected_to_pass_the_end():
    """An expectation beyond the pool would never be admitted; it counts up to the longest it may become."""
    scheduler = crowd(10_000)
    scheduler.schedule()
    assert scheduler.num_running == 2
    assert len(run(scheduler)) == 8


def test_room_grows_back_as_requests_end():
    scheduler = crowd(None)
    for index in range(4):
        scheduler.add(make_request(f"late{index}", [9, index], 2, expected_len=4))
    run(scheduler)
    assert scheduler.stats().num_held_pages == 0
    scheduler.check_integrity()  # nothing is set aside for nobody


def test_the_engine_passes_it_on_and_gives_the_same_tokens():
    engine = tiny_engine(num_pages=16)
    prompts = [[index + 4] * 20 for index in range(5)]
    sampling = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    wanted = tokens_of(engine.generate(prompts, sampling))
    num_preemptions = engine.stats().preemptions
    assert num_preemptions > 0
    found = {}
    for index, prompt in enumerate(prompts):
        engine.add_request(f"r{index}", prompt, sampling=sampling, expected_output_len=60)
    while engine.has_unfinished:
        found.update({output.request_id: output for output in engine.step()})
    assert tokens_of([found[f"r{index}"] for index in range(5)]) == wanted
    assert engine.stats().preemptions == num_preemptions
    with pytest.raises(ValueError, match="expected_output_len is 0"):
        engine.add_request("no", [5], sampling=sampling, expected_output_len=0)
