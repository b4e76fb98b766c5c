"""What an answer's text is made of: content, reasoning and calls, whole or as it grows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from engine.parsers import (
    Event,
    ParsedMessage,
    ToolCallArguments,
    ToolCallStart,
    ends_inside_reasoning,
    make_parser,
    message_of,
)
from engine.server.forced_calls import NamedCall, RequiredCalls
from engine.server.served import ServedModel
from engine.server.tool_choice import ToolChoice


class PartReader(Protocol):
    """Takes a growing text apart."""

    def push(self, delta: str) -> list[Event]: ...

    def finish(self) -> list[Event]: ...


def part_reader(model: ServedModel, tools: ToolChoice, inside_reasoning: bool | None) -> PartReader:
    """What reads one completion of a model that has this choice of tools.

    inside_reasoning: whether its prompt left the reasoning open; None where that is not known.
    """
    if tools.mode == "named":
        return NamedCall(tools.name or "")
    if tools.mode == "required":
        return RequiredCalls()
    tool_parser, reasoning_parser = _parsers(model, tools)
    reader = make_parser(tool_parser, reasoning_parser, tools.offered, inside_reasoning=inside_reasoning)
    return reader if tools.is_parallel else _FirstCall(reader)


class _FirstCall:
    """Leaves out all calls but the first (`parallel_tool_calls=false`)."""

    def __init__(self, reader: PartReader):
        self._reader = reader

    def push(self, delta: str) -> list[Event]:
        return list(_first_call(self._reader.push(delta)))

    def finish(self) -> list[Event]:
        return list(_first_call(self._reader.finish()))


def _first_call(events: Iterable[Event]) -> Iterator[Event]:
    for event in events:
        if not isinstance(event, (ToolCallStart, ToolCallArguments)) or event.index == 0:
            yield event


def read_message(
    model: ServedModel, tools: ToolChoice, text: str, inside_reasoning: bool | None
) -> ParsedMessage:
    """A finished completion's parts."""
    reader = part_reader(model, tools, inside_reasoning)
    return message_of([*reader.push(text), *reader.finish()])


def needs_special_tokens(model: ServedModel, tools: ToolChoice) -> bool:
    """Whether markers that its parsers look for may be special tokens, which texts leave out by default."""
    return tools.mode not in ("named", "required") and any(_parsers(model, tools))


def _parsers(model: ServedModel, tools: ToolChoice) -> tuple[str | None, str | None]:
    # Where the model has no form of its own for calls, its prompt told it Hermes's (prompts.py).
    return (model.tool_parser or "hermes") if tools.offered else None, model.reasoning_parser


def inside_reasoning(model: ServedModel, prompt: Sequence[int]) -> bool | None:
    """Whether a prompt leaves the reasoning open; None where the parser is to know."""
    if model.reasoning_parser is None:
        return None
    tail = model.tokenizer.decode(prompt[-_MAX_MARKER_TOKENS:], skip_special_tokens=False)
    return ends_inside_reasoning(tail, model.reasoning_parser)


_MAX_MARKER_TOKENS = 64
"""More than the longest marker of a reasoning's begin or end has, with white space behind it."""
