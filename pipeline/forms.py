"""What a row says: text, a chat or token ids, found in its columns, checked and rendered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from engine.errors import ConfigError
from pipeline.chats import Chat, checked_chat, render_chat
from pipeline.prompt_settings import PromptSettings
from pipeline.rows import Refused, SourceRow
from pipeline.strict_json import has_lone_surrogate
from pipeline.templates import RENDER_ERRORS, MissingColumn, NullPrinted, RowTemplate, read_template


@dataclass(frozen=True, slots=True)
class Content:
    """A prompt before it is tokenised: text, the chat it was rendered from if any; or token ids."""

    text: str | None
    chat: Chat | None
    token_ids: Sequence[int] | None


class PromptForms:
    """Reads rows as the settings say. Raises ConfigError when the settings do not go with the tokenizer."""

    def __init__(self, settings: PromptSettings, tokenizer: Any, vocab_size: int):
        self._settings = settings
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._template = self._compiled(settings.template, settings.template_file, "template")
        self._system = self._compiled(settings.system_template, None, "system_template")
        if (settings.chat or settings.form == "messages") and not self._has_chat_template:
            raise ConfigError(
                "the model has no chat template; set prompt.chat=false and give prompts as text"
            )
        if self._template is not None and self._template.columns == frozenset():
            raise ConfigError("prompt.template uses no column; write {{ name }} where a column's value goes")

    @property
    def columns(self) -> frozenset[str] | None:
        """The columns that make the prompt, and with it a row's hashed id; None for all."""
        if self._template is not None:
            columns = self._template.columns
        elif self._settings.form == "auto":
            columns = frozenset(self._names.values())
        else:
            columns = frozenset({self._names[self._settings.form]})
        if columns is None or self._system is None:
            return columns
        return None if self._system.columns is None else columns | self._system.columns

    @property
    def template_sources(self) -> dict[str, str | None]:
        """The texts that shape every prompt."""
        return {
            "template": None if self._template is None else self._template.source,
            "system_template": None if self._system is None else self._system.source,
            "chat_template": self._tokenizer.chat_template if self._has_chat_template else None,
        }

    def read(self, row: SourceRow) -> Content:
        """What the row says. Raises Refused."""
        form = self._form(row)
        if form == "prompt_token_ids":
            return Content(None, None, self._token_ids(row))
        if form == "messages":
            chat: Chat | None = self._messages(row)
        else:
            text = self._text(row, form)
            if not self._settings.chat:
                return Content(text, None, None)
            chat = [{"role": "user", "content": text}]
        chat = self._with_system(chat, row)
        text = render_chat(self._tokenizer, chat, self._settings.add_generation_prompt)
        return Content(self._checked_text(text), chat, None)

    def opening(self, content: Content) -> str:
        """The end of a chat's text that opens the assistant's turn; empty when there is none."""
        if content.chat is None or content.text is None or not self._settings.add_generation_prompt:
            return ""
        without = render_chat(self._tokenizer, content.chat, add_generation_prompt=False)
        return content.text.removeprefix(without) if content.text.startswith(without) else ""

    def _form(self, row: SourceRow) -> str:
        settings = self._settings
        if self._template is not None:
            return "template"
        if settings.form != "auto":
            return settings.form
        names = self._names
        present = {form: name for form, name in names.items() if name in row.columns}
        given = [form for form, name in present.items() if row.columns[name] is not None]
        if len(given) == 1:
            return given[0]
        listed = ", ".join(repr(name) for name in (present or names).values())
        if given:
            both = " and ".join(repr(names[form]) for form in given)
            raise Refused("ambiguous_prompt", f"columns {both} are both given; say which with prompt.form")
        if present:
            raise Refused("null_value", f"column {listed} is null; give each row a prompt")
        raise Refused(
            "missing_column", f"none of the columns {listed}; add one or name it in prompt.*_column"
        )

    def _text(self, row: SourceRow, form: str) -> str:
        if form == "template":
            assert self._template is not None
            text = self._rendered(self._template, row, "prompt.template")
        else:
            column = self._settings.prompt_column
            text = column_of(row, column, "prompt.prompt_column")
            if text is None:
                raise Refused("null_value", f"column {column!r} is null; give each row a prompt")
            if not isinstance(text, str):
                kind = type(text).__name__
                raise Refused("wrong_type", f"column {column!r} is a {kind}; a prompt is text", text)
        if not text.strip():
            raise Refused("empty_prompt", "the prompt is empty; give it text or take the row out")
        return self._checked_text(text)

    def _messages(self, row: SourceRow) -> Chat:
        column = self._settings.messages_column
        value = column_of(row, column, "prompt.messages_column")
        if value is None:
            raise Refused("null_value", f"column {column!r} is null; give each row a chat")
        chat = checked_chat(value, column)
        for message in chat:
            self._checked_text(message["content"])
        if not self._has_chat_template:
            raise Refused("template_error", "the model has no chat template; give prompts as text")
        return chat

    def _with_system(self, chat: Chat, row: SourceRow) -> Chat:
        if self._system is None or chat[0]["role"] in ("system", "developer"):
            return chat
        content = self._checked_text(self._rendered(self._system, row, "prompt.system_template"))
        return [{"role": "system", "content": content}, *chat]

    def _token_ids(self, row: SourceRow) -> list[int]:
        column = self._settings.prompt_token_ids_column
        value = column_of(row, column, "prompt.prompt_token_ids_column")
        if value is None:
            raise Refused("null_value", f"column {column!r} is null; give each row a prompt")
        if not isinstance(value, list):
            kind = type(value).__name__
            raise Refused("wrong_type", f"column {column!r} is a {kind}; give a list of integers", value)
        for i, token in enumerate(value):
            if isinstance(token, bool) or not isinstance(token, int):
                kind = type(token).__name__
                raise Refused("wrong_type", f"{column}[{i}] is a {kind}; give integers", token)
            if not 0 <= token < self._vocab_size:
                shown = str(token)[:24]
                raise Refused(
                    "bad_token_id", f"{column}[{i}] is {shown}; ids go from 0 to {self._vocab_size - 1}"
                )
        if not value:
            raise Refused("empty_prompt", f"column {column!r} is an empty list; give at least one token")
        return value

    def _rendered(self, template: RowTemplate, row: SourceRow, name: str) -> str:
        try:
            return template.render(row.columns)
        except MissingColumn as error:
            raise Refused("missing_column", f"{name}: column {error.message}; add it to the row") from error
        except NullPrinted as error:
            nulls = sorted(key for key, value in row.columns.items() if value is None)
            which = f" (null here: {', '.join(nulls[:8])})" if nulls else ""
            raise Refused(
                "null_value", f"{name}: {error.message}{which}; give a value or a default"
            ) from error
        except RENDER_ERRORS as error:
            kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
            said = " ".join(str(error).split())[:200]
            raise Refused("template_error", f"{name}: {kind}{said}") from error

    def _checked_text(self, text: str) -> str:
        if len(text) > self._settings.max_prompt_chars:
            limit = f"{self._settings.max_prompt_chars} (prompt.max_prompt_chars)"
            raise Refused("prompt_too_long", f"a text of {len(text)} characters, more than {limit}", text)
        if has_lone_surrogate(text):
            raise Refused("lone_surrogate", "the prompt holds half of a surrogate pair; mend the text", text)
        return text

    @property
    def _has_chat_template(self) -> bool:
        return bool(getattr(self._tokenizer, "chat_template", None))

    @property
    def _names(self) -> dict[str, str]:
        settings = self._settings
        return {
            "prompt_token_ids": settings.prompt_token_ids_column,
            "messages": settings.messages_column,
            "prompt": settings.prompt_column,
        }

    def _compiled(self, text: str | None, file: str | None, name: str) -> RowTemplate | None:
        found = read_template(text, file, name)
        return None if found is None else RowTemplate(*found, max_chars=self._settings.max_prompt_chars)


def column_of(row: SourceRow, name: str, setting: str) -> Any:
    """The column's value; Refused when the row has no such column. `setting` is what names it."""
    if name not in row.columns:
        raise Refused("missing_column", f"no column {name!r}; add it to the row or correct {setting}")
    return row.columns[name]
