# pyright: reportArgumentType=false, reportCallIssue=false
"""`/v1/responses`: answers, events, conversations and their store."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from engine.async_engine import AsyncEngine
from engine.checkpoints import render_chat
from engine.server.response_store import ResponseStore, StoredResponse
from engine.server.responses_answer import begun_answer
from engine.server.responses_body import ResponseBody
from tests.server.conftest import MODEL, text_of
from tests.server.test_tools import CALL, WEATHER

BASE: dict[str, Any] = {
    "model": MODEL,
    "input": "Tell me of the sea.",
    "temperature": 0,
    "max_output_tokens": 10,
}
TOOL = {"type": "function", "strict": None, **WEATHER}


def test_an_answer_is_what_the_engine_makes_of_the_input(client: Any, engine: AsyncEngine):
    response = client.responses.create(**BASE, instructions="Be brief.")
    prompt = render_chat(
        engine.engine.tokenizer,
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": BASE["input"]}],
    )
    assert response.output_text == text_of(engine, prompt, temperature=0, max_tokens=10)
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.output_tokens) == (len(prompt), 10)
    assert (response.instructions, response.model, response.temperature) == ("Be brief.", MODEL, 0)


def test_the_events_of_a_stream_add_up_to_the_answer(client: Any):
    fields: dict[str, Any] = {**BASE, "include": ["message.output_text.logprobs"], "top_logprobs": 2}
    whole = client.responses.create(**fields)
    events = list(client.responses.create(**fields, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert "".join(delta.delta for delta in deltas) == whole.output_text
    last: Any = events[-1]
    assert last.response.output[0].content == whole.output[0].content
    assert (last.response.usage.input_tokens, last.response.usage.output_tokens) == (
        whole.usage.input_tokens,
        whole.usage.output_tokens,
    )
    logprobs = whole.output[0].content[0].logprobs
    assert [entry.token for delta in deltas for entry in delta.logprobs] == [each.token for each in logprobs]
    assert "".join(entry.token for entry in logprobs) == whole.output_text
    assert all(len(entry.top_logprobs) == 2 for entry in logprobs)


def test_a_conversation_goes_on_from_a_stored_response(client: Any, engine: AsyncEngine):
    first = client.responses.create(**BASE, instructions="Be brief.")
    second = client.responses.create(**{**BASE, "input": "And then?"}, previous_response_id=first.id)
    prompt = render_chat(
        engine.engine.tokenizer,
        [
            {"role": "user", "content": BASE["input"]},  # instructions are of one response alone
            {"role": "assistant", "content": first.output_text},
            {"role": "user", "content": "And then?"},
        ],
    )
    assert second.output_text == text_of(engine, prompt, temperature=0, max_tokens=10)
    assert second.previous_response_id == first.id


def test_what_is_stored_is_found_until_it_is_deleted(client: Any):
    made = client.responses.create(**BASE, metadata={"a": "b"})
    assert client.responses.retrieve(made.id).model_dump() == made.model_dump()
    client.responses.delete(made.id)
    for forgotten in (lambda: client.responses.retrieve(made.id), lambda: client.responses.delete(made.id)):
        with pytest.raises(openai.NotFoundError):
            forgotten()
    with pytest.raises(openai.NotFoundError) as refused:
        client.responses.create(**BASE, previous_response_id=made.id)
    assert refused.value.param == "previous_response_id"
    unstored = client.responses.create(**BASE, store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(unstored.id)


def test_a_call_and_what_it_returned(client: Any, engine: AsyncEngine):
    fields: dict[str, Any] = {**BASE, "max_output_tokens": 200, "tools": [TOOL]}
    free = client.responses.create(**fields, extra_body={"guided_choice": [CALL]})
    (item,) = free.output
    assert (item.type, item.name, json.loads(item.arguments)) == (
        "function_call",
        "get_weather",
        {"city": "Rome"},
    )
    assert free.status == "completed"
    events = list(client.responses.create(**fields, extra_body={"guided_choice": [CALL]}, stream=True))
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == item.arguments
    output = {"type": "function_call_output", "call_id": item.call_id, "output": "Rain."}
    chained = client.responses.create(**{**BASE, "input": [output]}, previous_response_id=free.id)
    call = {"type": "function_call", "call_id": item.call_id, "name": item.name, "arguments": item.arguments}
    spelled = [{"role": "user", "content": BASE["input"]}, call, output]
    assert client.responses.create(**{**BASE, "input": spelled}).output_text == chained.output_text
    named = client.responses.create(**fields, tool_choice={"type": "function", "name": "get_weather"})
    assert json.loads(named.output[0].arguments)["city"] in ("Paris", "Rome")


def test_text_may_have_a_form(client: Any):
    schema = {
        "type": "object",
        "properties": {"x": {"const": 1}},
        "required": ["x"],
        "additionalProperties": False,
    }
    form = {"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}}
    response = client.responses.create(**{**BASE, "max_output_tokens": 100}, text=form)
    assert json.loads(response.output_text) == {"x": 1}
    assert (response.text.format.type, response.text.format.schema_) == ("json_schema", schema)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"n": 2}, "n"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"conversation": "x"}, "conversation"),
    ],
)
def test_what_cannot_be_is_refused(client: Any, fields: dict[str, Any], param: str):
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(**BASE, extra_body=fields)
    assert (refused.value.param or "").partition(".")[0] == param


def stored(response_id: str, owner: str | None = None, text: str = "") -> StoredResponse:
    body = ResponseBody.model_validate({"input": "x"})
    answer = begun_answer(body, response_id, MODEL, 0, True)
    return StoredResponse(answer, [{"role": "user", "content": text}], owner)


def test_the_store_forgets_the_least_recently_used():
    store = ResponseStore(max_count=2, max_bytes=10**6)
    for name in "ab":
        store.put(stored(name))
    assert store.get("a", None) is not None
    store.put(stored("c"))
    assert [store.get(name, None) is not None for name in "abc"] == [True, False, True]
    size = store.num_bytes
    store.put(stored("c"))
    assert (store.num_bytes, len(store)) == (size, 2)
    small = ResponseStore(max_count=9, max_bytes=size)
    small.put(stored("a"))
    small.put(stored("b", text="x" * size))
    assert (len(small), small.num_bytes) == (0, 0)


def test_a_stored_response_is_its_owners_alone():
    store = ResponseStore(max_count=2, max_bytes=10**6)
    store.put(stored("a", owner="key-1"))
    assert store.get("a", "key-2") is None
    assert not store.remove("a", None)
    assert store.remove("a", "key-1")
    assert store.num_bytes == 0
