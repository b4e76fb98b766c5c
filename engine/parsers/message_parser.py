"""A completion's text taken apart: reasoning, tool calls and the answer, as it grows or whole."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from engine.errors import ConfigError
from engine.parsers.call_bodies import Tools
from engine.parsers.events import (
    ContentDelta,
    Event,
    ParsedMessage,
    ReasoningDelta,
    ToolCall,
    ToolCallArguments,
    ToolCallStart,
)
from engine.parsers.formats import HARMONY_MODELS, REASONING_FORMATS, TOOL_FORMATS
from engine.parsers.harmony import HarmonyStage
from engine.parsers.reasoning_stage import ReasoningStage
from engine.parsers.tool_stage import ToolStage

HARMONY_TOOLS, HARMONY_REASONING = "openai", "gptoss"

TOOL_PARSERS: dict[str, str] = {
    **{name: form.models for name, form in TOOL_FORMATS.items()},
    HARMONY_TOOLS: HARMONY_MODELS,
}
"""What `tool_parser` may be, and whose calls it reads."""
REASONING_PARSERS: dict[str, str] = {
    **{name: form.models for name, form in REASONING_FORMATS.items()},
    HARMONY_REASONING: HARMONY_MODELS,
}
"""What `reasoning_parser` may be, and whose reasoning it reads."""


class MessageParser:
    """Takes one completion's text apart as it grows. The text needs its special tokens: sample it with
    `skip_special_tokens=False` where `needs_special_tokens`."""

    def __init__(self, reasoning: ReasoningStage | HarmonyStage | None, tools: ToolStage | None):
        self._reasoning = reasoning
        self._tools = tools

    @property
    def needs_special_tokens(self) -> bool:
        return self._reasoning is not None or self._tools is not None

    def push(self, delta: str) -> list[Event]:
        """What became certain with a piece of text."""
        events: list[Event] = [ContentDelta(delta)] if delta else []
        if self._reasoning is not None:
            events = self._reasoning.push(delta)
        return self._with_calls(events)

    def finish(self) -> list[Event]:
        """The text has ended: what was held back."""
        events = [] if self._reasoning is None else self._with_calls(self._reasoning.finish())
        return events if self._tools is None else [*events, *self._tools.finish()]

    def _with_calls(self, events: list[Event]) -> list[Event]:
        if self._tools is None:
            return events
        found: list[Event] = []
        for event in events:
            found += self._tools.push(event.text) if isinstance(event, ContentDelta) else [event]
        return found


def make_parser(
    tool_parser: str | None = None,
    reasoning_parser: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    inside_reasoning: bool | None = None,
) -> MessageParser:
    """A parser of one completion.

    Args:
        tool_parser: a name of `TOOL_PARSERS`; None leaves calls in the text.
        reasoning_parser: a name of `REASONING_PARSERS`; None leaves reasoning in the text.
        tools: OpenAI's tools or functions, whose schemas say what is a string where a family writes bare
            values.
        inside_reasoning: whether the prompt ended inside the reasoning (`ends_inside_reasoning`); None: as
            the models of the parser are used to.

    Raises:
        ConfigError: a name is not known.
    """
    check_parser_names(tool_parser, reasoning_parser)
    if tool_parser == HARMONY_TOOLS or reasoning_parser == HARMONY_REASONING:
        # One format holds both.
        return MessageParser(HarmonyStage(), None)
    reasoning = stage = None
    if reasoning_parser is not None:
        reasoning = ReasoningStage(REASONING_FORMATS[reasoning_parser], inside_reasoning)
    if tool_parser is not None:
        stage = ToolStage(TOOL_FORMATS[tool_parser], _schemas(tools or ()))
    return MessageParser(reasoning, stage)


def parse_message(
    text: str,
    tool_parser: str | None = None,
    reasoning_parser: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    inside_reasoning: bool | None = None,
) -> ParsedMessage:
    """Take a whole completion apart (`make_parser`)."""
    parser = make_parser(tool_parser, reasoning_parser, tools, inside_reasoning=inside_reasoning)
    return message_of([*parser.push(text), *parser.finish()])


def message_of(events: Iterable[Event]) -> ParsedMessage:
    """All events of a completion, joined."""
    content: list[str] = []
    reasoning: list[str] = []
    names: list[str] = []
    arguments: list[str] = []
    for event in events:
        match event:
            case ContentDelta(text):
                content.append(text)
            case ReasoningDelta(text):
                reasoning.append(text)
            case ToolCallStart(_, name):
                names.append(name)
                arguments.append("")
            case ToolCallArguments(index, text):
                arguments[index] += text
    calls = tuple(ToolCall(*each) for each in zip(names, arguments, strict=True))
    return ParsedMessage("".join(content), "".join(reasoning) or None, calls)


def ends_inside_reasoning(prompt: str, reasoning_parser: str | None) -> bool | None:
    """Whether a prompt (what the chat template made) leaves the reasoning open for the completion.

    None where that cannot be told: the parser's own habit decides.
    """
    form = REASONING_FORMATS.get(reasoning_parser or "")
    if form is None:
        return None
    tail = prompt.rstrip()
    if any(tail.endswith(start.rstrip()) for start in form.starts):
        return True
    if any(tail.endswith(end) for end in form.ends):
        return False
    return None


def check_parser_names(tool_parser: str | None, reasoning_parser: str | None) -> None:
    """Raises ConfigError for a name that no parser has."""
    for option, name, known in (
        ("tool_parser", tool_parser, TOOL_PARSERS),
        ("reasoning_parser", reasoning_parser, REASONING_PARSERS),
    ):
        if name is not None and name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"
            raise ConfigError(f"{option}={name!r} is no parser: {hint}")


def _schemas(tools: Sequence[Mapping[str, Any]]) -> Tools:
    """The schema of each tool's parameters, by its name."""
    schemas: dict[str, Mapping[str, Any]] = {}
    for tool in tools:
        function = tool.get("function", tool)
        if isinstance(function, Mapping) and isinstance(function.get("name"), str):
            parameters = function.get("parameters")
            schemas[function["name"]] = parameters if isinstance(parameters, Mapping) else {}
    return schemas
