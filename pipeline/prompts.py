"""Rows to prompts: choose the row's form, render it, tokenise it, fit it, or say why it cannot run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from engine.sampling_params import SamplingParams
from pipeline.rows import Prompt, Reject, SourceRow
from pipeline.shards import InputSettings

PromptForm = Literal["auto", "prompt", "messages", "prompt_token_ids", "template"]
OverLong = Literal["reject", "truncate_left", "truncate_right", "truncate_middle"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSettings:
    """How a row becomes a prompt.

    form: which of the forms below every row has; "auto" is "template" when a template is given, else the one
        form whose column the row has.
    template, template_file: Jinja source over the row's columns (one or the other); `row` is all columns.
    system_template: Jinja source of the system message; needs `chat`.
    chat: text (a prompt column or a rendered template) becomes the user message of a chat; false sends
        it as it is. Messages are always a chat.
    add_generation_prompt: end a chat with the opening of the assistant's turn.
    over_long: what to do when prompt + max_tokens does not fit the model's length.
    sampling_column: a column of sampling overrides, a dict or its JSON text; null means none.
    max_prompt_chars: a longer text is rejected before it is tokenised.
    """

    form: PromptForm = "auto"
    prompt_column: str = "prompt"
    messages_column: str = "messages"
    prompt_token_ids_column: str = "prompt_token_ids"
    template: str | None = None
    template_file: str | None = None
    system_template: str | None = None
    chat: bool = False
    add_generation_prompt: bool = True
    over_long: OverLong = "reject"
    sampling_column: str | None = None
    max_prompt_chars: int = 4_000_000


class PromptBuilder:
    """Builds prompts from rows; the same row always gives the same prompt."""

    def __init__(
        self,
        settings: PromptSettings,
        input_settings: InputSettings,
        tokenizer: Any,
        default_sampling: SamplingParams,
        max_model_len: int,
        vocab_size: int | None = None,
        id_index: Any = None,
    ):
        raise NotImplementedError

    @property
    def columns_needed(self) -> tuple[str, ...] | None:
        """Columns to read, sorted; None when the template may use any."""
        raise NotImplementedError

    @property
    def template_source(self) -> dict[str, str | None]:
        """The texts that shape every prompt (for the run's fingerprint)."""
        raise NotImplementedError

    def build(self, row: SourceRow) -> Prompt | Reject:
        raise NotImplementedError

    def build_many(self, rows: Sequence[SourceRow | Reject]) -> list[Prompt | Reject]:
        """One result a row, in order; rejects pass through. Tokenises all rows in one call."""
        raise NotImplementedError
