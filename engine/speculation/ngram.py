"""Drafts from a request's own text: what followed its last tokens when they came before.

Prompt lookup (Saxena 2023): answers copy names, code and passages of their prompt, and repeat themselves.
"""

from __future__ import annotations

from engine.packed_tokens import NUM_BYTES, unpack_tokens

CONTEXT_LENS = (8, 4, 3, 2)
"""Last tokens that are looked for, the longest that is found counts. One token alone predicts too little."""


def prompt_lookup(tokens: bytes, max_tokens: int) -> tuple[list[int], int]:
    """At most `max_tokens` tokens that may follow these packed ones, and how many tokens of context they had
    in common with the place they are copied from; nothing and 0 where the last tokens are new.

    The latest place counts. Where the copy comes to the end of what is known it goes on with what it copied,
    so that of a repetition whole drafts come out of one period.
    """
    for context_len in CONTEXT_LENS:
        stop = _find(tokens, context_len)
        if stop is not None:
            known = unpack_tokens(tokens[stop * NUM_BYTES : (stop + max_tokens) * NUM_BYTES]).tolist()
            period = len(known)
            return [known[index % period] for index in range(max_tokens)], context_len
    return [], 0


def _find(tokens: bytes, context_len: int) -> int | None:
    """Behind which token the last `context_len` tokens stood before, most lately."""
    num_bytes = context_len * NUM_BYTES
    if len(tokens) <= num_bytes:
        return None
    context = tokens[-num_bytes:]
    last = len(tokens) - NUM_BYTES
    while (at := tokens.rfind(context, 0, last)) >= 0:
        if at % NUM_BYTES == 0:
            return at // NUM_BYTES + context_len
        last = at + num_bytes - 1  # it began inside a token
    return None
