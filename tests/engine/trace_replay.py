"""Replays prompts through the real scheduler and prefix cache, on a device whose steps cost nothing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Literal, NamedTuple

from engine.plan import StepResults
from engine.request import Request
from engine.sampling_params import SamplingParams
from engine.scheduler import Scheduler, SchedulerSettings

TRACE = Path(__file__).parents[3] / "shared" / "data" / "mooncake_conversation_trace.jsonl"
"""12,031 requests to a chat service; each block of 512 tokens is named by an id that covers all before it."""


class TraceRequest(NamedTuple):
    blocks: tuple[int, ...]
    input_len: int
    output_len: int


class Event(NamedTuple):
    """What is told to the engine next: a prompt to run, or a beginning to pin or to release."""

    kind: Literal["run", "pin", "release"]
    token_ids: tuple[int, ...]
    output_len: int = 1


@dataclass(frozen=True, slots=True)
class Replay:
    """What came of a replay, in tokens."""

    num_prompt_tokens: int
    num_found: int
    """Prompt tokens found in the cache when their request was first admitted."""
    num_unlimited: int
    """Prompt tokens that a cache of any size would find if requests ran one after the other in this order:
    those of whole pages, and of the page behind them what an earlier prompt begins alike."""
    num_steps: int
    num_preemptions: int
    max_held: int
    """Most pages held at once."""
    mean_running: float
    """Sequences in flight, over the steps."""

    @property
    def achieved(self) -> float:
        """Share of what an unlimited cache finds."""
        return self.num_found / self.num_unlimited if self.num_unlimited else 1.0


def read_trace(path: Path = TRACE) -> list[TraceRequest]:
    requests = []
    with path.open() as lines:
        for line in lines:
            entry = json.loads(line)
            requests.append(
                TraceRequest(tuple(entry["hash_ids"]), entry["input_length"], entry["output_length"])
            )
    return requests


def scaled_prompt(request: TraceRequest, block_len: int) -> tuple[int, ...]:
    """The request's prompt with `block_len` tokens a block in place of 512; a block's tokens tell its id."""
    first, last = request.blocks[:-1], request.blocks[-1]
    rest = request.input_len - 512 * len(first)
    tokens = [block * block_len + at for block in first for at in range(block_len)]
    tokens += [last * block_len + at for at in range(max(1, rest * block_len // 512))]
    return tuple(tokens)


def replay(
    events: Iterable[Event],
    *,
    page_size: int,
    num_pages: int,
    max_num_seqs: int = 64,
    max_num_batched_tokens: int = 256,
    max_waiting: int = 64,
) -> Replay:
    """Run all prompts, telling each event when fewer than `max_waiting` requests wait before it."""
    scheduler = Scheduler(
        SchedulerSettings(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=num_pages * page_size,
            page_size=page_size,
            num_pages=num_pages,
        )
    )
    cache = scheduler.cache
    assert cache is not None
    num_prompt_tokens = num_unlimited = num_steps = num_rows = max_held = 0
    seen = _Seen(page_size)
    coming = iter(events)
    is_over, drawn = False, count(1 << 30)
    while not is_over or scheduler.has_unfinished:
        while not is_over and scheduler.num_waiting < max_waiting:
            event = next(coming, None)
            if event is None:
                is_over = True
            elif event.kind == "pin":
                cache.pin(event.token_ids, None)
            elif event.kind == "release":
                cache.release(event.token_ids, None)
            else:
                num_prompt_tokens += len(event.token_ids)
                num_unlimited += seen.add(event.token_ids)
                scheduler.add(_request(event, str(num_prompt_tokens)))
        plan = scheduler.schedule()
        max_held = max(max_held, scheduler.pool.num_held)
        num_rows += len(plan.rows)
        # Drawn tokens are of no prompt and of no other output, so nothing but prompts is found.
        scheduler.update(plan, StepResults([next(drawn) if row.samples else None for row in plan.rows]))
        num_steps += 1
    stats = scheduler.stats()
    assert stats.num_held_pages == 0
    return Replay(
        num_prompt_tokens=num_prompt_tokens,
        num_found=stats.num_prefix_hits,
        num_unlimited=num_unlimited,
        num_steps=num_steps,
        num_preemptions=stats.num_preemptions,
        max_held=max_held,
        mean_running=num_rows / max(1, num_steps),
    )


def _request(event: Event, name: str) -> Request:
    return Request(
        request_id=name,
        prompt_token_ids=event.token_ids,
        sampling=SamplingParams(max_tokens=event.output_len),
        key=(0, 0),
        max_total_len=len(event.token_ids) + event.output_len,
        expected_len=len(event.token_ids) + event.output_len,
    )


class _Seen:
    """The prompts that a cache of any size holds, as a tree of pages."""

    def __init__(self, page_size: int):
        self._page_size = page_size
        self._root: dict[tuple[int, ...], dict] = {}

    def add(self, token_ids: Sequence[int]) -> int:
        """Take a prompt in; returns how many of its tokens but the last, which is computed, were there."""
        size = self._page_size
        node, found, is_known = self._root, 0, True
        for start in range(0, len(token_ids), size):
            page = tuple(token_ids[start : start + size])
            below = node.get(page)
            if below is None:
                below = node[page] = {}
                is_known = False
            elif is_known:
                found += len(page)
            node = below
        return min(found, len(token_ids) - 1)
