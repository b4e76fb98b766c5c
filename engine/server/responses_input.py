"""From the `input` of a response to messages as chat templates read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.server.prompts import template_call, template_messages
from engine.server.responses_body import InputCall, InputCallOutput, InputMessage, InputReasoning

Item = InputMessage | InputCall | InputCallOutput | InputReasoning


def conversation_of(given: str | Sequence[Item]) -> list[dict[str, Any]]:
    """Calls belong to the assistant's message before them, if there is one. Raises ApiError (400)."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    messages: list[dict[str, Any]] = []
    for index, item in enumerate(given):
        where = f"input.{index}"
        if isinstance(item, InputMessage):
            messages += template_messages([item], where)
        elif isinstance(item, InputCall):
            call = template_call(item.name, item.arguments, item.call_id, f"{where}.arguments")
            add_call(messages, call)
        elif isinstance(item, InputCallOutput):
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": item.output})
    return messages


def add_call(messages: list[dict[str, Any]], call: dict[str, Any]) -> None:
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    messages[-1].setdefault("tool_calls", []).append(call)
