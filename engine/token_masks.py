"""Which tokens a row may draw next, as a packed bit mask a row.

Bit `t % 32` of word `t // 32` says whether token `t` may be drawn, as in llguidance. Pure numpy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from engine.request import Request


def mask_width(vocab_size: int) -> int:
    """uint32 words that hold one bit a token."""
    return -(-vocab_size // 32)


def needs_mask(request: Request) -> bool:
    """Whether this request's next draw is restricted at all."""
    return (
        request.grammar is not None
        or request.sampling.allowed_token_ids is not None
        or bool(request.bad_words_token_ids)
        or request.num_drawn < request.sampling.min_tokens
    )


def token_mask(request: Request, vocab_size: int) -> np.ndarray:
    """uint32[mask_width]: the tokens the next draw of `request` may give.

    Where allowed ids, bad words and `min_tokens` together leave nothing, the allowed ids win: a row has
    to draw something. With structured output what ends the text may be drawn where the text is complete and
    nowhere else, and its grammar wins over all of these.
    """
    if request.grammar is None:
        return _packed(_plain_mask(request, (), vocab_size))
    return _structured_mask(request, (), request.grammar.next_mask(request), vocab_size)


def draft_token_masks(request: Request, draft: Sequence[int], vocab_size: int) -> np.ndarray:
    """uint32[1 + n, mask_width]: the same for the next draw and for those after each token of `draft`.

    n is less than len(draft) where one of these could not be drawn, or would end the text.
    """
    if request.grammar is not None:
        masks = request.grammar.draft_masks(request, draft)
    else:
        masks = [None] * (1 + len(draft))
    found: list[np.ndarray] = []
    for index, mask in enumerate(masks):
        before = draft[:index]
        if before and (before[-1] in request.end_token_ids or not _has(found[-1], before[-1])):
            break
        if mask is None:
            found.append(_packed(_plain_mask(request, before, vocab_size)))
        else:
            found.append(_structured_mask(request, before, mask, vocab_size))
    return np.stack(found)


def _plain_mask(request: Request, draft: Sequence[int], vocab_size: int) -> np.ndarray:
    """bool[vocab_size], after the tokens of `draft`."""
    sampling = request.sampling
    allowed = np.zeros(vocab_size, bool)
    if sampling.allowed_token_ids is None:
        allowed[:] = True
    else:
        allowed[list(sampling.allowed_token_ids)] = True
    banned = list(_ends_of_bad_words(request, draft))
    if request.num_drawn + len(draft) < sampling.min_tokens:
        banned += request.end_token_ids
    rest = allowed.copy()
    rest[banned] = False
    return rest if rest.any() else allowed


def _structured_mask(
    request: Request, draft: Sequence[int], followers: np.ndarray, vocab_size: int
) -> np.ndarray:
    """The packed mask, of what the grammar lets follow after `draft`."""
    sampling, eos = request.sampling, request.eos_token_ids
    is_plain = sampling.allowed_token_ids is None and not request.bad_words_token_ids
    is_due = request.num_drawn + len(draft) >= sampling.min_tokens
    if is_plain and is_due and not sampling.stop_token_ids:
        return followers
    ends = list(request.end_token_ids)
    is_complete = any(_has(followers, token) for token in eos)
    by_grammar = np.unpackbits(followers.view(np.uint8), bitorder="little", count=vocab_size).astype(bool)
    by_grammar[ends] = False
    allowed = by_grammar & _plain_mask(request, draft, vocab_size)
    if is_complete and is_due:
        allowed[ends] = True
    if not allowed.any():
        allowed = by_grammar
        if is_complete:
            allowed[ends] = True
    return _packed(allowed) if allowed.any() else followers  # it needs a token that is to stop it


def _has(mask: np.ndarray, token: int) -> bool:
    return bool(mask[token // 32] >> np.uint32(token % 32) & np.uint32(1))


def _packed(allowed: np.ndarray) -> np.ndarray:
    """bool[vocab_size] as uint32[mask_width]."""
    words = np.zeros(mask_width(len(allowed)) * 32, bool)
    words[: len(allowed)] = allowed
    return np.packbits(words, bitorder="little").view(np.uint32)


def _ends_of_bad_words(request: Request, draft: Sequence[int]) -> Iterable[int]:
    """Tokens that would complete a bad word, given what was generated and `draft`."""
    if not request.bad_words_token_ids:
        return
    output = [*request.output_token_ids, *draft]
    for word in request.bad_words_token_ids:
        before = list(word[:-1])
        if len(before) <= len(output) and output[len(output) - len(before) :] == before:
            yield word[-1]
