"""What an answer's text is made of: content, reasoning and calls, whole or as it grows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from engine.parsers import (
    ContentDelta,
    Event,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallStart,
    make_parser,
)
from engine.server.forced_calls import NamedCall, RequiredCalls
from engine.server.served import ServedModel
from engine.server.tool_choice import ToolChoice


class PartReader(Protocol):
    """Takes a growing text apart."""

    def push(self, delta: str) -> list[Event]: ...

    def finish(self) -> list[Event]: ...


def part_reader(model: ServedModel, tools: ToolChoice) -> PartReader:
    """What reads one completion of a model that has this choice of tools."""
    if tools.mode == "named":
        return NamedCall(tools.name or "")
    if tools.mode == "required":
        return RequiredCalls()
    offered = tools.offered
    # Where the model has no form of its own for calls, its prompt told it Hermes's (prompts.py).
    parser = (model.tool_parser or "hermes") if offered else None
    reader = make_parser(parser, model.reasoning_parser, offered)
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


@dataclass(slots=True)
class Parts:
    """A whole completion, collected from its events."""

    content: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    """(name, arguments) of each."""

    def add(self, events: Iterable[Any]) -> None:
        for event in events:
            if isinstance(event, ContentDelta):
                self.content += event.text
            elif isinstance(event, ReasoningDelta):
                self.reasoning += event.text
            elif isinstance(event, ToolCallStart):
                self.calls.append((event.name, ""))
            else:
                name, arguments = self.calls[event.index]
                self.calls[event.index] = (name, arguments + event.text)


def read_parts(model: ServedModel, tools: ToolChoice, text: str) -> Parts:
    """A finished completion's parts."""
    reader, parts = part_reader(model, tools), Parts()
    parts.add(reader.push(text))
    parts.add(reader.finish())
    return parts
