"""Declared steps hold every step the scheduler may plan, and the smallest that does is taken."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.buckets import choose_bucket, declare_buckets


@given(
    pad=st.sampled_from([8, 16, 64]),
    seqs=st.integers(1, 300),
    more=st.integers(0, 4000),
    data=st.data(),
)
def test_every_plan_has_a_bucket_and_gets_the_smallest(pad, seqs, more, data):
    most_tokens = seqs + more
    buckets = declare_buckets(pad, most_tokens, seqs)
    assert len(set(buckets)) == len(buckets)
    assert all(bucket.num_tokens % pad == bucket.num_logits % pad == 0 for bucket in buckets)
    num_tokens = data.draw(st.integers(1, most_tokens))
    num_logits = data.draw(st.integers(0, min(seqs, num_tokens)))
    chosen = choose_bucket(buckets, num_tokens, num_logits)
    assert chosen.num_tokens >= num_tokens
    assert chosen.num_logits >= num_logits
    others = [b for b in buckets if b.num_tokens >= num_tokens and b.num_logits >= num_logits]
    assert chosen == min(others)


def test_padding_is_less_than_half_of_a_step_past_the_smallest():
    for num_tokens in range(17, 513):
        bucket = choose_bucket(declare_buckets(16, 512, 64), num_tokens, 1)
        assert bucket.num_tokens < 2 * num_tokens


def test_a_step_nobody_declared_is_refused():
    with pytest.raises(ValueError, match="no declared step holds 600 tokens"):
        choose_bucket(declare_buckets(16, 512, 64), 600, 1)
