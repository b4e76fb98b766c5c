"""The channels of gpt-oss (OpenAI's "harmony" format), in text that grows.

<|channel|>analysis<|message|>…<|end|>
<|start|>assistant<|channel|>commentary to=functions.f <|message|>{…}<|call|>
"""

from __future__ import annotations

import re

from engine.parsers.events import ContentDelta, Event, ReasoningDelta, ToolCallArguments, ToolCallStart
from engine.parsers.markers import first_marker, may_begin_with, num_certain

_BEGINS = ("<|start|>", "<|channel|>")
_ENDS = ("<|end|>", "<|call|>", "<|return|>", *_BEGINS)
_MESSAGE = "<|message|>"


class HarmonyStage:
    """Channel "analysis" is reasoning, a message to a recipient is a call, the rest is the answer.

    Text that does not begin with a header is an answer.
    """

    def __init__(self) -> None:
        self._text = ""
        self._is_header: bool | None = None
        """None: nothing came yet."""
        self._kind = "content"
        self._num_calls = 0
        self._kinds_begun: set[str] = set()

    def push(self, text: str) -> list[Event]:
        self._text += text
        events: list[Event] = []
        if self._is_header is None:
            if may_begin_with(self._text, _BEGINS) and not self._text.startswith(_BEGINS):
                return []
            self._is_header = self._text.startswith(_BEGINS)
        while self._take(events):
            pass
        return events

    def finish(self) -> list[Event]:
        events: list[Event] = []
        if not self._is_header:
            self._emit(self._text, events)
        self._text = ""
        return events

    def _take(self, events: list[Event]) -> bool:
        if self._is_header:
            head, marker, rest = self._text.partition(_MESSAGE)
            if not marker:
                return False
            self._text, self._is_header = rest, False
            self._open(head, events)
            return True
        found = first_marker(self._text, _ENDS)
        if found is None:
            certain = num_certain(self._text, _ENDS)
            self._emit(self._text[:certain], events)
            self._text = self._text[certain:]
            return False
        at, marker = found
        self._emit(self._text[:at], events)
        self._text = self._text[at if marker in _BEGINS else at + len(marker) :]
        self._is_header = True
        return True

    def _open(self, head: str, events: list[Event]) -> None:
        """A message begins; `head` is its header."""
        recipient = re.search(r"\bto=([\w.\-]+)", head)
        channel = re.search(r"<\|channel\|>\s*(\w+)", head)
        if recipient is not None:
            self._kind = "call"
            events.append(ToolCallStart(self._num_calls, recipient[1].removeprefix("functions.")))
            self._num_calls += 1
            return
        self._kind = "reasoning" if channel is not None and channel[1] == "analysis" else "content"
        if self._kind in self._kinds_begun:  # a second message of the kind, set off from the first
            self._emit("\n", events)

    def _emit(self, text: str, events: list[Event]) -> None:
        if not text:
            return
        if self._kind == "call":
            events.append(ToolCallArguments(self._num_calls - 1, text))
            return
        self._kinds_begun.add(self._kind)
        events.append(ReasoningDelta(text) if self._kind == "reasoning" else ContentDelta(text))
