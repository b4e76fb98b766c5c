"""Rows to prompts: who a row is, how it is sampled, what it says in tokens, and whether that fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import ConfigError, RequestError
from engine.sampling_params import ALIASES, INTERACTIVE_FIELDS, SamplingParams
from engine.structured.grammars import check_structured, require_llguidance
from engine.structured.spec import MAX_SCHEMA_DEPTH
from pipeline.fitting import fit
from pipeline.forms import Content, PromptForms, column_of
from pipeline.id_index import IdIndex
from pipeline.openai_batch import BatchForms
from pipeline.prompt_settings import PromptSettings
from pipeline.row_ids import content_id, named_id
from pipeline.rows import BatchAnswer, Prompt, Refused, Reject, SourceRow, reject_row
from pipeline.shards import InputSettings
from pipeline.strict_json import BadJson, loads

_MAX_SAMPLING_DEPTH = 4 + MAX_SCHEMA_DEPTH


@dataclass(frozen=True, slots=True)
class _Draft:
    """A prompt before tokenisation."""

    row: SourceRow
    row_id: str
    sampling: SamplingParams
    content: Content
    answer: BatchAnswer | None = None


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
        self._forms: PromptForms | BatchForms
        if input_settings.format == "openai_batch":
            self._forms = BatchForms(
                tokenizer,
                self._vocab_size,
                default_sampling,
                endpoint=input_settings.endpoint,
                served_model=input_settings.served_model,
                max_prompt_chars=settings.max_prompt_chars,
            )
            return
        self._forms = PromptForms(settings, tokenizer, self._vocab_size)
        if settings.sampling_column is None and default_sampling.max_tokens >= max_model_len:
            asked = default_sampling.max_tokens
            raise ConfigError(
                f"sampling.max_tokens={asked} leaves no room for a prompt in {max_model_len} tokens"
            )
        if settings.schema_column is not None:
            require_llguidance("prompt.schema_column")
        try:
            check_structured(default_sampling.structured)
        except RequestError as error:
            raise ConfigError(str(error)) from error

    @property
    def tokenizer(self) -> Any:
        return self._tokenizer

    @property
    def columns_needed(self) -> tuple[str, ...] | None:
        """Columns to read, sorted; None when a template may use any."""
        columns = self._forms.columns
        if columns is None:
            return None
        settings = self._settings
        others = (self._input.id_column, settings.sampling_column, settings.schema_column)
        others += tuple(self._input.carry_columns)
        return tuple(sorted(columns | {name for name in others if name is not None}))

    @property
    def template_sources(self) -> dict[str, str | None]:
        """The texts that shape every prompt, for the run's fingerprint."""
        return self._forms.template_sources

    def build(self, row: SourceRow) -> Prompt | Reject:
        return self.build_many([row])[0]

    def build_many(self, rows: Sequence[SourceRow | Reject]) -> list[Prompt | Reject]:
        """One result a row, in order; rejects pass through. Tokenises all rows in one call."""
        drafts = [row if isinstance(row, Reject) else self._draft(row) for row in rows]
        encoded = iter(self._tokenised([draft.content for draft in drafts if isinstance(draft, _Draft)]))
        return [
            draft if isinstance(draft, Reject) else self._finish(draft, next(encoded)) for draft in drafts
        ]

    # A row's way to a draft

    def _draft(self, row: SourceRow) -> _Draft | Reject:
        row_id = None
        try:
            row_id = self._row_id(row)
            self._check_first(row, row_id)
            if isinstance(self._forms, BatchForms):
                read = self._forms.read(row)
                return _Draft(row, row_id, read.sampling, read.content, read.answer)
            return _Draft(row, row_id, self._sampling(row), self._forms.read(row))
        except Refused as refused:
            return reject_row(row, row_id, refused.reason, str(refused), refused.value)

    def _row_id(self, row: SourceRow) -> str:
        column = self._input.id_column
        if column is not None:
            return named_id(column_of(row, column, "input.id_column"), column)
        form = self._forms.columns
        content = {name: row.columns[name] for name in form or row.columns if name in row.columns}
        return content_id(row.source, row.first_row + row.position, content)

    def _check_first(self, row: SourceRow, row_id: str) -> None:
        if self._id_index is None or self._input.id_column is None:
            return
        first = self._id_index.first_of(row_id, row.shard_index, row.position)
        if first is not None:
            where = f"shard {first[0]} row {first[1]}" if first[0] != row.shard_index else f"row {first[1]}"
            message = f"id {row_id[:80]!r} was already given to {where} (counting from 0); make ids unique"
            raise Refused("duplicate_id", message, row_id)

    def _sampling(self, row: SourceRow) -> SamplingParams:
        column = self._settings.sampling_column
        sampling = self._default_sampling
        if column is not None:
            value = column_of(row, column, "prompt.sampling_column")
            try:
                sampling = _overridden(sampling, value)
                sampling.check_vocab(self._vocab_size)
                check_structured(sampling.structured)
            except BadJson as error:
                raise Refused("bad_sampling", f"column {column!r}: {error}", value) from error
            except RequestError as error:
                raise Refused(error.reason, f"column {column!r}: {error}", value) from error
        column = self._settings.schema_column
        schema = None if column is None else column_of(row, column, "prompt.schema_column")
        if schema is not None:
            try:
                sampling = sampling.replace(structured={"json": schema})
                check_structured(sampling.structured)
            except RequestError as error:
                raise Refused("bad_schema", f"column {column!r}: {error}", schema) from error
        if sampling.max_tokens >= self._max_model_len:
            asked, most = sampling.max_tokens, self._max_model_len
            message = (
                f"sampling.max_tokens={asked} leaves no room for a prompt in {most} tokens; ask for fewer"
            )
            raise Refused("bad_sampling", message)
        return sampling

    # From a draft to a prompt

    def _tokenised(self, contents: Sequence[Content]) -> list[Sequence[int]]:
        found = [content.token_ids or () for content in contents]
        for is_chat in (False, True):
            batch = [
                (i, content.text)
                for i, content in enumerate(contents)
                if content.text is not None and (content.chat is not None) == is_chat
            ]
            if batch:
                # A chat's template writes BOS itself; a second one would change what the model reads.
                encoded = self._encode([text for _, text in batch], add_special_tokens=not is_chat)
                for (i, text), token_ids in zip(batch, encoded, strict=True):
                    found[i] = token_ids if is_chat else self._one_bos(text, token_ids)
        return found

    def _finish(self, draft: _Draft, token_ids: Sequence[int]) -> Prompt | Reject:
        row, sampling, text = draft.row, draft.sampling, draft.content.text
        if not token_ids:
            return reject_row(row, draft.row_id, "empty_prompt", "the prompt has no tokens; give it text")
        if draft.answer is not None and not draft.answer.has_max_tokens:
            # As many as fit: a minimum that does not is the row's own fault.
            most = max(1, self._max_model_len - len(token_ids))
            try:
                sampling = sampling.replace(max_tokens=min(most, sampling.max_tokens))
            except RequestError as error:
                return reject_row(row, draft.row_id, error.reason, str(error), text or "")
        room = self._max_model_len - sampling.max_tokens
        kept: Sequence[int] | None = token_ids
        if len(token_ids) > room:
            num_head = 1 if token_ids[0] == self._tokenizer.bos_token_id else 0
            num_tail = self._num_opening_tokens(draft.content, token_ids)
            kept = fit(token_ids, room, self._settings.over_long, num_head, num_tail)
        if kept is None:
            remedy = "" if draft.answer is not None else ", or set prompt.over_long=truncate_left"
            message = (
                f"the prompt has {len(token_ids)} tokens and max_tokens is {sampling.max_tokens}: more than "
                f"max_model_len={self._max_model_len}; shorten it{remedy}"
            )
            return reject_row(row, draft.row_id, "prompt_too_long", message, text or token_ids[:50])
        was_truncated = len(kept) < len(token_ids)
        if was_truncated and text is not None:
            text = self._tokenizer.decode(list(kept), skip_special_tokens=False)
        return Prompt(
            row_id=draft.row_id,
            shard_index=row.shard_index,
            position=row.position,
            token_ids=tuple(kept),
            text=text,
            sampling=sampling,
            carried={name: row.columns.get(name) for name in self._input.carry_columns},
            was_truncated=was_truncated,
            answer=draft.answer,
        )

    def _num_opening_tokens(self, content: Content, token_ids: Sequence[int]) -> int:
        """Tokens at the end that open the assistant's turn, which no cut may take."""
        opening = "" if isinstance(self._forms, BatchForms) else self._forms.opening(content)
        if not opening:
            return 0
        [opening_ids] = self._encode([opening], add_special_tokens=False)
        return len(opening_ids) if list(token_ids[-len(opening_ids) :]) == opening_ids else 0

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
    for name in overrides:
        if name in INTERACTIVE_FIELDS:
            message = f"sampling.{name} is for callers of the engine: a job {INTERACTIVE_FIELDS[name]}"
            raise RequestError("bad_sampling", message)
    fields = {field.name: getattr(default, field.name) for field in dataclasses.fields(default)}
    for alias, name in ALIASES.items():
        if alias in overrides:
            del fields[name]
    return SamplingParams.from_dict(fields | overrides)
