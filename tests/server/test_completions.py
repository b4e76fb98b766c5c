"""`/v1/completions`: every form of prompt, echo, log-probabilities, the best of several, streams."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from engine.async_engine import AsyncEngine
from engine.checkpoints import encode_text
from tests.server.conftest import MODEL, complete, text_of

PROMPT = "In the beginning"
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 8}


def completions(client: Any, **fields: Any) -> Any:
    return client.completions.create(**{**GREEDY, "prompt": PROMPT, **fields})


def spelled_bytes(token: str) -> bytes:
    """What a token of the answer stands for: text, or bytes that are part of a character."""
    head, _, digits = token.partition("bytes:\\x")
    return token.encode() if head or not digits else bytes.fromhex(digits.replace("\\x", ""))


def streamed(client: Any, **fields: Any) -> list[Any]:
    return list(completions(client, **fields, stream=True))


@pytest.mark.parametrize("form", ["text", "texts", "ids", "lists of ids"])
def test_prompts_come_in_every_form(client: Any, engine: AsyncEngine, form: str):
    ids = encode_text(engine.engine.tokenizer, PROMPT)
    prompt = {"text": PROMPT, "texts": [PROMPT, PROMPT], "ids": ids, "lists of ids": [ids, ids]}[form]
    answer = completions(client, prompt=prompt)
    expected = text_of(engine, PROMPT, temperature=0, max_tokens=8)
    assert [choice.text for choice in answer.choices] == [expected] * len(answer.choices)
    assert [choice.index for choice in answer.choices] == ([0] if form in ("text", "ids") else [0, 1])
    assert answer.usage.prompt_tokens == len(ids) * len(answer.choices)
    assert answer.usage.completion_tokens == 8 * len(answer.choices)


def test_sixteen_tokens_are_the_default(client: Any):
    answer = client.completions.create(model=MODEL, prompt=PROMPT, temperature=0)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16


def test_samples_of_several_prompts_are_in_order_and_a_stream_is_the_same(client: Any):
    fields: dict[str, Any] = {"prompt": ["One", "Two"], "n": 2, "temperature": 1, "seed": 3}
    whole = completions(client, **fields)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    chunks = streamed(client, **fields, stream_options={"include_usage": True})
    for choice in whole.choices:
        mine = [each for chunk in chunks for each in chunk.choices if each.index == choice.index]
        assert "".join(each.text for each in mine) == choice.text
        assert mine[-1].finish_reason == choice.finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens


def test_an_echo_begins_with_the_prompt_and_its_log_probabilities(client: Any, engine: AsyncEngine):
    fields: dict[str, Any] = {"echo": True, "logprobs": 2}
    (choice,) = completions(client, **fields).choices
    output = complete(engine, PROMPT, temperature=0, max_tokens=8, logprobs=2, prompt_logprobs=2)
    assert choice.text == PROMPT + output.outputs[0].text
    told = choice.logprobs
    assert b"".join(map(spelled_bytes, told.tokens)).decode("utf-8", "replace") == choice.text
    assert told.token_logprobs[0] is None
    assert told.top_logprobs[0] is None
    known = [*(output.prompt_logprobs or ())[1:], *(output.outputs[0].logprobs or ())]
    assert told.token_logprobs[1:] == pytest.approx([entry.logprob for entry in known if entry])
    # An offset is where a token begins in the text.
    for token, offset in zip(told.tokens, told.text_offset, strict=True):
        if not token.startswith("bytes:"):
            assert choice.text[offset : offset + len(token)] == token
    for token, logprob, top in zip(
        told.tokens[1:], told.token_logprobs[1:], told.top_logprobs[1:], strict=True
    ):
        assert top[token] == logprob
        assert 2 <= len(top) <= 3
    chunks = streamed(client, **fields)
    assert "".join(each.choices[0].text for each in chunks) == choice.text
    pieces = [each.choices[0].logprobs for each in chunks]
    assert [token for piece in pieces for token in piece.tokens] == told.tokens
    assert [offset for piece in pieces for offset in piece.text_offset] == told.text_offset


def test_a_prompt_may_only_be_scored(client: Any):
    answer = completions(client, echo=True, logprobs=0, max_tokens=0)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == (PROMPT, "length")
    assert answer.usage.completion_tokens == 0
    longer = completions(client, echo=True, logprobs=0, max_tokens=1).choices[0].logprobs
    assert choice.logprobs.token_logprobs == longer.token_logprobs[:-1]


def test_the_best_are_those_of_the_highest_mean_log_probability(client: Any):
    fields: dict[str, Any] = {"temperature": 1, "seed": 9, "logprobs": 0}
    drawn = completions(client, **fields, n=6)
    means = {
        choice.text: sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)
        for choice in drawn.choices
    }
    best = completions(client, **fields, n=2, best_of=6)
    ranked = sorted(means, key=lambda text: means[text], reverse=True)
    assert [choice.text for choice in best.choices] == ranked[:2]
    assert [choice.index for choice in best.choices] == [0, 1]
    assert best.usage.completion_tokens == drawn.usage.completion_tokens
    assert completions(client, temperature=1, seed=9, n=2, best_of=6).choices[0].logprobs is None


def test_tokens_that_are_parts_of_characters_are_told_apart(client: Any):
    (choice,) = completions(client, prompt="é", echo=True, logprobs=0, max_tokens=0).choices
    assert choice.logprobs.tokens == ["bytes:\\xc3", "bytes:\\xa9"]
    assert choice.logprobs.text_offset == [0, 0]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [100_000]}, "prompt"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"logprobs": 21}, "logprobs"),
    ],
)
def test_what_cannot_be_is_refused(client: Any, fields: dict[str, Any], param: str):
    with pytest.raises(openai.BadRequestError) as refused:
        completions(client, **fields)
    assert (refused.value.param or "").partition(".")[0] == param
