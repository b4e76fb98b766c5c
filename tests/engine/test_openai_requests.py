# pyright: reportArgumentType=false, reportCallIssue=false
"""Bodies of OpenAI's API: what each field becomes, and that none is passed over."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engine.errors import RequestError
from engine.openai_requests import ChatPrompt, OpenAIRequest, parse_request, prompt_token_ids
from engine.openai_responses import AnswerHead, chat_completion, required_calls, text_completion, usage
from engine.openai_tools import ToolUse
from engine.outputs import CompletionOutput, RequestMetrics, RequestOutput, TokenLogprob
from engine.sampling_params import MAX_TOKENS, SamplingParams
from tests.pipeline.input_helpers import make_chat_tokenizer

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
HEAD = AnswerHead(id="chatcmpl-1", created=7, model="m")
NULL = {"type": "null"}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}
    for name in ("add", "sub")
]


def chat(**fields: Any) -> OpenAIRequest:
    return parse_request(CHAT, {"model": "m", "messages": [{"role": "user", "content": "hi"}]} | fields)


def completion(**fields: Any) -> OpenAIRequest:
    return parse_request(COMPLETION, {"model": "m", "prompt": "hi"} | fields)


SAMPLED = {
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "repetition_penalty": 1.1,
    "seed": 11,
    "n": 3,
    "stop": ("a", "b"),
    "stop_token_ids": (3, 4),
    "min_tokens": 2,
    "ignore_eos": True,
    "bad_words": ("no",),
    "allowed_token_ids": (1, 2),
    "include_stop_str_in_output": True,
    "skip_special_tokens": False,
    "max_tokens": 9,
}


@pytest.mark.parametrize("endpoint", [chat, completion])
@pytest.mark.parametrize("name", SAMPLED)
def test_a_field_of_sampling_is_honoured(endpoint: Any, name: str) -> None:
    given: dict[str, Any] = {"max_tokens": 9} | {name: SAMPLED[name]}
    sent = json.loads(json.dumps(given))
    assert endpoint(**sent).sampling == SamplingParams(**given)


def test_what_is_left_out_is_openais_default_or_the_callers() -> None:
    assert chat().sampling == SamplingParams(max_tokens=MAX_TOKENS)
    assert not chat().has_max_tokens
    assert completion().sampling == SamplingParams(max_tokens=16)
    assert (
        chat(temperature=None, stop=None, tools=None, user="me", metadata={"a": "b"}).sampling
        == chat().sampling
    )
    own = SamplingParams(max_tokens=5, temperature=0.0, top_k=3)
    body = {"model": "m", "prompt": "hi", "top_k": -1}
    assert parse_request(COMPLETION, body, own).sampling == SamplingParams(max_tokens=5, temperature=0.0)


def test_both_names_of_the_most_tokens_are_known() -> None:
    assert chat(max_completion_tokens=4).sampling.max_tokens == 4
    assert chat(max_completion_tokens=4, max_tokens=4).has_max_tokens


def test_logprobs_are_asked_for_in_both_ways() -> None:
    assert chat(logprobs=True).sampling.logprobs == 0
    assert chat(logprobs=True, top_logprobs=4).sampling.logprobs == 4
    assert chat(logprobs=False).sampling.logprobs is None
    assert completion(logprobs=2).sampling.logprobs == 2
    assert completion(logprobs=2).sampling.prompt_logprobs is None
    assert completion(logprobs=2, echo=True).sampling.prompt_logprobs == 2


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [("a", ("a",)), ([1, 2], ((1, 2),)), (["a", "b"], ("a", "b")), ([[1], "b", [2, 3]], ((1,), "b", (2, 3)))],
)
def test_a_completion_has_prompts_in_four_forms(prompt: Any, wanted: Any) -> None:
    assert completion(prompt=prompt).prompts == wanted


def test_messages_are_given_as_templates_read_them() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "developer", "content": "be brief"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            "name": "x",
        },
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "content": "2", "tool_call_id": "c1"},
    ]
    [prompt] = chat(messages=messages).prompts
    assert isinstance(prompt, ChatPrompt)
    assert prompt.messages == (
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "ab", "name": "x"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}, "id": "c1"}
            ],
        },
        {"role": "tool", "content": "2", "tool_call_id": "c1"},
    )


def test_tools_are_told_to_every_template() -> None:
    silent = make_chat_tokenizer()
    telling = make_chat_tokenizer(
        "{% for t in tools %}[{{ t.function.name }}]{% endfor %}{{ messages[0].content }}"
    )
    [prompt] = chat(tools=TOOLS).prompts
    assert isinstance(prompt, ChatPrompt)
    assert prompt.text(telling) == "[add][sub]hi"
    assert '"name": "add"' in prompt.text(silent)
    assert silent.decode(prompt_token_ids(silent, prompt)) == prompt.text(silent)
    [without] = chat(tools=TOOLS, tool_choice="none").prompts
    assert isinstance(without, ChatPrompt)
    assert "add" not in without.text(silent)


@pytest.mark.parametrize(
    ("fields", "structured"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "schema": {"type": "null"}},
                }
            },
            {"json": {"type": "null"}},
        ),
        ({"guided_regex": "[0-9]+"}, {"regex": "[0-9]+"}),
        ({"structured_outputs": {"choice": ["a", "b"]}}, {"choice": ["a", "b"]}),
    ],
)
def test_a_text_can_be_held_to_a_form(fields: Any, structured: Any) -> None:
    wanted = SamplingParams(max_tokens=MAX_TOKENS, structured=structured)
    assert chat(**fields).sampling == wanted


def test_a_required_tool_holds_the_text_to_its_schema() -> None:
    named = chat(tools=TOOLS, tool_choice={"type": "function", "function": {"name": "sub"}})
    assert named.options.tool_use.mode == "named"
    assert named.options.tool_use.schema == {"type": "object", "properties": {}}
    assert named.sampling.structured is not None
    required = chat(tools=TOOLS, tool_choice="required", parallel_tool_calls=False).options.tool_use
    assert required.schema is not None
    assert required.schema["maxItems"] == required.schema["minItems"] == 1


REFUSED = {
    "typo": ({"temprature": 1}, "temprature"),
    "bad value": ({"temperature": "hot"}, "temperature"),
    "no tokens": ({"max_completion_tokens": 0}, "max_completion_tokens"),
    "two names that differ": ({"max_completion_tokens": 1, "max_tokens": 2}, "max_tokens"),
    "too many alternatives": ({"logprobs": True, "top_logprobs": 99}, "top_logprobs"),
    "alternatives alone": ({"top_logprobs": 1}, "top_logprobs"),
    "logprobs as number": ({"logprobs": 3}, "logprobs"),
    "usage without a stream": ({"stream_options": {"include_usage": True}}, "stream_options"),
    "audio": ({"modalities": ["audio"]}, "modalities"),
    "stored": ({"store": True}, "store"),
    "searching": ({"web_search_options": {}}, "web_search_options"),
    "no messages": ({"messages": "hi"}, "messages"),
    "message of text": ({"messages": ["hi"]}, "messages[0]"),
    "no content": ({"messages": [{"role": "user"}]}, "messages[0].content"),
    "unknown key": ({"messages": [{"role": "user", "content": "x", "mood": 1}]}, "messages[0].mood"),
    "user who calls": (
        {"messages": [{"role": "user", "content": "", "tool_calls": []}]},
        "messages[0].tool_calls",
    ),
    "result of nothing": ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
    "two formats": ({"guided_regex": "a", "guided_json": {}}, "guided_regex"),
    "schema without a name": (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
        "response_format.json_schema.name",
    ),
    "choice without tools": ({"tool_choice": "required"}, "tool_choice"),
    "tools twice": ({"tools": [TOOLS[0], TOOLS[0]]}, "tools"),
    "strict and free": (
        {"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]},
        "tools[0].function.strict",
    ),
    "old and new": ({"tools": TOOLS, "functions": [{"name": "f"}]}, "functions"),
    "template": ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs.chat_template"),
    "two ends": ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_honoured_is_refused_by_name(name: str) -> None:
    fields, param = REFUSED[name]
    with pytest.raises(RequestError) as refused:
        chat(**fields)
    assert refused.value.param == param
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [["a"]]}, "prompt[0]"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"messages": []}, "messages"),
    ],
)
def test_what_a_completion_cannot_have_is_refused_by_name(fields: Any, param: str) -> None:
    with pytest.raises(RequestError) as refused:
        completion(**fields)
    assert refused.value.param == param


@pytest.mark.parametrize("body", [None, [], "x", 1])
def test_a_body_is_an_object(body: Any) -> None:
    for endpoint in (CHAT, COMPLETION):
        with pytest.raises(RequestError, match="give an object"):
            parse_request(endpoint, body)
    with pytest.raises(RequestError, match="no endpoint"):
        parse_request("/v1/embeddings", {})


# -- answers -------------------------------------------------------------------------------------------


def output_of(text: str, finish_reason: str = "stop", **fields: Any) -> RequestOutput:
    sample = CompletionOutput(index=0, token_ids=(5, 6), finish_reason=finish_reason, text=text, **fields)  # type: ignore[arg-type]
    times = RequestMetrics(0.0, None, None, None)
    return RequestOutput("r", "hi", (1, 2, 3), (sample,), True, times, num_cached_tokens=2)


def test_usage_counts_a_prompt_once() -> None:
    counted = usage([output_of("a"), output_of("b")])
    assert counted == {
        "prompt_tokens": 6,
        "completion_tokens": 4,
        "total_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 4},
    }


def test_minus_infinity_is_a_number_in_json() -> None:
    logprobs = (TokenLogprob(5, -1.0, ((5, -1.0), (6, float("-inf")))), TokenLogprob(6, float("-inf"), ()))
    output = output_of("x", logprobs=logprobs)
    tokenizer = make_chat_tokenizer()
    body = chat_completion(output, chat(logprobs=True).options, HEAD, tokenizer)
    assert json.loads(json.dumps(body, allow_nan=False)) == body
    content = body["choices"][0]["logprobs"]["content"]
    assert content[1]["logprob"] == content[0]["top_logprobs"][1]["logprob"] == -9999.0
    body = text_completion([output], completion(logprobs=1).options, HEAD, tokenizer)
    assert body["choices"][0]["logprobs"]["text_offset"][0] == 0


def test_calls_that_were_required_are_read_from_json() -> None:
    required = ToolUse(tools=tuple(TOOLS), mode="required")
    text = '[{"name": "add", "parameters": {"a": "ü"}}, {"name": "sub", "parameters": {}}]'
    assert required_calls(text, required) == [("add", '{"a": "ü"}'), ("sub", "{}")]
    assert required_calls(text[:-20], required) == []
    named = ToolUse(tools=tuple(TOOLS), mode="named", name="sub")
    assert required_calls("{}", named) == [("sub", "{}")]


@pytest.mark.parametrize(
    ("choice", "reason"),
    [("required", "tool_calls"), ({"type": "function", "function": {"name": "add"}}, "stop")],
)
def test_a_forced_call_ends_as_openais_does(choice: Any, reason: str) -> None:
    options = chat(tools=TOOLS, tool_choice=choice).options
    text = '[{"name": "add", "parameters": {}}]' if choice == "required" else "{}"
    [made] = chat_completion(output_of(text), options, HEAD, make_chat_tokenizer())["choices"]
    assert made["finish_reason"] == reason
    assert made["message"]["content"] is None
    [call] = made["message"]["tool_calls"]
    assert call["function"] == {"name": "add", "arguments": "{}"}
    again = chat_completion(output_of(text), options, HEAD, make_chat_tokenizer())
    assert again["choices"] == [made], "ids too follow from the answer"
