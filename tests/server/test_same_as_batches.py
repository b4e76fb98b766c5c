"""A body has the same answer, whether it comes by HTTP or as a line of a batch file."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import httpx
import pytest

from engine.async_engine import AsyncEngine
from engine.openai_requests import parse_request, prompt_token_ids
from engine.openai_responses import AnswerHead, chat_completion, text_completion
from engine.parsers import parse_message
from engine.server.serving import BackgroundServer
from tests.server.conftest import MODEL, complete_with
from tests.server.test_tools import CALL, CHAT, TIME, TOOLS

CHATS, TEXTS = "/v1/chat/completions", "/v1/completions"
LOGPROBS = {"ignore_eos": True, "logprobs": True, "top_logprobs": 2}
NAMED = {"type": "function", "function": {"name": "get_time"}}
BODIES: list[tuple[str, dict[str, Any]]] = [
    (CHATS, {"max_tokens": 8}),
    (CHATS, {"n": 2, "seed": 4, "temperature": 1, "max_completion_tokens": 8, **LOGPROBS}),
    (CHATS, {"max_tokens": 100, "response_format": {"type": "json_object"}, "stop": ["zz"]}),
    (CHATS, {"max_tokens": 100, "tools": TOOLS, "tool_choice": NAMED}),
    (CHATS, {"max_tokens": 100, "tools": TOOLS, "guided_choice": [CALL]}),
    (CHATS, {"max_tokens": 100, "functions": [TIME], "function_call": {"name": "get_time"}}),
    (TEXTS, {"prompt": "Once", "logit_bias": {"70": 5}}),
    (TEXTS, {"prompt": ["Once", "Twice"], "echo": True, "max_tokens": 4}),
    (TEXTS, {"prompt": [40, 41, 42], "max_tokens": 4, "n": 2, "seed": 8, "temperature": 1}),
]


@pytest.mark.parametrize(("path", "fields"), BODIES, ids=range(len(BODIES)))
def test_the_same_body_has_the_same_answer(
    server: BackgroundServer, engine: AsyncEngine, path: str, fields: dict[str, Any]
):
    body = {"model": MODEL, "temperature": 0, **({"messages": CHAT} if path == CHATS else {}), **fields}
    answer = httpx.post(server.url + path, json=body).json()
    request = parse_request(path, body)
    tokenizer = engine.engine.tokenizer
    outputs = [
        complete_with(engine, prompt_token_ids(tokenizer, prompt), request.sampling)
        for prompt in request.prompts
    ]
    head = AnswerHead(id=answer["id"], created=answer["created"], model=MODEL)
    if path == TEXTS:
        line = text_completion(outputs, request.options, head, tokenizer)
    else:
        tools = list(request.options.tool_use.tools)
        parse = partial(parse_message, tool_parser="hermes" if tools else None, tools=tools)
        line = chat_completion(outputs[0], request.options, head, tokenizer, parse)
    assert comparable(answer) == comparable(line)


def comparable(answer: dict[str, Any]) -> dict[str, Any]:
    """Without what names an answer. Nor the length of its prompt: a server also tells of tools where the
    template does not."""
    kept = json.loads(json.dumps(answer))
    kept.pop("system_fingerprint", None)
    kept["usage"] = kept["usage"]["completion_tokens"]
    for choice in kept["choices"]:
        choice.pop("stop_reason", None)
        message = choice.get("message", {})
        for call in message.get("tool_calls", ()):
            call.pop("id")
        for called in (message, *message.get("tool_calls", ())):
            for name in ("function", "function_call"):
                if name in called:
                    called[name]["arguments"] = json.loads(called[name]["arguments"])
    return kept
