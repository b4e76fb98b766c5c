"""How the user says what a row's prompt is; a contradiction is refused before anything is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine.errors import ConfigError
from pipeline.fitting import OverLong

PromptForm = Literal["auto", "prompt", "messages", "prompt_token_ids", "template"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSettings:
    """How a row becomes a prompt.

    form: which of the forms below every row has; "auto" is "template" when a template is given, else the one
        form whose column the row has and is not null.
    template, template_file: Jinja source over the row's columns (one or the other); `row` is all columns.
        White space as in chat templates: a line that holds only a statement leaves nothing behind.
    system_template: Jinja source of the system message of a chat that has none of its own.
    chat: text (a prompt column or a rendered template) becomes the user message of a chat; false sends
        it as it is. Messages are always a chat.
    add_generation_prompt: end a chat with the opening of the assistant's turn.
    over_long: what to do when prompt + max_tokens does not fit the model's length; see `fitting.fit`.
    sampling_column: a column of sampling overrides, a mapping or its JSON text; null means none, and so does
        a null inside the mapping.
    schema_column: a column of JSON schemas, as JSON text or as mappings, that the rows' outputs follow; null
        leaves it at what the sampling says (`sampling.structured`).
    max_prompt_chars: a longer text is rejected before it is tokenised, whatever `over_long` says.
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
    schema_column: str | None = None
    max_prompt_chars: int = 4_000_000

    def __post_init__(self) -> None:
        has_template = self.template is not None or self.template_file is not None
        if self.form == "template" and not has_template:
            raise ConfigError("prompt.form=template needs prompt.template or prompt.template_file")
        if has_template and self.form not in ("auto", "template"):
            raise ConfigError(f"prompt.form={self.form} leaves prompt.template unused; remove one of the two")
        if self.system_template is not None and (has_template or self.form == "prompt") and not self.chat:
            raise ConfigError(
                "prompt.system_template needs prompt.chat=true: plain text has no system message"
            )
        if self.system_template is not None and self.form == "prompt_token_ids":
            raise ConfigError("prompt.system_template cannot apply to token ids; remove it")
        if not 1 <= self.max_prompt_chars <= 2**30:
            raise ConfigError(f"prompt.max_prompt_chars={self.max_prompt_chars}: expected 1 to {2**30}")
