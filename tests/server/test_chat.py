# pyright: reportArgumentType=false, reportCallIssue=false
"""`/v1/chat/completions` as OpenAI's own client sees it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from engine.async_engine import AsyncEngine
from engine.checkpoints import render_chat
from tests.server.conftest import MODEL, complete, text_of

CHAT: list[Any] = [{"role": "user", "content": "Tell me of the sea."}]
GREEDY: dict[str, Any] = {"model": MODEL, "messages": CHAT, "temperature": 0, "max_tokens": 12}


def chat(client: Any, **fields: Any) -> ChatCompletion:
    return client.chat.completions.create(**{**GREEDY, **fields})


def stream(client: Any, **fields: Any) -> list[ChatCompletionChunk]:
    return list(client.chat.completions.create(**{**GREEDY, **fields}, stream=True))


def joined(chunks: list[ChatCompletionChunk], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    return "".join(choice.delta.content or "" for choice in choices)


def test_an_answer_is_what_the_engine_makes_of_the_rendered_chat(client: Any, engine: AsyncEngine):
    answer = chat(client)
    prompt = render_chat(engine.engine.tokenizer, CHAT)
    output = complete(engine, prompt, temperature=0, max_tokens=12)
    (choice,) = answer.choices
    assert choice.message.content == output.outputs[0].text
    assert (choice.message.role, choice.finish_reason, choice.index) == ("assistant", "length", 0)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), 12)
    assert answer.usage.total_tokens == len(prompt) + 12
    assert (answer.model, answer.object) == (MODEL, "chat.completion")
    assert answer.id.startswith("chatcmpl-")


def test_the_prefix_cache_shows_in_the_usage(client: Any):
    messages = [{"role": "user", "content": "A long beginning that two chats have in common. " * 4}]
    chat(client, messages=messages)
    again = chat(client, messages=messages)
    assert again.usage is not None
    assert again.usage.prompt_tokens_details is not None
    assert again.usage.prompt_tokens_details.cached_tokens == again.usage.prompt_tokens - 1


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_joined_is_the_whole_answer(client: Any, n: int):
    fields: dict[str, Any] = {"n": n, "temperature": 1, "seed": 11, "max_tokens": 24}
    whole = chat(client, **fields)
    chunks = stream(client, **fields, stream_options={"include_usage": True})
    for choice in whole.choices:
        assert joined(chunks, choice.index) == choice.message.content
        mine = [each for chunk in chunks for each in chunk.choices if each.index == choice.index]
        assert mine[0].delta.role == "assistant"
        assert [each.finish_reason for each in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1].finish_reason == choice.finish_reason
    assert len({choice.message.content for choice in whole.choices}) == n
    assert chunks[-1].choices == []
    assert whole.usage is not None
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_usage_comes_only_where_it_was_asked_for(client: Any):
    assert all(chunk.choices and chunk.usage is None for chunk in stream(client))


def test_log_probabilities_belong_to_the_text(client: Any):
    fields: dict[str, Any] = {"logprobs": True, "top_logprobs": 3, "max_tokens": 20}
    (choice,) = chat(client, **fields).choices
    assert choice.logprobs is not None
    entries = choice.logprobs.content or []
    raw = bytes(byte for entry in entries for byte in entry.bytes or [])
    assert raw.decode("utf-8", "replace") == choice.message.content
    for entry in entries:
        tops = [top.logprob for top in entry.top_logprobs]
        assert len(tops) == 3
        assert tops == sorted(tops, reverse=True)
        assert entry.logprob == tops[0]  # greedy
    streamed = [
        entry
        for chunk in stream(client, **fields)
        for each in chunk.choices
        if each.logprobs
        for entry in each.logprobs.content or []
    ]
    assert streamed == entries
    (bare,) = chat(client, logprobs=True).choices
    assert bare.logprobs is not None
    assert all(entry.top_logprobs == [] for entry in bare.logprobs.content or [])


def test_a_token_that_ends_an_answer_is_counted_and_not_shown(client: Any, engine: AsyncEngine):
    eos = engine.engine.tokenizer.eos_token_id
    answer = chat(client, logit_bias={str(eos): 100}, logprobs=True)
    (choice,) = answer.choices
    assert (choice.message.content, choice.finish_reason) == ("", "stop")
    assert choice.logprobs is not None
    assert choice.logprobs.content == []
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 1
    chunks = stream(client, logit_bias={str(eos): 100})
    assert [each.finish_reason for chunk in chunks for each in chunk.choices] == [None, "stop"]


def test_a_seed_repeats_and_sampling_is_as_asked(client: Any):
    drawn = [chat(client, temperature=1, seed=seed).choices[0].message.content for seed in (5, 5, -5)]
    assert drawn[0] == drawn[1] != drawn[2]
    cold = chat(client, temperature=1, seed=5, extra_body={"top_k": 1}).choices[0].message.content
    assert cold == chat(client).choices[0].message.content


def test_stop_strings_end_a_text_and_are_never_shown(client: Any):
    text = chat(client, max_tokens=30).choices[0].message.content or ""
    stop = text[6:9]
    (choice,) = chat(client, max_tokens=30, stop=[stop]).choices
    assert choice.message.content == text[: text.index(stop)]
    assert choice.finish_reason == "stop"
    assert joined(stream(client, max_tokens=30, stop=stop)) == choice.message.content


def test_fields_of_vllm_reach_the_engine(client: Any, engine: AsyncEngine):
    prompt = render_chat(engine.engine.tokenizer, CHAT)
    allowed = [40, 41, 42]
    answer = chat(client, extra_body={"allowed_token_ids": allowed, "repetition_penalty": 1.5})
    expected = text_of(
        engine, prompt, temperature=0, max_tokens=12, allowed_token_ids=allowed, repetition_penalty=1.5
    )
    assert answer.choices[0].message.content == expected
    bias = {str(engine.engine.tokenizer.eos_token_id): 100}
    answer = chat(client, logit_bias=bias, extra_body={"ignore_eos": True})
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12


def test_a_chat_may_go_on_with_its_last_message(client: Any, engine: AsyncEngine):
    messages = [*CHAT, {"role": "assistant", "content": "The sea is"}]
    answer = chat(client, messages=messages, extra_body={"continue_final_message": True})
    rendered = render_chat(
        engine.engine.tokenizer,
        messages,
        add_generation_prompt=False,
        variables={"continue_final_message": True},
    )
    assert answer.choices[0].message.content == text_of(engine, rendered, temperature=0, max_tokens=12)


def test_parts_of_text_are_one_text(client: Any):
    parts = [{"type": "text", "text": "Tell me "}, {"type": "text", "text": "of the sea."}]
    assert chat(client, messages=[{"role": "user", "content": parts}]).choices == chat(client).choices


def test_old_and_new_name_of_the_length(client: Any):
    answers = [
        client.chat.completions.create(model=MODEL, messages=CHAT, temperature=0, **{name: 3})
        for name in ("max_tokens", "max_completion_tokens")
    ]
    assert [answer.usage.completion_tokens for answer in answers if answer.usage] == [3, 3]
    assert answers[0].choices == answers[1].choices


@pytest.mark.parametrize(
    ("form", "is_right"),
    [
        (
            {
                "type": "json_schema",
                "json_schema": {
                    "name": "answer",
                    "schema": {
                        "type": "object",
                        "properties": {"sea": {"enum": ["calm", "rough"]}},
                        "required": ["sea"],
                        "additionalProperties": False,
                    },
                },
            },
            lambda value: value["sea"] in ("calm", "rough") and len(value) == 1,
        ),
        ({"type": "json_object"}, lambda value: isinstance(value, dict)),
    ],
)
def test_an_answer_has_the_form_that_was_asked_for(client: Any, form: Any, is_right: Any):
    # The tiny model knows no end of an object by itself.
    bias = {"logit_bias": {"96": 8}} if form["type"] == "json_object" else {}
    fields: dict[str, Any] = {"response_format": form, "max_tokens": 200, **bias}
    (choice,) = chat(client, **fields).choices
    assert choice.finish_reason == "stop"
    assert is_right(json.loads(choice.message.content or ""))
    assert joined(stream(client, **fields)) == choice.message.content


def test_guided_fields_are_vllms_names_for_forms(client: Any):
    for fields in ({"guided_choice": ["red", "blue"]}, {"structured_outputs": {"choice": ["red", "blue"]}}):
        assert chat(client, extra_body=fields).choices[0].message.content in ("red", "blue")
    digits = chat(client, extra_body={"guided_regex": "[0-9]{4}"}).choices[0].message.content or ""
    assert digits.isdigit()
    assert len(digits) == 4


def test_default_names_a_single_model(client: Any):
    assert chat(client, model="default").model == MODEL
