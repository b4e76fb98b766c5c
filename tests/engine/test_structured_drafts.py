"""Masks of guessed tokens: those of the same tokens drawn one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engine.request import Request
from engine.sampling_params import SamplingParams
from engine.token_masks import draft_token_masks, token_mask
from tests.engine.engines import varied_model
from tests.engine.structured_cases import engine, sampled


def request_of(spec: dict[str, Any], **values: Any) -> Request:
    model = varied_model().config
    sampling = sampled(spec, **values)
    grammar = engine().grammars.compiled(sampling)
    assert grammar is not None
    return Request(
        request_id="r",
        prompt_token_ids=(1,),
        sampling=sampling,
        key=(0, 0),
        max_total_len=100,
        eos_token_ids=frozenset(model.eos_token_ids),
        grammar=grammar.begin(),
    )


@pytest.mark.parametrize(
    "values", [{}, {"min_tokens": 3}, {"stop_token_ids": [9]}, {"allowed_token_ids": [2, 70]}]
)
def test_masks_of_a_draft_are_those_of_its_tokens_drawn_one_by_one(values: dict[str, Any]) -> None:
    vocab_size, spec = varied_model().config.vocab_size, {"regex": "(in|an|the|[a-z])*[.]"}
    choose = np.random.default_rng(0)
    request, ahead = request_of(spec, **values), request_of(spec, **values)
    for _ in range(8):
        draft, masks = [], [token_mask(ahead, vocab_size)]
        for _ in range(3):
            allowed = np.flatnonzero(np.unpackbits(masks[-1].view(np.uint8), bitorder="little"))
            token = int(choose.choice(allowed))
            if token in ahead.end_token_ids:
                break
            draft.append(token)
            ahead.output_token_ids.append(token)
            masks.append(token_mask(ahead, vocab_size))
        wrong = next(
            token for token in range(3, vocab_size) if not masks[-1][token // 32] >> (token % 32) & 1
        )
        found = draft_token_masks(request, [*draft, wrong, *draft], vocab_size)
        assert np.array_equal(found, np.stack(masks)), "up to the token that may not come"
        ended = draft_token_masks(request, [*draft, 2, *draft], vocab_size)
        assert len(ended) == 1 + len(draft), "nothing comes after an end"
        assert np.array_equal(token_mask(request, vocab_size), masks[0]), "the sample stays where it is"
        request.output_token_ids.extend(draft)
        ahead = request_of(spec, **values)
        ahead.output_token_ids.extend(request.output_token_ids)


def test_masks_of_a_plain_draft_are_those_of_its_tokens_drawn_one_by_one() -> None:
    request = Request(
        request_id="r",
        prompt_token_ids=(1,),
        sampling=SamplingParams(max_tokens=9, min_tokens=2),
        key=(0, 0),
        max_total_len=50,
        eos_token_ids=frozenset({2}),
        bad_words_token_ids=((5, 6), (7,)),
    )
    masks = []
    for token in (4, 5, 9):
        masks.append(token_mask(request, 40))
        request.output_token_ids.append(token)
    masks.append(token_mask(request, 40))
    request.output_token_ids.clear()
    assert np.array_equal(draft_token_masks(request, [4, 5, 9], 40), np.stack(masks))
    assert len(draft_token_masks(request, [4, 5, 6, 9], 40)) == 3
