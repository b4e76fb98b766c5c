"""The chat of a request body: its messages, and what goes with them, as chat templates want them.

Content given as parts is joined into text; parts that are not text are refused, for there is no model for
them here. The arguments of earlier tool calls are given to the template as objects, which is what the
templates of Hugging Face's models print.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from engine.openai_fields import Fields, kind_of, refuse
from engine.openai_tools import ToolUse

ROLES = ("system", "developer", "user", "assistant", "tool", "function")

# What the tokenizer's method takes itself is not for a request to set.
_RESERVED = frozenset(
    {
        "messages",
        "conversation",
        "tools",
        "documents",
        "chat_template",
        "tokenize",
        "add_generation_prompt",
        "continue_final_message",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
        "processor_kwargs",
    }
)

# What is now called `developer` is a `system` to templates, and a `function`'s result a `tool`'s.
_TEMPLATE_ROLES = {"developer": "system", "function": "tool"}
_TOOL_INTRODUCTION = (
    "You may call functions. Their signatures, as JSON, are within <tools></tools>:\n"
    "<tools>\n{tools}\n</tools>\n"
    "For each call answer with a JSON object with the function's name and its arguments within "
    '<tool_call></tool_call>:\n<tool_call>\n{{"name": ..., "arguments": {{...}}}}\n</tool_call>'
)

Message = dict[str, Any]


def checked_messages(value: object) -> list[Message]:
    """The messages of a chat. Raises RequestError naming the message and the field."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        refuse("wrong_type", "messages", f"is a JSON {kind_of(value)}; give an array of messages")
    if not value:
        refuse("empty_prompt", "messages", "is empty; give at least one message")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(value)]


def with_introduction(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[Message]:
    """The messages with their tools told in the system message, in the form that most models learn (Hermes),
    for a chat template that tells of no tools."""
    said = _TOOL_INTRODUCTION.format(tools="\n".join(json.dumps(tool["function"]) for tool in tools))
    if messages[0]["role"] == "system":
        return [messages[0] | {"content": f"{messages[0]['content']}\n\n{said}"}, *messages[1:]]
    return [{"role": "system", "content": said}, *messages]


def _message(value: object, where: str) -> Message:
    fields = Fields(value, where)
    role = fields.needed_text("role")
    if role not in ROLES:
        refuse("bad_role", f"{where}.role", f"is {role[:40]!r}; use one of {', '.join(ROLES)}")
    message: Message = {"role": _TEMPLATE_ROLES.get(role, role)}
    calls = fields.take("tool_calls") if role == "assistant" else None
    call = fields.take("function_call") if role == "assistant" else None
    content = fields.take("content")
    if content is None and not calls and call is None:
        refuse("missing_column", f"{where}.content", "is missing; give text")
    message["content"] = "" if content is None else _content(content, f"{where}.content")
    if calls:
        message["tool_calls"] = _earlier_calls(calls, f"{where}.tool_calls")
    if call is not None:
        message["tool_calls"] = [_earlier_function(call, f"{where}.function_call")]
    if role == "tool":
        message["tool_call_id"] = fields.needed_text("tool_call_id")
    if role == "assistant":
        for name in ("reasoning_content", "refusal"):
            if (text := fields.text(name)) is not None:
                message[name] = text
        fields.absent("audio")
        fields.take("annotations")  # of an answer that is sent back: what it links to is no part of the text
    if (name := fields.text("name")) is not None:
        message["name"] = name
    fields.refuse_rest()
    return message


def _content(value: object, where: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, Sequence):
        refuse("wrong_type", where, f"is a JSON {kind_of(value)}; give text, or an array of parts")
    texts = []
    for index, part in enumerate(value):
        fields = Fields(part, f"{where}[{index}]")
        kind = fields.text("type")
        if kind not in ("text", "input_text", "output_text", "refusal"):
            refuse(
                "not_supported", f"{where}[{index}].type", f"is {str(kind)[:40]!r}; only text is supported"
            )
        name = "refusal" if kind == "refusal" else "text"
        text = fields.take(name)
        if not isinstance(text, str):
            refuse("wrong_type", f"{where}[{index}].{name}", f"is a JSON {kind_of(text)}; give text")
        texts.append(text)
    return "".join(texts)


def _earlier_calls(value: object, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        refuse("wrong_type", where, f"is a JSON {kind_of(value)}; give an array of tool calls")
    calls = []
    for index, call in enumerate(value):
        fields = Fields(call, f"{where}[{index}]")
        if fields.text("type", "function") != "function":
            refuse("not_supported", f"{where}[{index}].type", "is not 'function', which alone is supported")
        called = _earlier_function(fields.take("function"), f"{where}[{index}].function")
        if (call_id := fields.text("id")) is not None:
            called["id"] = call_id
        fields.take("index")  # as streamed; the order is the array's
        fields.refuse_rest()
        calls.append(called)
    return calls


def _earlier_function(value: object, where: str) -> dict[str, Any]:
    fields = Fields(value, where)
    name = fields.needed_text("name")
    arguments = fields.take("arguments", "{}")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            refuse("not_json", f"{where}.arguments", "is no JSON; give the JSON text of an object")
    if not isinstance(arguments, Mapping):
        refuse("wrong_type", f"{where}.arguments", f"is a JSON {kind_of(arguments)}; give an object")
    fields.refuse_rest()
    return {"type": "function", "function": {"name": name, "arguments": dict(arguments)}}


def template_variables(fields: Fields, tools: ToolUse) -> dict[str, Any]:
    """Take what the template is told beside the messages."""
    given = fields.take("chat_template_kwargs", {})
    if not isinstance(given, Mapping):
        refuse("wrong_type", "chat_template_kwargs", f"is a JSON {kind_of(given)}; give an object")
    for name in given:
        if name in _RESERVED or not str(name).isidentifier():
            refuse("bad_request", f"chat_template_kwargs.{str(name)[:40]}", "cannot be set; leave it out")
    variables = dict(given)
    if (effort := fields.text("reasoning_effort")) is not None:
        variables["reasoning_effort"] = effort
    if tools.tools:
        variables["tools"] = list(tools.tools)
    return variables
