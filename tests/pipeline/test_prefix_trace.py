"""A public trace through the plan, the pins, the real scheduler and the real prefix cache: with a fiftieth of
the pages and 64 sequences in flight, next to nothing is computed twice.

The trace is of a chat service: 12,031 requests as the ids of their prompts' blocks of 512 tokens. Here each
block is a page of few tokens, and outputs are shortened alike.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from engine.plan import StepResults
from engine.request import Request
from engine.sampling_params import SamplingParams
from engine.scheduler import Scheduler, SchedulerSettings
from pipeline.hints import KEPT_SHARE, WantedPrefixes
from pipeline.planned_reading import PlacedRow
from pipeline.prefix_hashes import UNIT, SeenPrefixes
from pipeline.prefix_plan import WindowPlanner
from pipeline.row_order import WindowOrder
from pipeline.rows import Prompt
from tests.pipeline.fake_engine import FakeEngine

BLOCK_TOKENS = 512
PAGE_SIZE = UNIT
END = 10**6
"""The last token of every prompt: it is always computed, so each page before it can be shared."""


@pytest.fixture(scope="module")
def prompts(repository: Path) -> list[Prompt]:
    trace = repository.parent / "shared" / "data" / "mooncake_conversation_trace.jsonl"
    if not trace.exists():
        pytest.skip(f"{trace} is not here")
    found = []
    for position, line in enumerate(trace.read_text().splitlines()):
        request = json.loads(line)
        tokens = [token for block in request["hash_ids"] for token in [block] * PAGE_SIZE]
        length = -(-request["output_length"] * PAGE_SIZE // BLOCK_TOKENS)
        sampling = SamplingParams(max_tokens=max(1, length))
        found.append(Prompt(str(position), 0, position, (*tokens, END), None, sampling, {}, False))
    return found


class CachePins(FakeEngine):
    """Pins go to a scheduler's cache, as the engine's own do."""

    def __init__(self, scheduler: Scheduler):
        super().__init__()
        assert scheduler.cache is not None
        self._cache = scheduler.cache

    def pin_prefix(self, token_ids: Sequence[int]) -> None:
        self._cache.pin(token_ids, None)

    def release_prefix(self, token_ids: Sequence[int]) -> None:
        self._cache.release(token_ids, None)


@dataclass(frozen=True)
class Replay:
    num_computed: int  # prompt tokens, recomputed ones included
    occupancy: float  # mean rows of a step
    num_pinned: int  # when all is over


def replay(prompts: Sequence[Prompt], window: WindowOrder, num_pages: int, max_num_seqs: int) -> Replay:
    """Run every row, in the window's order, beside a device step that costs nothing."""
    scheduler = Scheduler(
        SchedulerSettings(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=4096,
            max_model_len=16_384,
            page_size=PAGE_SIZE,
            num_pages=num_pages,
        )
    )
    kept = int(KEPT_SHARE * num_pages * PAGE_SIZE)
    wanted = WantedPrefixes(CachePins(scheduler), 2 * max_num_seqs, max_kept_tokens=kept)
    to_come = enumerate(window.positions(0, len(prompts)))
    num_unfinished = num_computed = num_rows = num_steps = 0
    while True:
        while num_unfinished < 2 * max_num_seqs and (following := next(to_come, None)) is not None:
            place, position = following
            prompt = prompts[position]
            wanted.take(PlacedRow(prompt, place, window))
            request = Request(
                request_id=prompt.row_id,
                prompt_token_ids=prompt.token_ids,
                sampling=prompt.sampling,
                key=(0, 0),
                max_total_len=len(prompt.token_ids) + prompt.sampling.max_tokens,
            )
            scheduler.add(request)
            num_unfinished += 1
        if not scheduler.has_unfinished:
            break
        plan = scheduler.schedule()
        num_steps += 1
        num_rows += len(plan.rows)
        num_computed += sum(max(0, min(row.stop, row.request.prompt_len) - row.start) for row in plan.rows)
        drawn = [END if row.samples else None for row in plan.rows]
        num_unfinished -= len(scheduler.update(plan, StepResults(drawn)))
    wanted.release_all()
    return Replay(num_computed, num_rows / num_steps, scheduler.pool.num_pinned)


def test_a_fiftieth_of_the_pages_saves_what_an_unlimited_cache_would(prompts: list[Prompt]) -> None:
    planner = WindowPlanner(0, 0, SeenPrefixes())
    for prompt in prompts:
        planner.add(prompt)
    window = planner.plan()
    num_tokens = sum(len(prompt.token_ids) for prompt in prompts)
    num_pages = len({page for prompt in prompts for page in prompt.token_ids[:-1:PAGE_SIZE]})
    achievable = sum(window.achievable(place) for place in range(len(prompts)))
    # Counted on the trace alone: each block is computed once, for the first prompt that has it.
    assert achievable == num_tokens - len(prompts) - num_pages * PAGE_SIZE
    assert 0.36 < achievable / num_tokens < 0.38
    found = replay(prompts, window, num_pages // 50, max_num_seqs=64)
    assert num_tokens - found.num_computed >= 0.99 * achievable
    assert found.occupancy > 55, "not bought with an empty engine"
    assert found.num_pinned == 0
