"""Tool calls: free ones, required ones, named ones, and the old functions; whole and streamed alike."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from tests.server.conftest import MODEL

CHAT: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]


def function(name: str, cities: list[str]) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": {"city": {"enum": cities}},
        "required": ["city"],
        "additionalProperties": False,
    }
    return {"name": name, "description": f"Of a city: {name}", "parameters": parameters}


WEATHER, TIME = function("get_weather", ["Paris", "Rome"]), function("get_time", ["Oslo"])
TOOLS: list[Any] = [{"type": "function", "function": each} for each in (WEATHER, TIME)]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'
BASE: dict[str, Any] = {"model": MODEL, "messages": CHAT, "temperature": 0, "max_tokens": 200}


def streamed_message(client: Any, **fields: Any) -> dict[str, Any]:
    """The message that the deltas of a stream add up to, and its finish reason."""
    content, calls, old, reason = "", {}, {"name": "", "arguments": ""}, None
    for chunk in client.chat.completions.create(**fields, stream=True):
        (choice,) = chunk.choices
        reason = choice.finish_reason or reason
        content += choice.delta.content or ""
        for call in choice.delta.tool_calls or ():
            known = calls.setdefault(call.index, {"id": call.id, "name": "", "arguments": ""})
            assert call.function is not None
            known["name"] += call.function.name or ""
            known["arguments"] += call.function.arguments or ""
        if choice.delta.function_call is not None:
            old["name"] += choice.delta.function_call.name or ""
            old["arguments"] += choice.delta.function_call.arguments or ""
    assert all(call["id"].startswith("call-") for call in calls.values())
    told = [(call["name"], call["arguments"]) for _, call in sorted(calls.items())]
    return {"content": content, "calls": told, "old": old, "reason": reason}


def both_ways(client: Any, **fields: Any) -> tuple[Any, list[tuple[str, Any]]]:
    """The whole answer's choice and its calls (name, values); a stream's are the same."""
    fields = {**BASE, **fields}
    (choice,) = client.chat.completions.create(**fields).choices
    calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or ()]
    streamed = streamed_message(client, **fields)
    assert streamed["calls"] == calls
    assert streamed["content"] == (choice.message.content or "")
    assert streamed["reason"] == choice.finish_reason
    return choice, [(name, json.loads(arguments)) for name, arguments in calls]


def test_a_free_answer_may_be_a_call(client: Any):
    fields = {"tools": TOOLS, "extra_body": {"guided_choice": [CALL]}}
    choice, calls = both_ways(client, **fields)
    assert calls == [("get_weather", {"city": "Rome"})]
    assert (choice.message.content, choice.finish_reason) == (None, "tool_calls")


def test_a_free_answer_may_be_a_text(client: Any):
    choice, calls = both_ways(client, tools=TOOLS, extra_body={"guided_choice": ["It rains."]})
    assert calls == []
    assert (choice.message.content, choice.finish_reason) == ("It rains.", "stop")


def test_several_calls_unless_parallel_ones_are_off(client: Any):
    fields: dict[str, Any] = {"tools": TOOLS, "extra_body": {"guided_choice": [CALL + "\n" + CALL]}}
    assert len(both_ways(client, **fields)[1]) == 2
    assert len(both_ways(client, **fields, parallel_tool_calls=False)[1]) == 1


def test_without_tools_or_with_none_a_call_is_text(client: Any):
    for fields in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        choice, calls = both_ways(client, **fields, extra_body={"guided_choice": [CALL]})
        assert (calls, choice.message.content) == ([], CALL)


def test_a_required_call_is_one_of_the_tools(client: Any):
    choice, calls = both_ways(client, tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    ((name, values),) = calls
    assert values["city"] in {"get_weather": ["Paris", "Rome"], "get_time": ["Oslo"]}[name]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)


def test_a_named_call_is_that_tool(client: Any):
    choice_of = {"type": "function", "function": {"name": "get_time"}}
    choice, calls = both_ways(client, tools=TOOLS, tool_choice=choice_of)
    assert calls == [("get_time", {"city": "Oslo"})]
    assert choice.finish_reason == "stop"  # as OpenAI has it


def test_the_old_functions(client: Any):
    fields: dict[str, Any] = {**BASE, "functions": [WEATHER, TIME], "function_call": {"name": "get_time"}}
    (choice,) = client.chat.completions.create(**fields).choices
    assert choice.message.function_call is not None
    assert choice.message.function_call.name == "get_time"
    assert json.loads(choice.message.function_call.arguments) == {"city": "Oslo"}
    assert choice.message.tool_calls is None
    streamed = streamed_message(client, **fields)
    assert streamed["old"] == choice.message.function_call.model_dump()
    free = {**BASE, "functions": [WEATHER], "extra_body": {"guided_choice": [CALL]}}
    (choice,) = client.chat.completions.create(**free).choices
    assert choice.finish_reason == "function_call"


def test_a_conversation_with_calls_goes_on(client: Any):
    call = {"id": "call-1", "type": "function", "function": {"name": "get_time", "arguments": "{}"}}
    messages = [
        *CHAT,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call-1", "content": "It is noon."},
    ]
    (choice,) = client.chat.completions.create(**{**BASE, "messages": messages, "max_tokens": 4}).choices
    assert choice.finish_reason == "length"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools"),
        ({"tools": TOOLS, "functions": [TIME]}, "functions"),
        ({"function_call": "auto"}, "function_call"),
        ({"tools": [{"type": "function", "function": {"name": "bad name"}}]}, "tools.0.function.name"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]},
            "tools",
        ),
        ({"tools": [TOOLS[0]] * 129}, "tools"),
        ({"tools": TOOLS, "tool_choice": "required", "extra_body": {"guided_regex": "a"}}, "guided_regex"),
    ],
)
def test_what_cannot_be_is_refused(client: Any, fields: dict[str, Any], param: str):
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**{**BASE, **fields})
    assert refused.value.param == param
