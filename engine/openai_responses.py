"""What the engine made, as the bodies that OpenAI's API answers with: chat completions and completions.

Ids and times are the caller's, so the same output makes the same bytes. Tool calls and reasoning are found in
a chat's text by `parse`, which is the parsers' business (`engine/parsers/`); calls that were required are
JSON already.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from engine.detokenizer import bytes_of_token
from engine.openai_requests import AnswerOptions
from engine.openai_tools import ToolUse
from engine.outputs import CompletionOutput, RequestOutput, TokenLogprob

LEAST_LOGPROB = -9999.0
"""In the place of minus infinity, for which JSON has no number; OpenAI's own way."""


class CalledTool(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def arguments(self) -> str: ...


class MessageParts(Protocol):
    """A chat's text taken apart, as `engine.parsers.ParsedMessage` is."""

    @property
    def content(self) -> str: ...

    @property
    def reasoning(self) -> str | None: ...

    @property
    def tool_calls(self) -> Sequence[CalledTool]: ...


Parse = Callable[[str], MessageParts]


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerHead:
    """Who answers. id: begins with `chatcmpl-` or `cmpl-`; created: Unix seconds; model: as the client named
    it."""

    id: str
    created: int
    model: str


def chat_completion(
    output: RequestOutput,
    options: AnswerOptions,
    head: AnswerHead,
    tokenizer: Any,
    parse: Parse | None = None,
    *,
    with_cached_tokens: bool = True,
) -> dict[str, Any]:
    """The answer to a chat.

    Args:
        parse: takes the text apart; None for a model whose text is all content.
        with_cached_tokens: tell in the usage how much of the prompt was found in the cache, which depends on
            what ran before.
    """
    choices = [_chat_choice(sample, options, head, tokenizer, parse) for sample in _in_order(output)]
    return {
        "id": head.id,
        "object": "chat.completion",
        "created": head.created,
        "model": head.model,
        "choices": choices,
        "usage": usage([output], with_cached_tokens=with_cached_tokens),
        "system_fingerprint": None,
    }


def text_completion(
    outputs: Sequence[RequestOutput],
    options: AnswerOptions,
    head: AnswerHead,
    tokenizer: Any,
    *,
    with_cached_tokens: bool = True,
) -> dict[str, Any]:
    """The answer to a completion: the samples of each prompt, one prompt after the other."""
    choices: list[dict[str, Any]] = []
    for output in outputs:
        for sample in _in_order(output):
            echoed = prompt_text(output, tokenizer) if options.echo else ""
            choices.append(
                {
                    "index": len(choices),
                    "text": echoed + sample.text,
                    "logprobs": _completion_logprobs(output, sample, options, tokenizer),
                    "finish_reason": sample.finish_reason,
                }
            )
    return {
        "id": head.id,
        "object": "text_completion",
        "created": head.created,
        "model": head.model,
        "choices": choices,
        "usage": usage(outputs, with_cached_tokens=with_cached_tokens),
        "system_fingerprint": None,
    }


def usage(outputs: Sequence[RequestOutput], *, with_cached_tokens: bool = True) -> dict[str, Any]:
    """Tokens of all prompts, each counted once, and of all samples."""
    num_prompt = sum(len(output.prompt_token_ids) for output in outputs)
    num_drawn = sum(len(sample.token_ids) for output in outputs for sample in output.outputs)
    counted: dict[str, Any] = {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_drawn,
        "total_tokens": num_prompt + num_drawn,
    }
    if with_cached_tokens:
        cached = sum(output.num_cached_tokens for output in outputs)
        counted["prompt_tokens_details"] = {"cached_tokens": cached}
    return counted


def prompt_text(output: RequestOutput, tokenizer: Any) -> str:
    """A prompt as text, for `echo`."""
    if output.prompt is not None:
        return output.prompt
    return tokenizer.decode(list(output.prompt_token_ids), skip_special_tokens=True)


def chat_logprobs(tokens: Sequence[TokenLogprob], tokenizer: Any) -> dict[str, Any]:
    """`logprobs` of a chat's choice, for all its tokens or for those of one piece of a stream."""
    content = []
    for each in tokens:
        entry = _token(tokenizer, each.token_id, each.logprob)
        entry["top_logprobs"] = [_token(tokenizer, token_id, logprob) for token_id, logprob in each.top]
        content.append(entry)
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokens: Sequence[TokenLogprob | None], token_ids: Sequence[int], tokenizer: Any, offset: int = 0
) -> dict[str, Any]:
    """`logprobs` of a completion's choice. `offset`: characters of the text before these tokens."""
    found: dict[str, list[Any]] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
    for each, token_id in zip(tokens, token_ids, strict=True):
        text = _text(tokenizer, token_id)
        found["tokens"].append(text)
        found["text_offset"].append(offset)
        found["token_logprobs"].append(None if each is None else _finite(each.logprob))
        tops = None
        if each is not None:
            tops = {_text(tokenizer, token): _finite(logprob) for token, logprob in reversed(each.top)}
        found["top_logprobs"].append(tops)
        offset += len(text)
    return found


