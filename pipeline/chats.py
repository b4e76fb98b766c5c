"""A row's chat: checked message by message, then rendered by the tokenizer's own chat template.

transformers renders it in an ImmutableSandboxedEnvironment.
"""

from __future__ import annotations

from typing import Any

import jinja2

from pipeline.rows import Refused
from pipeline.templates import RENDER_ERRORS

ROLES = ("system", "developer", "user", "assistant", "tool")

Chat = list[dict[str, Any]]


def checked_chat(value: Any, column: str) -> Chat:
    """`value` as a chat: a list of mappings with a known `role` and a `content` of text.

    Other keys are kept for the template, but for nulls, which Parquet puts wherever another row has a value.
    """
    if not isinstance(value, list):
        raise Refused("wrong_type", f"column {column!r} is a {_kind(value)}; a chat is a list of messages")
    if not value:
        raise Refused("empty_prompt", f"column {column!r} is an empty list; give at least one message")
    chat = [_checked_message(message, f"{column}[{i}]") for i, message in enumerate(value)]
    if not any(message["content"].strip() for message in chat):
        raise Refused("empty_prompt", f"column {column!r} has no message with any text")
    return chat


def _checked_message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise Refused("wrong_type", f"{where} is a {_kind(message)}; a message is {{role, content}}")
    kept = {key: value for key, value in message.items() if value is not None}
    for key in ("role", "content"):
        if key not in message:
            have = ", ".join(sorted(map(str, message))[:8]) or "nothing"
            raise Refused("missing_column", f"{where} has no {key!r} (it has {have}); add it")
        if key not in kept:
            raise Refused("null_value", f"{where}.{key} is null; give text")
        if not isinstance(kept[key], str):
            raise Refused("wrong_type", f"{where}.{key} is a {_kind(kept[key])}; give text")
    if kept["role"] not in ROLES:
        raise Refused("bad_role", f"{where}.role is {kept['role'][:40]!r}; use one of {', '.join(ROLES)}")
    return kept


def render_chat(tokenizer: Any, chat: Chat, add_generation_prompt: bool) -> str:
    """The chat as the model's text. Raises Refused (`template_error`) when the template refuses it."""
    try:
        text = tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except RENDER_ERRORS as error:
        said = " ".join(str(error).split())[:200] or type(error).__name__
        kind = "refuses this chat" if isinstance(error, jinja2.TemplateError) else "fails on this chat"
        raise Refused("template_error", f"the model's chat template {kind}: {said}") from error
    return text


def _kind(value: Any) -> str:
    return {str: "text", dict: "mapping", list: "list", type(None): "null"}.get(
        type(value), type(value).__name__
    )
