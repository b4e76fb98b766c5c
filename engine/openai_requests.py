"""Bodies of OpenAI's API to prompts and sampling: what the server's endpoints and batch files have in common.

    request = parse_request("/v1/chat/completions", body)
    request.prompts, request.sampling, request.options

Every field of a body is honoured or refused by name (`RequestError`, with `param`); nulls count as absent.
Besides OpenAI's fields those of vLLM for sampling are known. Nothing here needs a model: whether a prompt
fits, and whether `model` is served, is for the caller to see.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from engine.errors import RequestError
from engine.openai_chat import Message, checked_messages, template_variables, with_introduction
from engine.openai_fields import Fields, kind_of, refuse
from engine.openai_formats import structured_output
from engine.openai_tools import NO_TOOLS, ToolUse, tool_use
from engine.sampling_params import MAX_TOKENS, SamplingParams

AnswerKind = Literal["chat.completion", "text_completion"]

_SAMPLING_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "n",
    "stop",
    "stop_token_ids",
    "min_tokens",
    "ignore_eos",
    "logit_bias",
    "bad_words",
    "allowed_token_ids",
    "include_stop_str_in_output",
    "skip_special_tokens",
)
# Fields that OpenAI keeps with the answer, or bills by: they say nothing about what is generated.
_LABELS = ("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")

COMPLETION_MAX_TOKENS = 16
"""OpenAI's default for completions; a chat goes on to the model's length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPrompt:
    """A chat, and what its template is told beside it."""

    messages: tuple[Message, ...]
    variables: Mapping[str, Any]
    add_generation_prompt: bool = True

    def text(self, tokenizer: Any) -> str:
        """What the tokenizer's chat template makes of it. Raises RequestError, ModelError."""
        from engine.checkpoints.chat import render_chat_text

        messages, variables = self._for(tokenizer)
        return render_chat_text(
            tokenizer, messages, add_generation_prompt=self.add_generation_prompt, variables=variables
        )

    def token_ids(self, tokenizer: Any) -> list[int]:
        """The tokens of that text; the template writes BOS where the model wants it."""
        from engine.checkpoints.chat import render_chat

        messages, variables = self._for(tokenizer)
        return render_chat(
            tokenizer, messages, add_generation_prompt=self.add_generation_prompt, variables=variables
        )

    def _for(self, tokenizer: Any) -> tuple[Sequence[Message], Mapping[str, Any]]:
        """Messages and variables; the tools are told in a message where the template does not tell of
        them."""
        template = getattr(tokenizer, "chat_template", None)
        if "tools" not in self.variables or (isinstance(template, str) and "tools" in template):
            return self.messages, self.variables
        variables = {name: value for name, value in self.variables.items() if name != "tools"}
        return with_introduction(self.messages, self.variables["tools"]), variables


Prompt = str | tuple[int, ...] | ChatPrompt


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerOptions:
    """What shapes the answer, beside the samples themselves."""

    kind: AnswerKind
    stream: bool = False
    include_usage: bool = False
    logprobs: bool = False
    echo: bool = False
    tool_use: ToolUse = NO_TOOLS
    include_reasoning: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenAIRequest:
    """A body as the engine takes it. Chats have one prompt; completions one or several, in order.

    model: as the body names it. has_max_tokens: the body says how many tokens there may be; where it does
    not, `sampling.max_tokens` is only a bound, which whoever knows the model's length may lower to what fits.
    """

    model: str
    prompts: tuple[Prompt, ...]
    sampling: SamplingParams
    has_max_tokens: bool
    options: AnswerOptions


def parse_request(
    endpoint: str, body: Mapping[str, Any], defaults: SamplingParams | None = None
) -> OpenAIRequest:
    """The request that a POST of `body` to `endpoint` makes.

    Args:
        defaults: for what the body leaves out; None for OpenAI's own (temperature 1, a chat as long as fits,
            a completion of 16 tokens).

    Raises:
        RequestError: `bad_url` for an endpoint that is not known; else with the field in `param`.
    """
    if endpoint not in ENDPOINTS:
        listed = ", ".join(ENDPOINTS)
        raise RequestError(
            "bad_url", f"{str(endpoint)[:80]!r} is no endpoint for this; use one of {listed}", "url"
        )
    return ENDPOINTS[endpoint](body, defaults)


def parse_chat(body: Mapping[str, Any], defaults: SamplingParams | None = None) -> OpenAIRequest:
    """The body of a POST to /v1/chat/completions. As `parse_request`."""
    fields = Fields(body)
    model = fields.needed_text("model")
    messages = checked_messages(fields.take("messages", []))
    tools = tool_use(fields)
    variables = template_variables(fields, tools)
    goes_on = fields.flag("continue_final_message", False)
    opens = fields.flag("add_generation_prompt", not goes_on)
    if goes_on:
        if opens:
            refuse("bad_request", "continue_final_message", "needs add_generation_prompt to be false")
        variables["continue_final_message"] = True
    wants_logprobs = fields.flag("logprobs", False)
    top = fields.take("top_logprobs")
    if top is not None and not wants_logprobs:
        refuse("bad_request", "top_logprobs", "needs logprobs to be true")
    stream, include_usage = _streaming(fields)
    fields.one_of("modalities", (["text"],))
    fields.one_of("store", (False,))
    fields.one_of("verbosity", ("medium",))
    fields.absent("audio", "web_search_options", "prediction")
    structured = structured_output(fields)
    if tools.schema is not None:
        if structured is not None:
            refuse(
                "bad_request", "tool_choice", "requires a tool, so response_format cannot be held to as well"
            )
        structured = {"json": tools.schema}
    include_reasoning = fields.flag("include_reasoning", True)
    sampling, has_max_tokens = _sampling(
        fields,
        defaults or SamplingParams(max_tokens=MAX_TOKENS),
        ("max_completion_tokens", "max_tokens"),
        logprobs=(0 if top is None else top) if wants_logprobs else None,
        structured=structured,
    )
    _finish(fields)
    options = AnswerOptions(
        kind="chat.completion",
        stream=stream,
        include_usage=include_usage,
        logprobs=wants_logprobs,
        tool_use=tools,
        include_reasoning=include_reasoning,
    )
    prompt = ChatPrompt(messages=tuple(messages), variables=variables, add_generation_prompt=opens)
    return OpenAIRequest(
        model=model, prompts=(prompt,), sampling=sampling, has_max_tokens=has_max_tokens, options=options
    )


