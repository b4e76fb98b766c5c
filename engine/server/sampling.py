"""From the fields of a body to `SamplingParams`, within the server's limits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.sampling_params import SamplingParams
from engine.server.errors import bad_request
from engine.server.fields import SamplingFields
from engine.server.settings import ServerSettings
from engine.structured.spec import StructuredOutput

_SAME_NAME = (
    "temperature",
    "top_p",
    "presence_penalty",
    "frequency_penalty",
    "min_p",
    "repetition_penalty",
    "min_tokens",
    "stop_token_ids",
    "bad_words",
    "allowed_token_ids",
    "ignore_eos",
    "skip_special_tokens",
    "include_stop_str_in_output",
)
MAX_SEED = 2**63


def sampling_of(
    body: SamplingFields,
    settings: ServerSettings,
    *,
    max_tokens: int,
    n: int | None = None,
    logprobs: int | None = None,
    structured: StructuredOutput | None = None,
) -> SamplingParams:
    """The sampling that a body asks for; what it leaves out is OpenAI's default.

    Args:
        max_tokens: what the endpoint makes of its fields; at most `settings.max_tokens` is taken.
        n: of the completions that are drawn, where it is not the body's.

    Raises:
        ApiError: (400) over a limit, naming the field.
        RequestError: a value that the engine refuses, naming the field.
    """
    values: dict[str, Any] = {
        name: value for name in _SAME_NAME if (value := getattr(body, name)) is not None
    }
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    n = n or body.n or 1
    _at_most("n", n, settings.max_n)
    _at_most("stop", len(stop), settings.max_stop, "stop strings")
    _at_most("logit_bias", len(body.logit_bias or ()), settings.max_logit_bias, "token ids")
    _at_most("logprobs", logprobs or 0, settings.max_logprobs)
    if settings.max_tokens is not None:
        _at_most("max_tokens", max_tokens, settings.max_tokens)
    if body.seed is not None:
        values["seed"] = body.seed % MAX_SEED
    if structured is not None:
        values["structured"] = structured
    if body.top_k is not None:
        values["top_k"] = max(body.top_k, 0)
    return SamplingParams(
        n=n,
        max_tokens=max_tokens,
        stop=tuple(stop),
        logit_bias=_logit_bias(body.logit_bias or {}),
        logprobs=logprobs,
        **values,
    )


def priority_of(body: SamplingFields, settings: ServerSettings, scheduling_policy: str) -> int:
    """The priority that a client asks for. Raises ApiError (400) where it has no effect, or too much."""
    priority = body.priority or 0
    if priority and scheduling_policy != "priority":
        message = "priority has no effect here: the engine's scheduling_policy is not 'priority'"
        raise bad_request(message, "priority")
    if priority < settings.most_urgent_priority:
        message = f"priority is {priority}: at least {settings.most_urgent_priority} is taken"
        raise bad_request(message, "priority")
    return priority


def check_stream_options(body: SamplingFields) -> bool:
    """Whether a stream ends with its usage. Raises ApiError (400) for options without a stream."""
    if body.stream_options is not None and not body.stream:
        message = "The 'stream_options' parameter is only allowed when 'stream' is enabled."
        raise bad_request(message, "stream_options")
    return bool(body.stream_options and body.stream_options.include_usage)


def _logit_bias(given: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    for token in given:
        if not (token.isascii() and token.isdigit() and len(token) <= 10):
            raise bad_request(f"logit_bias has {token[:40]!r}, which is no token id", "logit_bias")
    return tuple((int(token), bias) for token, bias in given.items())


def _at_most(name: str, value: int, most: int, what: str = "") -> None:
    if value > most:
        told = f"{value} {what}".strip()
        raise bad_request(f"{name} is {told}: at most {most} is taken", name, "above_max_value")
