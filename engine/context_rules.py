"""How a request is fitted into the model's context: tokens capped, the prompt cut, or refused."""

from __future__ import annotations

from typing import NamedTuple

from engine.errors import RequestError
from engine.options import RequestOptions, TruncateMode


class Fitted(NamedTuple):
    """A prompt as it runs."""

    token_ids: tuple[int, ...]
    max_total_len: int
    """Prompt and output tokens together stop here."""


def fit_context(
    request_id: str, token_ids: tuple[int, ...], max_tokens: int, max_model_len: int, options: RequestOptions
) -> Fitted:
    """Fit a prompt and the new tokens that it asks for, as `RequestOptions` says.

    A prompt that has to be cut leaves room for the new tokens, of which it grants at most half the context.
    Raises RequestError, with the numbers, where the options leave no way; a prompt too long for any request
    is left to the scheduler, which refuses it.
    """
    room = max_model_len - options.reserve_tokens
    prompt_len = len(token_ids)
    if prompt_len + max_tokens <= room:
        return Fitted(token_ids, prompt_len + max_tokens)
    told = f"request {request_id!r} has a prompt of {prompt_len} tokens and asks for {max_tokens} more"
    limit = f"{room} tokens (max_model_len {max_model_len}, reserve_tokens {options.reserve_tokens})"
    if options.strict_context:
        raise RequestError("request_too_long", f"{told}: together they are to be at most {limit}")
    may_cap = options.auto_cap_new_tokens and prompt_len < room
    if may_cap and (options.prefer_preserve_prompt or not options.truncates):
        return Fitted(token_ids, room)
    if options.truncates:
        num_new = min(max_tokens, max(1, room // 2)) if options.auto_cap_new_tokens else max_tokens
        if num_new < room:
            kept = cut(token_ids, room - num_new, options.truncate_mode or "left")
            return Fitted(kept, len(kept) + num_new)
    if options.reserve_tokens == 0 and prompt_len + 1 > max_model_len:
        return Fitted(token_ids, prompt_len + 1)
    raise RequestError(
        "prompt_too_long" if prompt_len >= room else "request_too_long",
        f"{told}, and there is room for {limit}: shorten the prompt, ask for fewer tokens, or let the engine "
        "do so (auto_truncate_prompt, auto_cap_new_tokens)",
    )


def cut(token_ids: tuple[int, ...], num_kept: int, mode: TruncateMode) -> tuple[int, ...]:
    """The `num_kept` tokens of a prompt that a cut leaves: its end, its beginning, or as much of both."""
    if len(token_ids) <= num_kept:
        return token_ids
    if mode == "left":
        return token_ids[len(token_ids) - num_kept :]
    if mode == "right":
        return token_ids[:num_kept]
    num_tail = num_kept // 2
    return token_ids[: num_kept - num_tail] + token_ids[len(token_ids) - num_tail :]
