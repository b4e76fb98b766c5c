"""Builders of prompts over the tiny tokenizer, and what their results must look like."""

from __future__ import annotations

from typing import Any

from engine.sampling_params import SamplingParams
from pipeline.prompt_settings import PromptSettings
from pipeline.prompts import PromptBuilder
from pipeline.rows import REASONS, Prompt, Reject, SourceRow
from pipeline.shards import InputSettings
from tests.pipeline.input_helpers import make_chat_tokenizer

TOKENIZER = make_chat_tokenizer()
BOS = TOKENIZER.bos_token_id
USER = [{"role": "user", "content": "hi"}]


def make_builder(
    settings: dict[str, Any] | None = None,
    inputs: dict[str, Any] | None = None,
    tokenizer: Any = TOKENIZER,
    max_tokens: int = 16,
    max_model_len: int = 400,
    **others: Any,
) -> PromptBuilder:
    return PromptBuilder(
        PromptSettings(**settings or {}),
        InputSettings(path="unused", **inputs or {}),
        tokenizer,
        SamplingParams(max_tokens=max_tokens, temperature=0.5),
        max_model_len,
        **others,
    )


def row_of(columns: dict[str, Any], position: int = 0, line: int | None = 1) -> SourceRow:
    return SourceRow(0, position, columns, "a.jsonl", line)


def build(columns: dict[str, Any], settings: dict[str, Any] | None = None, **options: Any) -> Prompt | Reject:
    return make_builder(settings, **options).build(row_of(columns))


def ok(result: Prompt | Reject) -> Prompt:
    assert isinstance(result, Prompt), result
    return result


def refused(result: Prompt | Reject, reason: str, *says: str) -> Reject:
    assert isinstance(result, Reject), result
    assert result.reason == reason, result
    assert reason in REASONS
    for part in says:
        assert part in result.message
    assert result.message.startswith("a.jsonl line 1: ")
    assert result.message.isprintable()
    assert result.excerpt.isprintable()
    return result
