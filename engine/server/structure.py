"""The form that an answer must have, from whichever field of a body says so."""

from __future__ import annotations

import json
from typing import Any

from engine.errors import RequestError
from engine.server.errors import bad_request
from engine.server.fields import ChatSchemaFormat, JsonObjectFormat, SamplingFields, TextFormat
from engine.server.settings import ServerSettings
from engine.server.tool_choice import ToolChoice
from engine.structured import StructuredOutput

Format = TextFormat | JsonObjectFormat | ChatSchemaFormat


def structured_output(
    body: SamplingFields,
    settings: ServerSettings,
    *,
    response_format: Format | None = None,
    tools: ToolChoice | None = None,
) -> StructuredOutput | None:
    """What the fields of a body ask for; None for free text. Raises ApiError (400) for two forms at once."""
    wanted = [*_of_format(response_format), *_of_guided(body)]
    call_schema = tools.call_schema if tools else None
    if call_schema is not None:
        # A call comes in the place of the answer that the format is about.
        wanted = [("tool_choice", "json", call_schema), *wanted[len(_of_format(response_format)) :]]
    return make_structured(wanted, settings)


def make_structured(wanted: list[tuple[str, str, Any]], settings: ServerSettings) -> StructuredOutput | None:
    """Of (field of the body, field of StructuredOutput, value) at most one. Raises ApiError (400)."""
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
        return StructuredOutput(**{kind: tuple(value) if kind == "choice" else value})
    except RequestError as error:
        raise bad_request(str(error), param, "invalid_structured_output") from error


def _of_format(given: Format | None) -> list[tuple[str, str, Any]]:
    if given is None or isinstance(given, TextFormat):
        return []
    if isinstance(given, JsonObjectFormat):
        return [("response_format", "json_object", True)]
    schema = given.json_schema.schema_
    if schema is None:
        param = "response_format.json_schema.schema"
        raise bad_request(f"Missing required parameter: '{param}'.", param, "missing_required_parameter")
    return [("response_format", "json", schema)]


def _of_guided(body: SamplingFields) -> list[tuple[str, str, Any]]:
    """vLLM's fields: `guided_*`, and `structured_outputs`, which came after them."""
    found = [
        (f"guided_{kind}", kind, value)
        for kind in ("json", "regex", "choice", "grammar")
        if (value := getattr(body, f"guided_{kind}")) is not None
    ]
    if body.structured_outputs is not None:
        given = body.structured_outputs.model_dump(by_alias=True, exclude_none=True)
        found += [(f"structured_outputs.{kind}", kind, value) for kind, value in given.items() if value != False]  # noqa: E712
    return found