def parse_completion(body: Mapping[str, Any], defaults: SamplingParams | None = None) -> OpenAIRequest:
    """The body of a POST to /v1/completions. As `parse_request`."""
    fields = Fields(body)
    model = fields.needed_text("model")
    prompts = _completion_prompts(fields.take("prompt"))
    echo = fields.flag("echo", False)
    logprobs = fields.take("logprobs")
    stream, include_usage = _streaming(fields)
    fields.absent("suffix")
    best_of, n = fields.take("best_of"), fields.take("n", 1)
    if best_of is not None and best_of != n:
        refuse("not_supported", "best_of", "is only supported where it equals n; leave it out")
    sampling, has_max_tokens = _sampling(
        fields,
        defaults or SamplingParams(max_tokens=COMPLETION_MAX_TOKENS),
        ("max_tokens",),
        logprobs=logprobs,
        prompt_logprobs=logprobs if echo else None,
        structured=structured_output(fields),
        n=n,
    )
    _finish(fields)
    options = AnswerOptions(
        kind="text_completion",
        stream=stream,
        include_usage=include_usage,
        logprobs=logprobs is not None,
        echo=echo,
    )
    return OpenAIRequest(
        model=model, prompts=prompts, sampling=sampling, has_max_tokens=has_max_tokens, options=options
    )


ENDPOINTS: Mapping[str, Callable[[Mapping[str, Any], SamplingParams | None], OpenAIRequest]] = {
    "/v1/chat/completions": parse_chat,
    "/v1/completions": parse_completion,
}


def prompt_token_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """A prompt's tokens, with one BOS where the model wants one. Raises RequestError, ModelError."""
    from engine.checkpoints.chat import encode_text

    if isinstance(prompt, str):
        return encode_text(tokenizer, prompt)
    return list(prompt) if isinstance(prompt, tuple) else prompt.token_ids(tokenizer)


def _sampling(
    fields: Fields,
    defaults: SamplingParams,
    max_tokens_names: Sequence[str],
    **values: Any,
) -> tuple[SamplingParams, bool]:
    """The sampling, and whether the body says how many tokens. `values`: those that are read already."""
    values = {name: value for name, value in values.items() if value is not None}
    for name in _SAMPLING_FIELDS:
        if (value := fields.take(name)) is not None:
            values[name] = value
    if values.get("top_k") == -1:  # vLLM's way to say that it is off
        values["top_k"] = 0
    given = [(name, value) for name in max_tokens_names if (value := fields.take(name)) is not None]
    if len(given) > 1 and given[0][1] != given[1][1]:
        refuse("bad_request", "max_tokens", "and max_completion_tokens are both given and differ; give one")
    if given:
        values["max_tokens"] = given[0][1]
    try:
        return defaults.replace(**values), bool(given)
    except RequestError as error:
        name = error.param
        if name == "max_tokens" and given:
            name = given[0][0]
        elif name == "logprobs" and "messages" in fields.known:
            name = "top_logprobs"
        raise RequestError(error.reason, str(error).removeprefix("sampling."), name) from error


def _streaming(fields: Fields) -> tuple[bool, bool]:
    """`stream`, and whether it ends with the usage."""
    stream = fields.flag("stream", False)
    options = fields.take("stream_options")
    if options is None:
        return stream, False
    if not stream:
        refuse("bad_request", "stream_options", "needs stream to be true")
    inner = Fields(options, "stream_options")
    include_usage = inner.flag("include_usage", False)
    inner.one_of("include_obfuscation", (False,))
    inner.refuse_rest()
    return stream, include_usage


def _completion_prompts(value: object) -> tuple[Prompt, ...]:
    if isinstance(value, str):
        return (_checked_text(value, "prompt"),)
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        what = "is missing" if value is None else f"is a JSON {kind_of(value)}"
        refuse(
            "missing_column" if value is None else "wrong_type", "prompt", f"{what}; give text or token ids"
        )
    if not value:
        refuse("empty_prompt", "prompt", "is empty; give text")
    if all(_is_token(item) for item in value):
        return (tuple(value),)
    prompts: list[Prompt] = []
    for index, item in enumerate(value):
        where = f"prompt[{index}]"
        if isinstance(item, str):
            prompts.append(_checked_text(item, where))
        elif isinstance(item, Sequence) and item and all(_is_token(token) for token in item):
            prompts.append(tuple(item))
        else:
            refuse("wrong_type", where, "is neither text nor token ids; give one of them")
    return tuple(prompts)


def _checked_text(text: str, where: str) -> str:
    if not text:
        refuse("empty_prompt", where, "is empty; give text")
    return text


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _finish(fields: Fields) -> None:
    """The labels have no effect, and nothing may be left."""
    fields.one_of("service_tier", ("auto", "default"))
    for name in _LABELS:
        fields.take(name)
    fields.refuse_rest()
