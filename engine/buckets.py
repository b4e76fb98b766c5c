"""The shapes a step may have. All are compiled at the start; no other is ever run.

Only two sizes of a step vary: its tokens and the rows of logits it needs. Everything else (sequence
slots, page tables) has one size, and attention's loops end where the step's own rows end.
"""

from __future__ import annotations

from typing import NamedTuple


class Bucket(NamedTuple):
    """A declared step: at most `num_tokens` tokens, of which `num_logits` rows get logits."""

    num_tokens: int
    num_logits: int


def declare_buckets(
    min_token_pad: int,
    max_num_batched_tokens: int,
    max_num_seqs: int,
    *,
    min_input_pad: int | None = None,
    skips_padding: bool = False,
) -> tuple[Bucket, ...]:
    """Buckets in the order they are tried: the first that holds a step is the cheapest that does.

    min_input_pad: the rows of logits are a multiple of this (default: of `min_token_pad`).
    skips_padding: the step's kernels compute no padding rows, so that only what is cheap is done for them:
        then there are few buckets, each twice as large as the one before or more.

    Otherwise, below 64 tokens they are 16 apart, above it four to a doubling: a step is padded by 8 % on
    average and by a quarter at most. A step of fewer tokens costs little, and a finer grid much to compile.
    """
    sizes = [min_token_pad]
    most_tokens = _round_up(max_num_batched_tokens, min_token_pad)
    input_pad = min_input_pad or min_token_pad
    most_logits = _round_up(max_num_seqs, input_pad)
    if skips_padding:
        while sizes[-1] < most_tokens:
            sizes.append(min(sizes[-1] * (4 if sizes[-1] < 256 else 2), most_tokens))
        return tuple(Bucket(size, min(_round_up(size, input_pad), most_logits)) for size in sizes)
    while sizes[-1] < max_num_batched_tokens:
        doubling = 1 << (sizes[-1].bit_length() - 1)  # the power of two at or below
        apart = max(min_token_pad, 16, doubling // 4)
        sizes.append(min((sizes[-1] // apart + 1) * apart, most_tokens))
    buckets = [Bucket(size, min(_round_up(size, input_pad), most_logits)) for size in sizes]
    # A step as large as this is mostly prefill, and often needs few logits: a head of a large vocabulary
    # over rows that nobody asked for would be a good part of it.
    few = _round_up(-(-most_logits // 4), input_pad)
    if few < most_logits < sizes[-1]:
        buckets.insert(-1, Bucket(sizes[-1], few))
    return tuple(buckets)


def choose_bucket(buckets: tuple[Bucket, ...], num_tokens: int, num_logits: int) -> Bucket:
    """The first declared bucket that holds the step. Raises ValueError when none does."""
    for bucket in buckets:
        if num_tokens <= bucket.num_tokens and num_logits <= bucket.num_logits:
            return bucket
    raise ValueError(f"no declared step holds {num_tokens} tokens and {num_logits} logits: {buckets}")


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
