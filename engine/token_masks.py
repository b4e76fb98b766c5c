"""Which tokens a row may draw: allowed ids, bad words and `min_tokens`, as one packed bit mask a row.

Bit `t % 32` of word `t // 32` says whether token `t` may be drawn, as in llguidance. Pure numpy.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from engine.request import Request


def mask_width(vocab_size: int) -> int:
    """uint32 words that hold one bit a token."""
    return -(-vocab_size // 32)


def needs_mask(request: Request) -> bool:
    """Whether this request's next draw is restricted at all."""
    return (
        request.sampling.allowed_token_ids is not None
        or bool(request.bad_words_token_ids)
        or request.num_drawn < request.sampling.min_tokens
    )


def token_mask(request: Request, vocab_size: int) -> np.ndarray:
    """uint32[mask_width]: the tokens the next draw of `request` may give.

    Where allowed ids, bad words and `min_tokens` together leave nothing, the allowed ids win: a row has
    to draw something.
    """
    sampling = request.sampling
    allowed = np.zeros(mask_width(vocab_size) * 32, bool)
    if sampling.allowed_token_ids is None:
        allowed[:vocab_size] = True
    else:
        allowed[list(sampling.allowed_token_ids)] = True
    banned = list(_ends_of_bad_words(request))
    if request.num_drawn < sampling.min_tokens:
        banned += sampling.stop_token_ids
        if not sampling.ignore_eos:
            banned += request.eos_token_ids
    rest = allowed.copy()
    rest[banned] = False
    return np.packbits(rest if rest.any() else allowed, bitorder="little").view(np.uint32)


def _ends_of_bad_words(request: Request) -> Iterable[int]:
    """Tokens that would complete a bad word, given what was generated."""
    output = request.output_token_ids
    for word in request.bad_words_token_ids:
        before = list(word[:-1])
        if len(before) <= len(output) and output[len(output) - len(before) :] == before:
            yield word[-1]
