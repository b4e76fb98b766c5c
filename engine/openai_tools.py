"""The tools that a request's body lets a chat call, in the form of chat templates and as a JSON schema."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from engine.openai_fields import Fields, kind_of, refuse

MAX_TOOLS = 128
_TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """Which tools a chat may call, and how.

    mode: "none" has no tools; "auto" leaves it to the model; "required" and "named" hold the model to JSON
    that is a list of calls, or the arguments of the tool `name`.
    """

    tools: tuple[Mapping[str, Any], ...] = ()
    mode: Literal["none", "auto", "required", "named"] = "none"
    name: str | None = None
    parallel: bool = True
    as_function: bool = False
    """Asked for by the old `functions`, and answered by `function_call`."""

    @property
    def schema(self) -> dict[str, Any] | None:
        """The JSON schema that the text must meet; None where it is free."""
        if self.mode == "named":
            return next(_parameters(tool) for tool in self.tools if tool["function"]["name"] == self.name)
        if self.mode != "required":
            return None
        calls = [
            {
                "type": "object",
                "properties": {"name": {"const": tool["function"]["name"]}, "parameters": _parameters(tool)},
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
            for tool in self.tools
        ]
        schema = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
        return schema if self.parallel and not self.as_function else schema | {"maxItems": 1}


NO_TOOLS = ToolUse()


def _parameters(tool: Mapping[str, Any]) -> dict[str, Any]:
    return tool["function"].get("parameters") or {"type": "object", "properties": {}}


def tool_use(fields: Fields) -> ToolUse:
    """Take `tools`, `tool_choice`, `parallel_tool_calls` and the old `functions`, `function_call`."""
    is_old = fields.has("functions") or fields.has("function_call")
    if is_old and (fields.has("tools") or fields.has("tool_choice")):
        refuse("bad_request", "functions", "is given together with tools; give tools alone")
    parallel = fields.flag("parallel_tool_calls", True)
    if is_old:
        given, choice, where = fields.take("functions"), fields.take("function_call"), "functions"
    else:
        given, choice, where = fields.take("tools"), fields.take("tool_choice"), "tools"
    choice_name = "function_call" if is_old else "tool_choice"
    tools = _tools(given, where, is_old, is_held=choice not in (None, "auto", "none"))
    if not tools:
        if choice not in (None, "none", "auto"):
            refuse("bad_request", choice_name, f"asks for a tool, and {where} has none; give {where}")
        return NO_TOOLS
    if choice == "none":
        return NO_TOOLS
    mode, name = _choice(choice, choice_name, is_old)
    if mode == "named" and name not in (tool["function"]["name"] for tool in tools):
        refuse("bad_request", choice_name, f"names {str(name)[:64]!r}, which is not in {where}")
    return ToolUse(tools=tools, mode=mode, name=name, parallel=parallel, as_function=is_old)


def _tools(value: object, where: str, is_old: bool, is_held: bool) -> tuple[dict[str, Any], ...]:
    if value is None:
        return ()
    if not isinstance(value, Sequence) or isinstance(value, str):
        refuse("wrong_type", where, f"is a JSON {kind_of(value)}; give an array")
    if len(value) > MAX_TOOLS:
        refuse("bad_request", where, f"has {len(value)} tools; give at most {MAX_TOOLS}")
    tools = []
    for index, tool in enumerate(value):
        place = f"{where}[{index}]"
        if not is_old:
            fields = Fields(tool, place)
            if fields.text("type") != "function":
                refuse("not_supported", f"{place}.type", "is not 'function', which alone is supported")
            tool, place = fields.take("function"), f"{place}.function"
            fields.refuse_rest()
        tools.append({"type": "function", "function": _function(tool, place, is_held)})
    names = [tool["function"]["name"] for tool in tools]
    for name in names:
        if names.count(name) > 1:
            refuse("bad_request", where, f"has two tools named {name!r}; give each its own name")
    return tuple(tools)


def _function(value: object, where: str, is_held: bool) -> dict[str, Any]:
    fields = Fields(value, where)
    name = fields.needed_text("name")
    if _TOOL_NAME.fullmatch(name) is None:
        refuse("bad_request", f"{where}.name", "must be 1 to 64 letters, digits, underscores or dashes")
    function: dict[str, Any] = {"name": name}
    if (description := fields.text("description")) is not None:
        function["description"] = description
    parameters = fields.take("parameters")
    if parameters is not None:
        if not isinstance(parameters, Mapping):
            refuse(
                "wrong_type", f"{where}.parameters", f"is a JSON {kind_of(parameters)}; give a JSON schema"
            )
        function["parameters"] = dict(parameters)
    if fields.flag("strict", False) and not is_held:
        refuse(
            "not_supported",
            f"{where}.strict",
            "only calls that are required are held to their schema; leave it out, or require one",
        )
    fields.refuse_rest()
    return function


def _choice(
    choice: object, where: str, is_old: bool
) -> tuple[Literal["none", "auto", "required", "named"], str | None]:
    if choice is None or choice == "auto":
        return "auto", None
    if choice == "required" and not is_old:
        return "required", None
    if isinstance(choice, str):
        refuse("bad_request", where, f"is {choice[:40]!r}; give 'none', 'auto', 'required' or a tool")
    fields = Fields(choice, where)
    if is_old:
        return "named", fields.needed_text("name")
    if fields.text("type") != "function":
        refuse("not_supported", f"{where}.type", "is not 'function', which alone is supported")
    inner = Fields(fields.take("function"), f"{where}.function")
    fields.refuse_rest()
    return "named", inner.needed_text("name")
