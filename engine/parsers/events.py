"""What a completion's text is made of, whole or as it grows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model asks for."""

    name: str
    arguments: str
    """JSON text of an object; a family that writes JSON itself is quoted as it wrote."""


@dataclass(frozen=True, slots=True)
class ParsedMessage:
    """A whole completion, taken apart."""

    content: str
    reasoning: str | None = None
    """What the model thought before its answer, without the markers; None where it did not think."""
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class ContentDelta:
    """The answer grew."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """The reasoning grew."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """Call number `index` (from 0) begins."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """The arguments of call number `index` grew; joined they are `ToolCall.arguments`."""

    index: int
    text: str


Event: TypeAlias = ContentDelta | ReasoningDelta | ToolCallStart | ToolCallArguments
