"""How a completion's text is read as a message: its tool calls, its reasoning, and the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.errors import ConfigError

if TYPE_CHECKING:
    from engine.parsers import ParsedMessage


@dataclass(frozen=True, slots=True)
class Parsing:
    """The parsers of `engine.parsers` that read a request's completions, by name, and its tools."""

    tool_parser: str | None
    reasoning_parser: str | None
    tools: tuple[Mapping[str, Any], ...] | None = None
    stops_in_reasoning: bool = False
    """Whether a stop string inside the reasoning stops."""

    @classmethod
    def choose(
        cls,
        tool_parser: str | None,
        reasoning_parser: str | None,
        *,
        chat_template: str | None,
        model_type: str,
        stops_in_reasoning: bool,
    ) -> Parsing | None:
        """Parsing with these, "auto" being those of the model's family; None where there is neither.

        Raises ConfigError for a name that no parser has.
        """
        if tool_parser is None and reasoning_parser is None:
            return None
        from engine.parsers import REASONING_PARSERS, TOOL_PARSERS, choose_parsers

        own_tools, own_reasoning = choose_parsers(chat_template, model_type)
        tool_parser = own_tools if tool_parser == "auto" else tool_parser
        reasoning_parser = own_reasoning if reasoning_parser == "auto" else reasoning_parser
        for option, name, known in (
            ("tool_parser", tool_parser, TOOL_PARSERS),
            ("reasoning_parser", reasoning_parser, REASONING_PARSERS),
        ):
            if name is not None and name not in known:
                raise ConfigError(
                    f"engine.{option}={name!r}: choose auto or one of {', '.join(sorted(known))}"
                )
        if tool_parser is None and reasoning_parser is None:
            return None
        return cls(tool_parser, reasoning_parser, None, stops_in_reasoning)

    def with_tools(self, tools: Sequence[Mapping[str, Any]] | None) -> Parsing:
        given = None if tools is None else tuple(tools)
        return Parsing(self.tool_parser, self.reasoning_parser, given, self.stops_in_reasoning)

    def parse(self, text: str) -> ParsedMessage:
        """The message that a completion's text is, as far as it has come."""
        from engine.parsers import parse_message

        return parse_message(text, self.tool_parser, self.reasoning_parser, self._tools)

    def stop_gate(self) -> Callable[[str], bool] | None:
        """Told each piece of a text in turn, says whether the reasoning is over by its end; None where stop
        strings count everywhere."""
        if self.reasoning_parser is None or self.stops_in_reasoning:
            return None
        from engine.parsers import ReasoningDelta, make_parser

        parser = make_parser(None, self.reasoning_parser, None)
        is_over = False

        def is_over_after(piece: str) -> bool:
            nonlocal is_over
            if not is_over:
                is_over = any(not isinstance(event, ReasoningDelta) for event in parser.push(piece))
            return is_over

        return is_over_after

    @property
    def _tools(self) -> list[dict[str, Any]] | None:
        return None if self.tools is None else [dict(tool) for tool in self.tools]
