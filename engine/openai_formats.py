"""What a request's body holds its text to: `response_format`, and vLLM's fields for the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.openai_fields import Fields, refuse

_GUIDED = {f"guided_{kind}": kind for kind in ("json", "regex", "choice", "grammar")}


def structured_output(fields: Fields) -> dict[str, Any] | None:
    """Take what the text is held to, as the fields of `StructuredOutput`; None where it is free."""
    found: list[tuple[str, dict[str, Any]]] = []
    response_format = fields.take("response_format")
    if response_format is not None and (value := _response_format(response_format)) is not None:
        found.append(("response_format", value))
    for name, kind in _GUIDED.items():
        if (value := fields.take(name)) is not None:
            found.append((name, {kind: value}))
    given = fields.take("structured_outputs")
    if given is not None:
        inner = Fields(given, "structured_outputs")
        for kind in ("json", "regex", "choice", "grammar", "json_object"):
            if (value := inner.take(kind)) is not None:
                found.append((f"structured_outputs.{kind}", {kind: value}))
        inner.refuse_rest()
    if len(found) > 1:
        refuse("bad_request", found[1][0], f"is given together with {found[0][0]}; give one of them")
    return found[0][1] if found else None


def _response_format(value: object) -> dict[str, Any] | None:
    fields = Fields(value, "response_format")
    kind = fields.one_of("type", ("text", "json_object", "json_schema"), "")
    schema = fields.take("json_schema")
    fields.refuse_rest()
    if kind != "json_schema":
        if schema is not None:
            refuse("bad_request", "response_format.json_schema", "needs the type 'json_schema'")
        return {"json_object": True} if kind == "json_object" else None
    inner = Fields({} if schema is None else schema, "response_format.json_schema")
    inner.needed_text("name")
    inner.text("description")
    inner.flag("strict", True)  # the text is held to the schema either way
    wanted = inner.take("schema")
    if not isinstance(wanted, Mapping):
        refuse("missing_column", "response_format.json_schema.schema", "is missing; give a JSON schema")
    inner.refuse_rest()
    return {"json": dict(wanted)}
