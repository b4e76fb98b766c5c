"""What `POST /v1/completions` takes."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from engine.server.fields import MAX_INT, SamplingFields, Text, TokenId

TokenIds = Annotated[list[TokenId], Field(min_length=1)]


class CompletionBody(SamplingFields):
    """Prompts to be completed: one or several, as texts or token ids."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1)]
    )
    suffix: Text | None = None
    max_tokens: int | None = Field(None, ge=0, le=MAX_INT)
    """Default 16. 0, with `echo`, only scores the prompt."""
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None
    best_of: int | None = Field(None, ge=1, le=16_384)
