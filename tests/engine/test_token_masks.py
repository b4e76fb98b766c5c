"""The packed mask lets exactly those tokens through that allowed ids, bad words and min_tokens leave."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from engine.request import Request
from engine.sampling_params import SamplingParams
from engine.token_masks import mask_width, needs_mask, token_mask

VOCAB = 70
token = st.integers(0, VOCAB - 1)


def make_request(output, eos=(), bad_words=(), **sampling) -> Request:
    request = Request(
        request_id="r",
        prompt_token_ids=(1,),
        sampling=SamplingParams(max_tokens=50, **sampling),
        key=(0, 0),
        max_total_len=60,
        eos_token_ids=frozenset(eos),
        bad_words_token_ids=tuple(map(tuple, bad_words)),
    )
    request.output_token_ids.extend(output)
    return request


def tokens_let_through(request: Request) -> set[int]:
    mask = token_mask(request, VOCAB)
    assert mask.shape == (mask_width(VOCAB),)
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    assert not bits[VOCAB:].any()
    return set(np.flatnonzero(bits).tolist())


@given(
    output=st.lists(token, max_size=6),
    eos=st.sets(token, max_size=3),
    allowed=st.none() | st.sets(token, min_size=1, max_size=8),
    stop_ids=st.sets(token, max_size=3),
    bad_words=st.lists(st.lists(token, min_size=1, max_size=3), max_size=4),
    min_tokens=st.integers(0, 8),
    ignore_eos=st.booleans(),
)
def test_mask_is_what_the_parameters_leave(output, eos, allowed, stop_ids, bad_words, min_tokens, ignore_eos):
    request = make_request(
        output,
        eos,
        bad_words,
        allowed_token_ids=allowed,
        stop_token_ids=stop_ids,
        min_tokens=min_tokens,
        ignore_eos=ignore_eos,
    )
    wanted = set(range(VOCAB)) if allowed is None else set(allowed)
    too_early = len(output) < min_tokens
    for candidate in list(wanted):
        completes = any([*output, candidate][-len(word) :] == word for word in bad_words)
        ends = candidate in stop_ids or (candidate in eos and not ignore_eos)
        if completes or (too_early and ends):
            wanted.discard(candidate)
    if wanted:
        assert tokens_let_through(request) == wanted
    else:
        assert tokens_let_through(request) == (set(range(VOCAB)) if allowed is None else set(allowed))
    if not needs_mask(request):
        assert wanted == set(range(VOCAB))
