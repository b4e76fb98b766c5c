"""Declared steps hold every step the scheduler may plan, and the smallest that does is taken."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.buckets import choose_bucket, declare_buckets
from engine.plan import StepResults
from tests.engine.host import make_request, make_scheduler


@given(
    pad=st.sampled_from([8, 16, 64]),
    seqs=st.integers(1, 300),
    more=st.integers(0, 4000),
    skips_padding=st.booleans(),
    data=st.data(),
)
def test_every_plan_has_a_bucket_and_gets_the_smallest(pad, seqs, more, skips_padding, data):
    most_tokens = seqs + more
    buckets = declare_buckets(pad, most_tokens, seqs, skips_padding=skips_padding)
    assert len(set(buckets)) == len(buckets)
    assert all(bucket.num_tokens % pad == bucket.num_logits % pad == 0 for bucket in buckets)
    num_tokens = data.draw(st.integers(1, most_tokens))
    num_logits = data.draw(st.integers(0, min(seqs, num_tokens)))
    chosen = choose_bucket(buckets, num_tokens, num_logits)
    assert chosen.num_tokens >= num_tokens
    assert chosen.num_logits >= num_logits
    others = [b for b in buckets if b.num_tokens >= num_tokens and b.num_logits >= num_logits]
    assert chosen == min(others)


def test_a_step_is_padded_by_a_quarter_at_most():
    buckets = declare_buckets(16, 1024, 256)
    shares = []
    for num_tokens in range(65, 1025):
        bucket = choose_bucket(buckets, num_tokens, 1)
        assert bucket.num_tokens <= 1.25 * num_tokens
        shares.append(1 - num_tokens / bucket.num_tokens)
    assert sum(shares) / len(shares) < 0.085
    assert len(buckets) <= 21, "each costs time at every start"


def test_few_steps_are_compiled_where_padding_costs_nothing():
    assert [size for size, _ in declare_buckets(16, 1024, 256, skips_padding=True)] == [
        16,
        64,
        256,
        512,
        1024,
    ]


def shared_prefix(pick: random.Random) -> tuple[list[int], int]:
    return [*range(256), *(pick.randrange(999) for _ in range(pick.randint(16, 64)))], 64


def unrelated(pick: random.Random) -> tuple[list[int], int]:
    return [pick.randrange(999) for _ in range(pick.randint(64, 512))], pick.randint(16, 128)


@pytest.mark.parametrize(("kind", "num_requests"), [(shared_prefix, 256), (unrelated, 128), (unrelated, 512)])
@pytest.mark.parametrize(("max_num_seqs", "max_num_batched_tokens"), [(64, 512), (256, 1024)])
def test_padding_is_less_than_a_tenth_of_a_job(kind, num_requests, max_num_seqs, max_num_batched_tokens):
    """The steps that the real scheduler makes of two jobs: one template, and no two prompts alike."""
    scheduler = make_scheduler(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=1024,
        page_size=64,
        num_pages=4096,
    )
    pick = random.Random(0)
    for index in range(num_requests):
        prompt, max_tokens = kind(pick)
        scheduler.add(make_request(f"r{index}", prompt, max_tokens))
    buckets = declare_buckets(16, max_num_batched_tokens, max_num_seqs)
    num_tokens = num_padded = 0
    while scheduler.has_unfinished:
        plan = scheduler.schedule()
        num_tokens += plan.num_tokens
        bucket = choose_bucket(buckets, plan.num_tokens, plan.num_logits)
        num_padded += bucket.num_tokens - plan.num_tokens
        scheduler.update(plan, StepResults([7 if row.samples else None for row in plan.rows]))
    assert num_padded / (num_tokens + num_padded) < 0.10


def test_a_step_nobody_declared_is_refused():
    with pytest.raises(ValueError, match="no declared step holds 600 tokens"):
        choose_bucket(declare_buckets(16, 512, 64), 600, 1)