def tool_call_id(answer_id: str, choice: int, call: int) -> str:
    """The id of a tool call: made of its answer's, so that the same answer has the same."""
    digest = hashlib.blake2b(f"{answer_id}:{choice}:{call}".encode(), digest_size=12)
    return f"call_{digest.hexdigest()}"


def required_calls(text: str, tool_use: ToolUse) -> list[tuple[str, str]]:
    """The name and the arguments' JSON text of each call in the text of a chat that had to call a tool.

    None where the text was cut off before its JSON was whole.
    """
    if tool_use.mode == "named":
        return [(tool_use.name or "", text)]
    try:
        calls = json.loads(text)
        return [(call["name"], json.dumps(call["parameters"], ensure_ascii=False)) for call in calls]
    except (ValueError, KeyError, TypeError):
        return []


def _in_order(output: RequestOutput) -> list[CompletionOutput]:
    return sorted(output.outputs, key=lambda sample: sample.index)


def _chat_choice(
    sample: CompletionOutput, options: AnswerOptions, head: AnswerHead, tokenizer: Any, parse: Parse | None
) -> dict[str, Any]:
    tool_use = options.tool_use
    content, reasoning, calls = sample.text, None, []
    if parse is not None and tool_use.mode in ("none", "auto"):
        parts = parse(sample.text)
        content, reasoning = parts.content, parts.reasoning
        calls = [(call.name, call.arguments) for call in parts.tool_calls] if tool_use.mode == "auto" else []
    elif tool_use.mode in ("required", "named"):
        calls = required_calls(sample.text, tool_use)
        content = "" if calls else content
    if not tool_use.parallel or tool_use.as_function:
        calls = calls[:1]
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if reasoning is not None and options.include_reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["content"] = content or None
        called = [{"name": name, "arguments": arguments} for name, arguments in calls]
        if tool_use.as_function:
            message["function_call"] = called[0]
        else:
            message["tool_calls"] = [
                {"id": tool_call_id(head.id, sample.index, i), "type": "function", "function": call}
                for i, call in enumerate(called)
            ]
    logprobs = None
    if options.logprobs and sample.logprobs is not None:
        logprobs = chat_logprobs(sample.logprobs, tokenizer)
    return {
        "index": sample.index,
        "message": message,
        "logprobs": logprobs,
        "finish_reason": chat_finish_reason(sample.finish_reason, tool_use, has_calls=bool(calls)),
    }


def chat_finish_reason(reason: str | None, tool_use: ToolUse, *, has_calls: bool) -> str | None:
    """The reason that a chat's choice gives. Of a call that the client itself named it is "stop", as
    OpenAI's."""
    if reason == "stop" and has_calls and tool_use.mode != "named":
        return "function_call" if tool_use.as_function else "tool_calls"
    return reason


def _completion_logprobs(
    output: RequestOutput, sample: CompletionOutput, options: AnswerOptions, tokenizer: Any
) -> dict[str, Any] | None:
    if not options.logprobs or sample.logprobs is None:
        return None
    tokens: list[TokenLogprob | None] = list(sample.logprobs)
    token_ids = list(sample.token_ids)
    if options.echo:
        tokens = [*(output.prompt_logprobs or ()), *tokens]
        token_ids = [*output.prompt_token_ids, *token_ids]
    return completion_logprobs(tokens, token_ids, tokenizer)


def _token(tokenizer: Any, token_id: int, logprob: float) -> dict[str, Any]:
    raw = bytes_of_token(tokenizer, token_id)
    return {"token": raw.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(raw)}


def _text(tokenizer: Any, token_id: int) -> str:
    return bytes_of_token(tokenizer, token_id).decode("utf-8", "replace")


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
