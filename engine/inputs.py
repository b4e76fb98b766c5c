"""The forms in which prompts and their sampling may be given, told apart and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from operator import countOf
from typing import Any, TypeGuard

from engine.errors import ConfigError, RequestError
from engine.packed_tokens import max_token, pack_tokens
from engine.sampling_params import SamplingParams

Chat = Sequence[Mapping[str, Any]]
TokenIds = Sequence[int]
Prompts = str | TokenIds | Chat | Sequence[str] | Sequence[TokenIds] | Sequence[Chat]


def is_token_ids(prompt: Any) -> TypeGuard[TokenIds]:
    """Whether this is one prompt, as token ids."""
    return (
        not isinstance(prompt, str)
        and len(prompt) > 0
        and not isinstance(prompt[0], (str, Mapping, Sequence))
    )


def as_list(prompts: Any) -> list[Any]:
    """One prompt or several -> several."""
    if isinstance(prompts, str) or is_token_ids(prompts) or (prompts and isinstance(prompts[0], Mapping)):
        return [prompts]
    return list(prompts)


def sampling_of_each(
    sampling: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
) -> list[SamplingParams]:
    """One for all, or one each. Raises ConfigError when their number is not that of the prompts."""
    if sampling is None or isinstance(sampling, SamplingParams):
        return [sampling or SamplingParams()] * num_prompts
    if len(sampling) != num_prompts:
        raise ConfigError(
            f"{num_prompts} prompts were given {len(sampling)} SamplingParams: one, or one each"
        )
    return list(sampling)


def checked_tokens(request_id: str, token_ids: tuple[int, ...], vocab_size: int) -> bytes:
    """A prompt's tokens, packed. Raises RequestError naming the first one that is not in a vocabulary of
    `vocab_size`."""
    if countOf(map(type, token_ids), int) == len(token_ids):
        with suppress(OverflowError):
            tokens = pack_tokens(token_ids)
            if not tokens or max_token(tokens) < vocab_size:
                return tokens
    for position, token in enumerate(token_ids):
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise RequestError(
                "bad_token_id",
                f"request {request_id!r}: prompt token {position} is {token!r}; token ids are "
                f"whole numbers from 0 to {vocab_size - 1}",
            )
    raise AssertionError("a token was refused and is none of these")
