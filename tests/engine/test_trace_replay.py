"""In prefix order a small cache finds what an unlimited one would, with many sequences in flight."""

from __future__ import annotations

import pytest

from tests.engine.trace_replay import TRACE, Event, TraceRequest, read_trace, replay, scaled_prompt

BLOCK_LEN = 16
"""Tokens that stand for a block of 512: prompts, outputs and pages are 32 times as short as in the trace."""


def test_what_an_unlimited_cache_finds_is_counted():
    template = tuple(range(40))
    prompts = [(*template, 100), (*template, 200, 201), template, (7, 8)]
    found = replay([Event("run", prompt) for prompt in prompts], page_size=16, num_pages=64, max_num_seqs=1)
    assert found.num_prompt_tokens == 41 + 42 + 40 + 2
    # Two full pages for the second. All of the third is there, but its last token has to be computed.
    assert found.num_unlimited == 32 + 32
    assert found.num_found == 40 + 39  # and what lies in the page behind them


def test_a_pinned_beginning_outlives_a_flood_of_others():
    template = tuple(range(64))
    events = []
    for index in range(6):
        events.append(Event("run", (*template, 1000 + index)))
        for first in (2000 + 400 * index, 2200 + 400 * index):
            events.append(Event("run", tuple(range(first, first + 190))))
    sizes = {"page_size": 16, "num_pages": 16, "max_num_seqs": 1, "max_waiting": 1}
    assert replay(events, **sizes).num_found == 0
    pinned = [Event("pin", template), *events, Event("release", template)]
    assert replay(pinned, **sizes).num_found == 5 * 64


def test_scaled_prompts_share_what_the_trace_shares():
    one = scaled_prompt(TraceRequest((5, 6, 7), 1100, 9), 16)
    other = scaled_prompt(TraceRequest((5, 6, 8), 1500, 9), 16)
    assert (len(one), len(other)) == (32 + 2, 32 + 14)
    assert one[:32] == other[:32]
    assert not set(one[32:]) & set(other[32:])


@pytest.mark.skipif(not TRACE.exists(), reason=f"the public trace is not at {TRACE}")
def test_a_fiftieth_of_the_distinct_pages_is_enough_for_64_sequences_in_prefix_order():
    trace = sorted(read_trace(), key=lambda request: request.blocks)
    num_distinct = len({block for request in trace for block in request.blocks})
    found = replay(
        (
            Event("run", scaled_prompt(request, BLOCK_LEN), max(1, request.output_len * BLOCK_LEN // 512))
            for request in trace
        ),
        page_size=BLOCK_LEN,
        num_pages=num_distinct // 50,
        max_num_seqs=64,
        max_num_batched_tokens=4096,  # so that prefill does not keep the number in flight down
    )
    assert 0.37 < found.num_unlimited / found.num_prompt_tokens < 0.38
    assert found.achieved >= 0.99
    assert found.mean_running > 60
    assert found.num_preemptions == 0
