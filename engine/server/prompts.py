"""From the messages of a body to the token ids of a prompt, by the model's own chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.concurrency import run_in_threadpool

from engine.checkpoints import encode_text, has_chat_template, render_chat
from engine.errors import RequestError
from engine.server.chat_body import ChatPromptFields, Message, TextPart
from engine.server.errors import bad_request, nearest
from engine.server.served import ServedModel
from engine.server.settings import ServerSettings

_TOOL_INTRODUCTION = (
    "You may call functions. Their signatures, as JSON, are within <tools></tools>:\n"
    "<tools>\n{tools}\n</tools>\n"
    "For each call answer with a JSON object with the function's name and its arguments within "
    '<tool_call></tool_call>:\n<tool_call>\n{{"name": ..., "arguments": {{...}}}}\n</tool_call>'
)
"""For templates that do not tell of tools themselves, in the form that most models learn (Hermes)."""


async def chat_prompt(
    model: ServedModel,
    messages: Sequence[Mapping[str, Any]],
    settings: ServerSettings,
    *,
    tools: list[dict[str, Any]] | None = None,
    fields: ChatPromptFields | None = None,
    reasoning_effort: str | None = None,
    param: str = "messages",
) -> list[int]:
    """Token ids of a chat, rendered in a worker thread. Raises ApiError or RequestError (400)."""
    if not has_chat_template(model.tokenizer):
        message = f"the model {model.name!r} has no chat template: use /v1/completions"
        raise bad_request(message, param, "no_chat_template")
    if len(messages) > settings.max_messages:
        raise bad_request(f"{len(messages)} messages: at most {settings.max_messages} are taken", param)
    variables = _template_variables(fields, settings)
    if reasoning_effort is not None:
        variables["reasoning_effort"] = reasoning_effort
    if tools and "tools" in (model.chat_template or ""):
        variables["tools"] = tools
    elif tools:
        messages = _with_introduction(messages, tools)
    continues = bool(fields and fields.continue_final_message)
    if continues:
        variables["continue_final_message"] = True
    asked = fields.add_generation_prompt if fields else None
    if continues and asked:
        raise bad_request(
            "continue_final_message goes on with the last message and add_generation_prompt begins another: "
            "give one of them",
            "continue_final_message",
        )
    adds = not continues if asked is None else asked
    try:
        return await run_in_threadpool(
            render_chat, model.tokenizer, messages, add_generation_prompt=adds, variables=variables
        )
    except RequestError as error:
        raise bad_request(str(error), param, error.reason) from error


async def text_prompt(model: ServedModel, text: str, param: str = "prompt") -> list[int]:
    """Token ids of a text, made in a worker thread. Raises ApiError (400)."""
    try:
        return await run_in_threadpool(encode_text, model.tokenizer, text)
    except RequestError as error:
        raise bad_request(str(error), param, error.reason) from error


def template_messages(messages: Sequence[Message], where: str | None = None) -> list[dict[str, Any]]:
    """Messages as chat templates read them: a text as content, arguments of calls as mappings.

    `developer` is what `system` is now called, and `function` what `tool` was: templates know the others.
    `where`: the field of the body they come from. Raises ApiError (400) for a message that says nothing.
    """
    return [
        _template_message(message, where or f"messages.{index}") for index, message in enumerate(messages)
    ]


def content_text(content: str | Sequence[Any] | None) -> str:
    """A message's content as one text."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text if isinstance(part, TextPart) else part.refusal for part in content)


def template_call(name: str, arguments: str, call_id: str | None, param: str) -> dict[str, Any]:
    """A call of an earlier answer, as chat templates read it. Raises ApiError (400)."""
    try:
        values = json.loads(arguments) if arguments.strip() else {}
    except ValueError as error:
        raise bad_request(f"the arguments of a call of {name!r} are not JSON", param) from error
    if not isinstance(values, dict):
        raise bad_request(f"the arguments of a call of {name!r} are not an object", param)
    return _call(name, values, call_id)


def told_call(name: str, arguments: str, call_id: str) -> dict[str, Any]:
    """The same of a call that the model made, which may have been cut off: then its text is kept."""
    try:
        values = json.loads(arguments)
    except ValueError:
        values = arguments
    return _call(name, values, call_id)


def _call(name: str, arguments: Any, call_id: str | None) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return call if call_id is None else {"id": call_id} | call


def _template_message(message: Message, where: str) -> dict[str, Any]:
    role = {"developer": "system", "function": "tool"}.get(message.role, message.role)
    calls = [
        template_call(call.function.name, call.function.arguments, call.id, f"{where}.tool_calls")
        for call in message.tool_calls or ()
    ]
    if message.function_call is not None:
        old = message.function_call
        calls.append(template_call(old.name, old.arguments, None, f"{where}.function_call"))
    if calls and role != "assistant":
        raise bad_request("only an assistant's message calls tools", f"{where}.tool_calls")
    if message.content is None and not calls and message.refusal is None:
        param = f"{where}.content"
        raise bad_request(f"Missing required parameter: '{param}'.", param, "missing_required_parameter")
    told: dict[str, Any] = {"role": role, "content": content_text(message.content) or message.refusal or ""}
    if calls:
        told["tool_calls"] = calls
    for name in ("name", "tool_call_id", "reasoning_content"):
        if (value := getattr(message, name)) is not None:
            told[name] = value
    return told


def _template_variables(fields: ChatPromptFields | None, settings: ServerSettings) -> dict[str, Any]:
    given = (fields.chat_template_kwargs if fields else None) or {}
    for name, value in given.items():
        param = f"chat_template_kwargs.{name}"
        if name not in settings.template_variables:
            hint = nearest(name, settings.template_variables)
            known = ", ".join(settings.template_variables)
            raise bad_request(f"chat_template_kwargs may give {known}, not {name!r}{hint}", param)
        if not isinstance(value, (str, bool, int)) or len(str(value)) > 256:
            raise bad_request(f"{param} must be a short text, a whole number or true or false", param)
    return dict(given)


def _with_introduction(
    messages: Sequence[Mapping[str, Any]], tools: list[dict[str, Any]]
) -> list[Mapping[str, Any]]:
    said = _TOOL_INTRODUCTION.format(tools="\n".join(json.dumps(tool["function"]) for tool in tools))
    if messages and messages[0]["role"] == "system":
        first = dict(messages[0], content=f"{messages[0]['content']}\n\n{said}")
        return [first, *messages[1:]]
    return [{"role": "system", "content": said}, *messages]
