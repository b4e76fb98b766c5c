"""Rows to prompts: choose the row's form, render it, tokenise it, fit it, or say why it cannot run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jinja2

from engine.errors import ConfigError, RequestError
from engine.sampling_params import SamplingParams
from pipeline.chats import BadChat, Chat, checked_chat, render_chat
from pipeline.fitting import OverLong, fit
from pipeline.id_index import IdIndex
from pipeline.row_ids import BadId, content_id, named_id
from pipeline.rows import Prompt, Reject, SourceRow, reject_row
from pipeline.shards import InputSettings
from pipeline.strict_json import BadJson, has_lone_surrogate, loads
from pipeline.templates import RENDER_ERRORS, MissingColumn, NullPrinted, RowTemplate, read_template

PromptForm = Literal["auto", "prompt", "messages", "prompt_token_ids", "template"]

_MAX_SAMPLING_DEPTH = 4


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


class _Refused(Exception):
    def __init__(self, reason: str, message: str, value: object = ""):
        super().__init__(message)
        self.reason = reason
        self.value = value


@dataclass(slots=True)
class _Draft:
    """A prompt before tokenisation: text or token ids."""

    row: SourceRow
    row_id: str
    sampling: SamplingParams
    text: str | None
    token_ids: Sequence[int] | None
    chat: Chat | None


class PromptBuilder:
    """Builds prompts from rows; the same row always gives the same prompt.

    A prompt fits when its tokens and `sampling.max_tokens` together are at most `max_model_len`. Text goes
    through the tokenizer with its special tokens; a chat without, because its template writes them. Text that
    begins with BOS itself gets no second one.
    """

    def __init__(
        self,
        settings: PromptSettings,
        input_settings: InputSettings,
        tokenizer: Any,
        default_sampling: SamplingParams,
        max_model_len: int,
        vocab_size: int | None = None,
        id_index: IdIndex | None = None,
    ):
        """`vocab_size` is the model's (default: the tokenizer's); `id_index` finds repeated ids."""
        self._settings = settings
        self._input = input_settings
        self._tokenizer = tokenizer
        self._default_sampling = default_sampling
        self._max_model_len = max_model_len
        self._vocab_size = len(tokenizer) if vocab_size is None else vocab_size
        self._id_index = id_index
        self._template = self._compiled(settings.template, settings.template_file, "template")
        self._system = self._compiled(settings.system_template, None, "system_template")
        if (settings.chat or settings.form == "messages") and not self._has_chat_template:
            raise ConfigError(
                "the model has no chat template; set prompt.chat=false and give prompts as text"
            )
        if self._template is not None and self._template.columns == frozenset():
            raise ConfigError("prompt.template uses no column; write {{ name }} where a column's value goes")
        if settings.sampling_column is None and default_sampling.max_tokens >= max_model_len:
            asked = default_sampling.max_tokens
            raise ConfigError(
                f"sampling.max_tokens={asked} leaves no room for a prompt in {max_model_len} tokens"
            )

    @property
    def columns_needed(self) -> tuple[str, ...] | None:
        """Columns to read, sorted; None when the template may use any."""
        form = self._form_columns
        if form is None or (self._system is not None and self._system.columns is None):
            return None
        others = (self._input.id_column, self._settings.sampling_column, *self._input.carry_columns)
        return tuple(sorted(form | {name for name in others if name is not None}))

    @property
    def template_sources(self) -> dict[str, str | None]:
        """The texts that shape every prompt, for the run's fingerprint."""
        return {
            "template": None if self._template is None else self._template.source,
            "system_template": None if self._system is None else self._system.source,
            "chat_template": self._tokenizer.chat_template if self._has_chat_template else None,
        }

    def build(self, row: SourceRow) -> Prompt | Reject:
        return self.build_many([row])[0]

    def build_many(self, rows: Sequence[SourceRow | Reject]) -> list[Prompt | Reject]:
        """One result a row, in order; rejects pass through. Tokenises all rows in one call."""
        drafts = [row if isinstance(row, Reject) else self._draft(row) for row in rows]
        self._tokenise([draft for draft in drafts if isinstance(draft, _Draft)])
        return [draft if isinstance(draft, Reject) else self._finish(draft) for draft in drafts]

    # A row's way to a draft

    def _draft(self, row: SourceRow) -> _Draft | Reject:
        row_id = None
        try:
            row_id = self._row_id(row)
            self._check_first(row, row_id)
            sampling = self._sampling(row)
            form = self._form(row)
            if form == "prompt_token_ids":
                return _Draft(row, row_id, sampling, None, self._token_ids(row), None)
            text, chat = self._messages(row) if form == "messages" else self._text(row, form)
            return _Draft(row, row_id, sampling, self._checked_text(text), None, chat)
        except _Refused as refused:
            return reject_row(row, row_id, refused.reason, str(refused), refused.value)
        except (BadId, BadChat) as error:
            return reject_row(row, row_id, error.reason, str(error))

    def _row_id(self, row: SourceRow) -> str:
        column = self._input.id_column
        if column is not None:
            return named_id(self._column(row, column, "input.id_column"), column)
        form = self._form_columns
        content = {name: row.columns[name] for name in form or row.columns if name in row.columns}
        return content_id(row.source, row.first_row + row.position, content)

    def _check_first(self, row: SourceRow, row_id: str) -> None:
        if self._id_index is None or self._input.id_column is None:
            return
        first = self._id_index.first_of(row_id, row.shard_index, row.position)
        if first is not None:
            where = f"shard {first[0]} row {first[1]}" if first[0] != row.shard_index else f"row {first[1]}"
            message = f"id {row_id[:80]!r} was already given to {where} (counting from 0); make ids unique"
            raise _Refused("duplicate_id", message, row_id)

    def _sampling(self, row: SourceRow) -> SamplingParams:
        column = self._settings.sampling_column
        sampling = self._default_sampling
        if column is not None:
            value = self._column(row, column, "prompt.sampling_column")
            try:
                sampling = _overridden(sampling, value)
                sampling.check_vocab(self._vocab_size)
            except BadJson as error:
                raise _Refused("bad_sampling", f"column {column!r}: {error}", value) from error
            except RequestError as error:
                raise _Refused(error.reason, f"column {column!r}: {error}", value) from error
        if sampling.max_tokens >= self._max_model_len:
            asked, most = sampling.max_tokens, self._max_model_len
            message = (
                f"sampling.max_tokens={asked} leaves no room for a prompt in {most} tokens; ask for fewer"
            )
            raise _Refused("bad_sampling", message)
        return sampling

    def _form(self, row: SourceRow) -> str:
        settings = self._settings
        if self._template is not None:
            return "template"
        if settings.form != "auto":
            return settings.form
        names = self._form_names
        present = {form: name for form, name in names.items() if name in row.columns}
        given = [form for form, name in present.items() if row.columns[name] is not None]
        if len(given) == 1:
            return given[0]
        listed = ", ".join(repr(name) for name in (present or names).values())
        if given:
            both = " and ".join(repr(names[form]) for form in given)
            raise _Refused("ambiguous_prompt", f"columns {both} are both given; say which with prompt.form")
        if present:
            raise _Refused("null_value", f"column {listed} is null; give each row a prompt")
        raise _Refused(
            "missing_column", f"none of the columns {listed}; add one or name it in prompt.*_column"
        )

    def _text(self, row: SourceRow, form: str) -> tuple[str, Chat | None]:
        if form == "template":
            assert self._template is not None
            text = self._rendered(self._template, row, "prompt.template")
        else:
            column = self._settings.prompt_column
            text = self._column(row, column, "prompt.prompt_column")
            if text is None:
                raise _Refused("null_value", f"column {column!r} is null; give each row a prompt")
            if not isinstance(text, str):
                kind = type(text).__name__
                raise _Refused("wrong_type", f"column {column!r} is a {kind}; a prompt is text", text)
        if not text.strip():
            raise _Refused("empty_prompt", "the prompt is empty; give it text or take the row out")
        if not self._settings.chat:
            return text, None
        self._checked_text(text)
        chat = self._with_system([{"role": "user", "content": text}], row)
        return render_chat(self._tokenizer, chat, self._settings.add_generation_prompt), chat

    def _messages(self, row: SourceRow) -> tuple[str, Chat]:
        column = self._settings.messages_column
        value = self._column(row, column, "prompt.messages_column")
        if value is None:
            raise _Refused("null_value", f"column {column!r} is null; give each row a chat")
        chat = self._with_system(checked_chat(value, column), row)
        for message in chat:
            self._checked_text(message["content"])
        if not self._has_chat_template:
            raise _Refused("template_error", "the model has no chat template; give prompts as text")
        return render_chat(self._tokenizer, chat, self._settings.add_generation_prompt), chat

    def _with_system(self, chat: Chat, row: SourceRow) -> Chat:
        if self._system is None or chat[0]["role"] in ("system", "developer"):
            return chat
        content = self._checked_text(self._rendered(self._system, row, "prompt.system_template"))
        return [{"role": "system", "content": content}, *chat]

    def _token_ids(self, row: SourceRow) -> list[int]:
        column = self._settings.prompt_token_ids_column
        value = self._column(row, column, "prompt.prompt_token_ids_column")
        if value is None:
            raise _Refused("null_value", f"column {column!r} is null; give each row a prompt")
        if not isinstance(value, list):
            kind = type(value).__name__
            raise _Refused("wrong_type", f"column {column!r} is a {kind}; give a list of integers", value)
        for i, token in enumerate(value):
            if isinstance(token, bool) or not isinstance(token, int):
                kind = type(token).__name__
                raise _Refused("wrong_type", f"{column}[{i}] is a {kind}; give integers", token)
            if not 0 <= token < self._vocab_size:
                shown = str(token)[:24]
                raise _Refused(
                    "bad_token_id", f"{column}[{i}] is {shown}; ids go from 0 to {self._vocab_size - 1}"
                )
        if not value:
            raise _Refused("empty_prompt", f"column {column!r} is an empty list; give at least one token")
        return value

    # From a draft to a prompt

    def _tokenise(self, drafts: Sequence[_Draft]) -> None:
        for is_chat in (False, True):
            batch = [
                draft for draft in drafts if draft.text is not None and (draft.chat is not None) == is_chat
            ]
            if batch:
                texts = [draft.text or "" for draft in batch]
                # A chat's template writes BOS itself; a second one would change what the model reads.
                for draft, token_ids in zip(batch, self._encode(texts, not is_chat), strict=True):
                    draft.token_ids = token_ids if is_chat else self._one_bos(draft.text or "", token_ids)

    def _finish(self, draft: _Draft) -> Prompt | Reject:
        row, sampling, token_ids = draft.row, draft.sampling, draft.token_ids
        assert token_ids is not None
        if not token_ids:
            return reject_row(row, draft.row_id, "empty_prompt", "the prompt has no tokens; give it text")
        room = self._max_model_len - sampling.max_tokens
        if len(token_ids) <= room:
            kept: tuple[int, ...] | None = tuple(token_ids)
        else:
            num_head = 1 if token_ids[0] == self._tokenizer.bos_token_id else 0
            num_tail = self._num_opening_tokens(draft)
            kept = fit(token_ids, room, self._settings.over_long, num_head, num_tail)
        if kept is None:
            message = (
                f"the prompt has {len(token_ids)} tokens and max_tokens is {sampling.max_tokens}: more than "
                f"max_model_len={self._max_model_len}; shorten it, or set prompt.over_long=truncate_left"
            )
            return reject_row(row, draft.row_id, "prompt_too_long", message, draft.text or token_ids[:50])
        was_truncated = len(kept) < len(token_ids)
        text = draft.text
        if was_truncated and text is not None:
            text = self._tokenizer.decode(list(kept), skip_special_tokens=False)
        carried = {name: row.columns.get(name) for name in self._input.carry_columns}
        return Prompt(
            draft.row_id, row.shard_index, row.position, kept, text, sampling, carried, was_truncated
        )

    def _num_opening_tokens(self, draft: _Draft) -> int:
        """Tokens at the end that open the assistant's turn, which no cut may take."""
        if draft.chat is None or not self._settings.add_generation_prompt:
            return 0
        assert draft.text is not None
        assert draft.token_ids is not None
        without = render_chat(self._tokenizer, draft.chat, add_generation_prompt=False)
        opening = draft.text.removeprefix(without)
        if opening in ("", draft.text):
            return 0
        [token_ids] = self._encode([opening], False)
        return len(token_ids) if list(draft.token_ids[-len(token_ids) :]) == token_ids else 0

    # Small questions

    @property
    def _has_chat_template(self) -> bool:
        return bool(getattr(self._tokenizer, "chat_template", None))

    @property
    def _form_names(self) -> dict[str, str]:
        settings = self._settings
        return {
            "prompt_token_ids": settings.prompt_token_ids_column,
            "messages": settings.messages_column,
            "prompt": settings.prompt_column,
        }

    @property
    def _form_columns(self) -> frozenset[str] | None:
        """The columns that make the prompt, and with it the row's id; None for all."""
        if self._template is not None:
            columns = self._template.columns
        elif self._settings.form == "auto":
            columns = frozenset(self._form_names.values())
        else:
            columns = frozenset({self._form_names[self._settings.form]})
        if columns is None or self._system is None:
            return columns
        return None if self._system.columns is None else columns | self._system.columns

    def _compiled(self, text: str | None, file: str | None, name: str) -> RowTemplate | None:
        found = read_template(text, file, name)
        return None if found is None else RowTemplate(*found, max_chars=self._settings.max_prompt_chars)

    def _rendered(self, template: RowTemplate, row: SourceRow, name: str) -> str:
        try:
            return template.render(row.columns)
        except MissingColumn as error:
            raise _Refused("missing_column", f"{name}: column {error.message}; add it to the row") from error
        except NullPrinted as error:
            nulls = sorted(key for key, value in row.columns.items() if value is None)
            which = f" (null here: {', '.join(nulls[:8])})" if nulls else ""
            raise _Refused(
                "null_value", f"{name}: {error.message}{which}; give a value or a default"
            ) from error
        except RENDER_ERRORS as error:
            kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
            said = " ".join(str(error).split())[:200]
            raise _Refused("template_error", f"{name}: {kind}{said}") from error

    def _column(self, row: SourceRow, name: str, setting: str) -> Any:
        if name not in row.columns:
            raise _Refused("missing_column", f"no column {name!r}; add it to the row or correct {setting}")
        return row.columns[name]

    def _checked_text(self, text: str) -> str:
        if len(text) > self._settings.max_prompt_chars:
            limit = f"{self._settings.max_prompt_chars} (prompt.max_prompt_chars)"
            raise _Refused("prompt_too_long", f"a text of {len(text)} characters, more than {limit}", text)
        if has_lone_surrogate(text):
            raise _Refused("lone_surrogate", "the prompt holds half of a surrogate pair; mend the text", text)
        return text

    def _encode(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        encoded = self._tokenizer(
            texts,
            add_special_tokens=add_special_tokens,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return encoded["input_ids"]

    def _one_bos(self, text: str, token_ids: list[int]) -> list[int]:
        """Without the BOS that the tokenizer put before text that already begins with one."""
        bos = self._tokenizer.bos_token_id
        has_two = bos is not None and token_ids[:2] == [bos, bos]
        return token_ids[1:] if has_two and text.startswith(self._tokenizer.bos_token) else token_ids


def _overridden(default: SamplingParams, value: Any) -> SamplingParams:
    """`default` with a row's overrides. Raises BadJson or RequestError."""
    if isinstance(value, str):
        value = loads(value, _MAX_SAMPLING_DEPTH)
    if value is None:
        return default
    if not isinstance(value, dict):
        return SamplingParams.from_dict(value)  # says what is wrong with it
    overrides = {name: given for name, given in value.items() if given is not None}
    fields = {field.name: getattr(default, field.name) for field in dataclasses.fields(default)}
    if "max_new_tokens" in overrides:
        del fields["max_tokens"]
    return SamplingParams.from_dict(fields | overrides)
