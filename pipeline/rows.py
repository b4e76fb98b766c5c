"""What travels through the pipeline's input side: a row as read, a prompt ready to run, a reject.

    SourceRow --PromptBuilder--> Prompt     (or Reject, from the reader or the builder)

A row's `position` counts every row of its shard from 0, rejected ones included, so it never depends on
settings or on where a reader started. Blank JSONL lines are not rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engine.openai_requests import AnswerOptions
from engine.sampling_params import SamplingParams

MAX_EXCERPT_CHARS = 200

REASONS = {
    "not_json": "the line is not JSON",
    "not_utf8": "the line or a text column is not UTF-8",
    "line_too_long": "the line is longer than input.max_line_bytes",
    "row_too_large": "the row decodes to more than input.max_decoded_bytes",
    "too_deep": "the line nests deeper than input.max_json_depth",
    "bad_number": "NaN, Infinity, or a number too long to read",
    "duplicate_key": "an object of the line has a key twice",
    "lone_surrogate": "a text holds half of a surrogate pair",
    "wrong_type": "a value has another type than its place needs",
    "missing_column": "a column, or a key of a message, is not there",
    "null_value": "a value that is needed is null",
    "empty_prompt": "the prompt is empty",
    "ambiguous_prompt": "columns of several prompt forms have values",
    "bad_role": "a message's role is not known",
    "bad_token_id": "a token id is outside the vocabulary",
    "bad_id": "the id is empty or too long",
    "duplicate_id": "an earlier row has the same id",
    "bad_sampling": "sampling values are out of range or unknown",
    "bad_schema": "the row's JSON schema cannot be followed",
    "template_error": "a template fails on the row",
    "prompt_too_long": "the prompt and max_tokens do not fit the model",
    "bad_method": "the method of a batch file's line is not POST",
    "bad_url": "the url of a batch file's line is no endpoint, or not the batch's",
    "wrong_model": "a body names another model than the batch's",
    "unknown_field": "a body has a field that is not known",
    "not_supported": "a body asks for what is not supported",
    "bad_request": "fields of a body contradict each other, or a value is not allowed",
}
"""What a row can be rejected for before it reaches the engine."""


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One row as it was read: only the columns asked for, values as plain Python objects.

    `source` names the file, relative to the input root, or the dataset's split; `line` is the 1-based line of
    a JSONL row. `first_row` is the row of the source at which the shard begins: 0 but for a dataset's slice.
    """

    shard_index: int
    position: int
    columns: dict[str, Any]
    source: str = ""
    line: int | None = None
    first_row: int = 0

    @property
    def place(self) -> str:
        """Where a person finds this row: `a.jsonl line 12`, or `b.parquet row 7` (rows count from 0)."""
        return place(self.source, self.first_row + self.position, self.line)


@dataclass(frozen=True, slots=True)
class Reject:
    """One row that cannot be run. `reason` is a stable code; `message` is one line: where, what, remedy.

    `row_id` is None where the row was not understood well enough to have an id.
    """

    shard_index: int
    position: int
    row_id: str | None
    reason: str
    message: str
    source: str
    excerpt: str
    line: int | None = None


@dataclass(frozen=True, slots=True)
class BatchAnswer:
    """What the answer to a line of a batch file is made with. `has_max_tokens`: its body says how many."""

    model: str
    has_max_tokens: bool
    options: AnswerOptions


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row ready for the engine. `text` is what was tokenised (None when the row held token ids).

    `carried` maps the input columns asked for to their values; `answer` is there for rows of batch files.
    `len(token_ids) + sampling.max_tokens`
    never exceeds the model's length.
    """

    row_id: str
    shard_index: int
    position: int
    token_ids: tuple[int, ...]
    text: str | None
    sampling: SamplingParams
    carried: dict[str, Any]
    was_truncated: bool
    answer: BatchAnswer | None = None


class Refused(Exception):
    """Raised while a row is understood, caught where rows are: it becomes the row's reject.

    `reason` is one of REASONS, the message says what to do, `value` is shown in the excerpt.
    """

    def __init__(self, reason: str, message: str, value: object = ""):
        super().__init__(message)
        self.reason = reason
        self.value = value


def place(source: str, row: int, line: int | None) -> str:
    """`row` counts from 0 in its source, `line` from 1."""
    return f"{source} row {row}" if line is None else f"{source} line {line}"


def excerpt(value: object) -> str:
    """The beginning of `value` as one printable line, safe to log and to store."""
    if isinstance(value, bytes):
        value = value[: 4 * MAX_EXCERPT_CHARS].decode("utf-8", errors="backslashreplace")
    text = value[: MAX_EXCERPT_CHARS + 1] if isinstance(value, str) else repr(value)[: MAX_EXCERPT_CHARS + 1]
    text = printable(text)
    return text if len(text) <= MAX_EXCERPT_CHARS else text[: MAX_EXCERPT_CHARS - 1] + "…"


def printable(text: str) -> str:
    """`text` on one line, with what a terminal or a file could trip over escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def reject_row(row: SourceRow, row_id: str | None, reason: str, message: str, value: object = "") -> Reject:
    """A reject of a row that was read; `message` follows the row's place."""
    return Reject(
        shard_index=row.shard_index,
        position=row.position,
        row_id=row_id,
        reason=reason,
        message=printable(f"{row.place}: {message}"),
        source=row.source,
        excerpt=excerpt(value),
        line=row.line,
    )
