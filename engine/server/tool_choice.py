"""Which tools a request offers and how free the model is to call them; the old `functions` are the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from engine.server.chat_body import ChatBody
from engine.server.errors import bad_request
from engine.server.fields import Function
from engine.server.settings import ServerSettings

Mode = Literal["none", "auto", "required", "named"]


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """mode `named` means that tool `name` is called, once."""

    tools: tuple[dict[str, Any], ...] = ()
    """As chat templates read them: `{"type": "function", "function": {name, description, parameters}}`."""
    mode: Mode = "none"
    name: str | None = None
    is_parallel: bool = True
    """Several calls in one answer are allowed."""
    is_legacy: bool = False
    """Asked for by `functions`: answered by `function_call`."""

    @property
    def offered(self) -> list[dict[str, Any]] | None:
        """What the prompt tells of; None for nothing."""
        return list(self.tools) if self.mode != "none" and self.tools else None

    @property
    def call_schema(self) -> dict[str, Any] | None:
        """The JSON schema of an answer that has to be a call; None where it is free."""
        if self.mode == "named":
            return next(_parameters(tool) for tool in self.tools if _name(tool) == self.name)
        if self.mode != "required":
            return None
        calls = [
            {
                "type": "object",
                "properties": {"name": {"const": _name(tool)}, "arguments": _parameters(tool)},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for tool in self.tools
        ]
        items = calls[0] if len(calls) == 1 else {"anyOf": calls}
        most = {} if self.is_parallel else {"maxItems": 1}
        return {"type": "array", "items": items, "minItems": 1} | most


def tool_choice_of(body: ChatBody, settings: ServerSettings) -> ToolChoice:
    """What a chat's body says of tools. Raises ApiError (400)."""
    if body.functions is not None or body.function_call is not None:
        return _legacy_choice(body, settings)
    functions = [tool.function for tool in body.tools or ()]
    choice, param = body.tool_choice, "tool_choice"
    name = None if choice is None or isinstance(choice, str) else choice.function.name
    mode = choice if isinstance(choice, str) else None
    return make_tool_choice(functions, mode, name, body.parallel_tool_calls, settings, param=param)


def make_tool_choice(
    functions: Sequence[Function],
    mode: Literal["none", "auto", "required"] | None,
    name: str | None,
    parallel: bool | None,
    settings: ServerSettings,
    *,
    param: str = "tool_choice",
    tools_param: str = "tools",
    is_legacy: bool = False,
) -> ToolChoice:
    """`name`: the tool that has to be called. `mode` None means auto, or none where there are no tools."""
    if len(functions) > settings.max_tools:
        message = f"{len(functions)} {tools_param}: at most {settings.max_tools} are taken"
        raise bad_request(message, tools_param, "array_above_max_length")
    names = [function.name for function in functions]
    if len(set(names)) < len(names):
        raise bad_request(f"two of {tools_param} have the same name", tools_param, "invalid_value")
    for function in functions:
        if (function.parameters or {}).get("type", "object") != "object":
            message = f"the parameters of function {function.name!r} must be a schema of type 'object'"
            raise bad_request(message, tools_param, "invalid_function_parameters")
    if not functions:
        if (mode or "none") != "none" or name is not None:
            raise bad_request(f"'{param}' is only allowed when '{tools_param}' are specified.", param)
        return ToolChoice(is_legacy=is_legacy)
    if name is not None and name not in names:
        raise bad_request(f"{param} names {name!r}, which is none of {tools_param}", param, "invalid_value")
    return ToolChoice(
        tools=tuple(_for_template(function) for function in functions),
        mode="named" if name is not None else mode or "auto",
        name=name,
        is_parallel=parallel is not False and not is_legacy,
        is_legacy=is_legacy,
    )


def _legacy_choice(body: ChatBody, settings: ServerSettings) -> ToolChoice:
    if body.tools is not None or body.tool_choice is not None:
        raise bad_request("give tools and tool_choice, or functions and function_call", "functions")
    choice = body.function_call
    return make_tool_choice(
        body.functions or (),
        choice if isinstance(choice, str) else None,
        None if choice is None or isinstance(choice, str) else choice.name,
        None,
        settings,
        param="function_call",
        tools_param="functions",
        is_legacy=True,
    )


def _for_template(function: Function) -> dict[str, Any]:
    told: dict[str, Any] = {"name": function.name}
    if function.description is not None:
        told["description"] = function.description
    told["parameters"] = {"type": "object", "properties": {}} | (function.parameters or {})
    return {"type": "function", "function": told}


def _name(tool: dict[str, Any]) -> str:
    return tool["function"]["name"]


def _parameters(tool: dict[str, Any]) -> dict[str, Any]:
    return tool["function"]["parameters"]
