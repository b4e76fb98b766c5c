"""The form that an answer must have, from whichever field of a body says so."""

from __future__ import annotations

import json
from typing import Any

from engine.errors import RequestError
from engine.server.errors import bad_request
from engine.server.fields import ChatSchemaFormat, JsonObjectFormat, SamplingFields, TextFormat
from engine.server.settings import ServerSettings
from engine.server.tool_choice import ToolChoice
from engine.structured.spec import StructuredOutput

Wanted = tuple[str, str, Any]
"""The field of a body that asks for a form, the field of StructuredOutput that says it, and its value."""


def structured_output(
    body: SamplingFields,
    settings: ServerSettings,
    *,
    form: Wanted | None = None,
    tools: ToolChoice | None = None,
) -> StructuredOutput | None:
    """What a body asks for, by its own field for it (`form`), vLLM's fields, or a call that has to be made;
    None for free text. Raises ApiError (400) for two forms at once."""
    call_schema = tools.call_schema if tools else None
    if call_schema is not None:  # a call comes in the place of the answer that `form` is about
        form = ("tool_choice", "json", call_schema)
    return make_structured([*([form] if form else []), *_of_guided(body)], settings)


def chat_form(given: TextFormat | JsonObjectFormat | ChatSchemaFormat | None) -> Wanted | None:
    """What `response_format` asks for. Raises ApiError (400) for a schema that is not there."""
    if given is None:
        return None
    is_schema = isinstance(given, ChatSchemaFormat)
    return wanted_format(given.type, given.json_schema.schema_ if is_schema else None, "response_format")


def wanted_format(kind: str, schema: dict[str, Any] | None, param: str) -> Wanted | None:
    """Of OpenAI's three types."""
    if kind == "text":
        return None
    if kind == "json_object":
        return (param, "json_object", True)
    if schema is None:
        message = f"Missing required parameter: '{param}.schema'."
        raise bad_request(message, param, "missing_required_parameter")
    return (param, "json", schema)


def make_structured(wanted: list[Wanted], settings: ServerSettings) -> StructuredOutput | None:
    """At most one is taken. Raises ApiError (400)."""
    if not wanted:
        return None
    if len(wanted) > 1:
        names = " and ".join(param for param, *_ in wanted[:2])
        raise bad_request(f"{names} both say what form the answer has: give one of them", wanted[1][0])
    param, kind, value = wanted[0]
    size = len(value) if isinstance(value, str) else len(json.dumps(value))
    if size > settings.max_schema_bytes:
        message = f"{param} is {size} bytes: at most {settings.max_schema_bytes} are taken"
        raise bad_request(message, param, "string_above_max_length")
    try:
        return StructuredOutput.of({kind: value})
    except RequestError as error:
        raise bad_request(str(error), param, "invalid_structured_output") from error


def _of_guided(body: SamplingFields) -> list[Wanted]:
    """vLLM's fields: `guided_*`, and `structured_outputs`, which came after them."""
    found = [
        (f"guided_{kind}", kind, value)
        for kind in ("json", "regex", "choice", "grammar")
        if (value := getattr(body, f"guided_{kind}")) is not None
    ]
    if body.structured_outputs is not None:
        given = body.structured_outputs.model_dump(by_alias=True, exclude_none=True)
        found += [(f"structured_outputs.{kind}", kind, value) for kind, value in given.items() if value]
    return found
