"""Log-probabilities in OpenAI's two forms: of chats (with bytes) and of completions (lists side by side)."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import BaseModel

from engine.detokenizer import bytes_of_token
from engine.outputs import CompletionOutput, TokenLogprob
from engine.sampling_params import SamplingParams

LOWEST = -9999.0
"""Stands for minus infinity, which JSON cannot write."""


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ChatToken(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """One entry a token whose text is shown."""

    content: list[ChatToken]
    refusal: None = None


class CompletionLogprobs(BaseModel):
    """Entry i of each list is about token i; a prompt's first token has no log-probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


def shown_logprobs(
    sample: CompletionOutput, sampling: SamplingParams, start: int = 0
) -> tuple[TokenLogprob, ...]:
    """Those of a sample's tokens from `start` on, without the token that stopped it, which its text does not
    show either."""
    entries = sample.logprobs or ()
    ends_hidden = (
        sample.finish_reason == "stop"
        and not isinstance(sample.stop_reason, str)
        and not sampling.include_stop_str_in_output
    )
    return entries[start : len(entries) - ends_hidden]


def chat_logprobs(tokenizer: Any, entries: Iterable[TokenLogprob]) -> ChatLogprobs:
    return ChatLogprobs(
        content=[
            ChatToken(
                **_token(tokenizer, entry.token_id, entry.logprob),
                top_logprobs=[TopLogprob(**_token(tokenizer, *top)) for top in entry.top],
            )
            for entry in entries
        ],
        refusal=None,
    )


class CompletionLogprobMaker:
    """Makes the lists of one text, piece by piece: offsets go on where the piece before ended."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def push(
        self, entries: Sequence[TokenLogprob | None], token_ids: Sequence[int] = ()
    ) -> CompletionLogprobs:
        """`token_ids` names the tokens of entries that are None."""
        made = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for index, entry in enumerate(entries):
            token_id = token_ids[index] if entry is None else entry.token_id
            made.tokens.append(_spelled(self._tokenizer, token_id))
            made.text_offset.append(self._offset)
            self._offset += len(self._decoder.decode(bytes_of_token(self._tokenizer, token_id)))
            if entry is None:
                made.token_logprobs.append(None)
                made.top_logprobs.append(None)
                continue
            made.token_logprobs.append(max(entry.logprob, LOWEST))
            top = {_spelled(self._tokenizer, token): max(logprob, LOWEST) for token, logprob in entry.top}
            # The drawn token is always among them, as OpenAI has it.
            made.top_logprobs.append(top | {made.tokens[-1]: made.token_logprobs[-1] or 0.0})
        return made


def _token(tokenizer: Any, token_id: int, logprob: float) -> dict[str, Any]:
    raw = bytes_of_token(tokenizer, token_id)
    return {"token": raw.decode("utf-8", "replace"), "logprob": max(logprob, LOWEST), "bytes": list(raw)}


def _spelled(tokenizer: Any, token_id: int) -> str:
    """A token's text, or its bytes spelled out where they are a part of a character: no two look alike."""
    raw = bytes_of_token(tokenizer, token_id)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
