"""The one Arrow schema of data/ and the one of trace/, each with a version in its metadata.

A row of data/ holds only what the input and the configuration determine; what depends on how a run went is in
trace/. Input columns that are carried over come last, prefixed `input_`, with types fixed in the plan.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

SCHEMA_VERSION = 1
CARRIED_PREFIX = "input_"


def _list_of(kind: pa.DataType) -> pa.ListType:
    # By Parquet's own name for a list's values, so that a file's schema is read back as it was written.
    return pa.list_(pa.field("element", kind))


_TOP = _list_of(_list_of(pa.struct([("token_id", pa.int32()), ("logprob", pa.float32())])))

_DATA_FIELDS = [
    pa.field("row_id", pa.string(), nullable=False),
    pa.field("sample_index", pa.int32(), nullable=False),
    pa.field("status", pa.string(), nullable=False),
    pa.field("text", pa.string()),
    pa.field("token_ids", _list_of(pa.int32())),
    pa.field("finish_reason", pa.string()),
    pa.field("stop_reason", pa.string()),
    pa.field("num_prompt_tokens", pa.int32()),
    pa.field("num_generated_tokens", pa.int32()),
    pa.field("prompt_truncated", pa.bool_()),
    pa.field("cumulative_logprob", pa.float64()),
    pa.field("logprobs", _list_of(pa.float32())),
    pa.field("top_logprobs", _TOP),
    pa.field("prompt_logprobs", _list_of(pa.float32())),
    pa.field("prompt_top_logprobs", _TOP),
    pa.field("seed", pa.int64()),
    pa.field("error", pa.string()),
]

_TRACE_FIELDS = [
    pa.field("row_id", pa.string(), nullable=False),
    pa.field("sample_index", pa.int32(), nullable=False),
    pa.field("shard", pa.int32(), nullable=False),
    pa.field("chunk", pa.int32(), nullable=False),
    pa.field("attempt", pa.string(), nullable=False),
    pa.field("num_cached_tokens", pa.int32()),
    pa.field("num_preemptions", pa.int32()),
    # When the chunk began, by the worker's calendar; the times after it are seconds since then.
    pa.field("chunk_started", pa.timestamp("us", tz="UTC")),
    pa.field("arrival_s", pa.float64()),
    pa.field("first_scheduled_s", pa.float64()),
    pa.field("first_token_s", pa.float64()),
    pa.field("finished_s", pa.float64()),
]


@dataclass(frozen=True, slots=True)
class CarriedColumn:
    """An input column copied to data/ as `input_<name>`.

    `kind` is "arrow" (values are stored as `type`) or "json" (values of mixed types, each as its JSON text).
    """

    name: str
    kind: str
    type: pa.DataType

    @property
    def output_name(self) -> str:
        return CARRIED_PREFIX + self.name

    def to_json(self) -> dict[str, str]:
        schema = pa.schema([pa.field("v", self.type)]).serialize().to_pybytes()
        return {
            "name": self.name,
            "kind": self.kind,
            "type": str(self.type),
            "arrow": base64.b64encode(schema).decode("ascii"),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, str]) -> CarriedColumn:
        schema = pa.ipc.read_schema(pa.BufferReader(base64.b64decode(value["arrow"])))
        return cls(value["name"], value["kind"], schema.field("v").type)


def json_text_column(name: str) -> CarriedColumn:
    return CarriedColumn(name, "json", pa.string())


def carried_from_arrow(names: Sequence[str], schemas: Sequence[pa.Schema]) -> tuple[CarriedColumn, ...]:
    """Columns for Parquet inputs: a type all files agree on is kept, anything else becomes JSON text."""
    columns = []
    for name in names:
        types = {_plain(schema.field(name).type) for schema in schemas if name in schema.names}
        columns.append(
            CarriedColumn(name, "arrow", types.pop()) if len(types) == 1 else json_text_column(name)
        )
    return tuple(columns)


def carried_from_values(names: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> tuple[CarriedColumn, ...]:
    """Columns for JSON inputs, from a sample of rows: one scalar type throughout is kept, else JSON text."""
    seen: dict[str, set[pa.DataType | None]] = {name: set() for name in names}
    for row in rows:
        for name in names:
            value = row.get(name)
            if value is not None:
                seen[name].add(_SCALARS.get(type(value)))
    columns = []
    for name in names:
        types = seen[name]
        if types == {pa.int64(), pa.float64()}:
            types = {pa.float64()}
        only = next(iter(types)) if len(types) == 1 else None
        columns.append(json_text_column(name) if only is None else CarriedColumn(name, "arrow", only))
    return tuple(columns)


def agree(parts: Sequence[tuple[CarriedColumn, ...]]) -> tuple[CarriedColumn, ...]:
    """One list of columns from several inputs' (same names, same order); disagreement becomes JSON text."""
    return tuple(
        same[0] if all(column == same[0] for column in same) else json_text_column(same[0].name)
        for same in zip(*parts, strict=True)
    )


_SCALARS: dict[type, pa.DataType] = {
    str: pa.string(),
    bool: pa.bool_(),
    int: pa.int64(),
    float: pa.float64(),
}


def _plain(type_: pa.DataType) -> pa.DataType:
    """The value type of a dictionary-encoded column; large and view strings as plain ones."""
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
    if pa.types.is_large_string(type_) or pa.types.is_string_view(type_):
        return pa.string()
    return type_


RESPONSE = "response"
"""The column that chunks of batch files have besides: a row's answer as JSON text, with its first sample."""


def data_schema(carried: Sequence[CarriedColumn] = (), with_responses: bool = False) -> pa.Schema:
    """`with_responses`: of a run whose output has OpenAI's batch format, made of that column."""
    fields = [*_DATA_FIELDS, *(pa.field(column.output_name, column.type) for column in carried)]
    if with_responses:
        fields.append(pa.field(RESPONSE, pa.string()))
    return pa.schema(fields, metadata={b"tidemill.schema_version": str(SCHEMA_VERSION).encode()})


def trace_schema() -> pa.Schema:
    return pa.schema(_TRACE_FIELDS, metadata={b"tidemill.schema_version": str(SCHEMA_VERSION).encode()})


def carried_value(column: CarriedColumn, value: Any) -> Any:
    """A value as the column stores it; pa.ArrowException, ValueError, TypeError when it does not fit."""
    if value is None:
        return None
    if column.kind == "json":
        return json_text(value)
    for is_type, wanted in ((pa.types.is_boolean, bool), (pa.types.is_string, str)):
        if is_type(column.type) and not isinstance(value, wanted):
            raise TypeError(f"{type(value).__name__} in a column of {column.type}")
    pa.scalar(value, type=column.type)  # raises where it does not fit
    return value


def json_text(value: Any) -> str:
    """A value's JSON text, in ASCII; what JSON has no form for (a date, bytes) as its Python text."""
    return json.dumps(value, sort_keys=True, default=str)
