"""Text and chats to token ids, with exactly one BOS where the model wants one.

Chat templates come with a model, so they are someone else's programs: transformers renders them in Jinja's
ImmutableSandboxedEnvironment, which reaches no attribute outside the data given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.checkpoints.reading import one_line
from engine.errors import ModelError, RequestError


def has_chat_template(tokenizer: Any) -> bool:
    """Whether the model came with a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a plain prompt, with the special tokens the tokenizer adds by itself (such as BOS).

    A text that already begins with BOS gets no second one. RequestError `lone_surrogate` for a text that is
    not Unicode, `wrong_type` for one that is not a string.
    """
    _check_text(text)
    bos = tokenizer.bos_token
    written = bos is not None and text.startswith(bos)
    return _encode(tokenizer, text, add_special_tokens=not written)


def render_chat_text(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    template: str | None = None,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The text the chat template makes of `messages` (each a mapping with a `role`, usually with a
    `content`).

    `template` replaces the model's own; `variables` are given to it by name. ModelError where there is no
    template; RequestError `template_error` where these messages do not fit it, `wrong_type` where they are
    not messages.
    """
    import jinja2

    if template is None and not has_chat_template(tokenizer):
        raise ModelError("the model has no chat template; give one, or use plain prompts")
    _check_messages(messages)
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            **(variables or {}),
        )
    # What a template does with values it did not expect is Python's own errors, through Jinja.
    except (
        jinja2.TemplateError,
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise RequestError(
            "template_error", f"the chat template failed on these messages: {one_line(error)}"
        ) from error
    _check_text(text)
    return text


def render_chat(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    template: str | None = None,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of a chat.

    The template writes BOS where the model wants it, so none is added. As `render_chat_text`.
    """
    text = render_chat_text(
        tokenizer,
        messages,
        add_generation_prompt=add_generation_prompt,
        template=template,
        variables=variables,
    )
    return _encode(tokenizer, text, add_special_tokens=False)


def _encode(tokenizer: Any, text: str, *, add_special_tokens: bool) -> list[int]:
    # The backend is asked directly: the wrapper warns about texts over the model's length, which is our
    # caller's to decide.
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids


def _check_text(text: object) -> None:
    if not isinstance(text, str):
        raise RequestError("wrong_type", f"a prompt must be text, got {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            "lone_surrogate",
            f"the text has a lone surrogate at character {error.start}, which no UTF-8 can hold",
        ) from error


def _check_messages(messages: object) -> None:
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise RequestError("wrong_type", "messages must be a list of at least one message")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError("wrong_type", f"message {index} must be an object with a role, which is text")


def prompt_tokens(
    tokenizer: Any,
    request_id: str,
    token_ids: Sequence[int] | None,
    prompt: str | Sequence[Mapping[str, Any]] | None,
) -> tuple[int, ...]:
    """The token ids of a request that has these or a prompt. Raises RequestError for both or neither."""
    if (prompt is None) == (token_ids is None):
        raise RequestError(
            "bad_prompt", f"request {request_id!r}: give a prompt or its token ids, one of them"
        )
    if prompt is None:
        return tuple(token_ids or ())
    return tuple(
        encode_text(tokenizer, prompt) if isinstance(prompt, str) else render_chat(tokenizer, prompt)
    )
