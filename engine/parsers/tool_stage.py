"""Takes tool calls out of text that grows."""

from __future__ import annotations

from engine.parsers.call_bodies import MAX_BODY_LEN, CallSyntaxError, Tools
from engine.parsers.events import ContentDelta, Event, ToolCall, ToolCallArguments, ToolCallStart
from engine.parsers.formats import ToolFormat
from engine.parsers.markers import first_marker, num_certain


class ToolStage:
    """Content goes on as soon as it is certain that no call begins in it; a call when it is whole.

    What is marked as a call and is none (its JSON is torn, its name is missing) is given back as content,
    markers included: nothing that the model wrote is lost. Space before and between calls is dropped.
    """

    def __init__(self, form: ToolFormat, tools: Tools):
        self._form = form
        self._tools = tools
        self._text = ""
        self._space = ""
        self._marker: str | None = None
        """The start of the call that `_text` is the inside of."""
        self._tried = 0
        """Up to here in `_text` no end is that of the call."""
        self._has_content = False
        self._num_calls = 0

    def push(self, text: str) -> list[Event]:
        self._text += text
        events: list[Event] = []
        while self._take(events):
            pass
        return events

    def finish(self) -> list[Event]:
        events: list[Event] = []
        if self._marker is not None:
            self._close(self._text, "", "", "", events)
        elif self._may_be_bare:
            text, self._text = self._text, ""
            calls = self._calls(text)
            # A message in JSON or brackets is a call only if it names a tool.
            if calls and all(call.name in self._tools for call in calls):
                self._emit_calls(calls, events)
            else:
                self._emit_content(text, events)
        else:
            self._emit_content(self._text, events)
        self._text = ""
        if self._space and not self._num_calls:
            events.append(ContentDelta(self._space))
        return events

    @property
    def _may_be_bare(self) -> bool:
        if not self._form.bare or self._has_content or self._num_calls or not self._tools:
            return False
        begin = self._text.lstrip()[:1]
        return begin == "" or begin in self._form.bare

    def _take(self, events: list[Event]) -> bool:
        """One step through the text. False when more of it has to come."""
        if self._marker is not None:
            return self._take_body(events)
        markers = (*self._form.starts, *self._form.around)
        found = first_marker(self._text, markers)
        if found is None:
            if self._may_be_bare and len(self._text) <= MAX_BODY_LEN:
                return False
            certain = num_certain(self._text, markers)
            self._emit_content(self._text[:certain], events)
            self._text = self._text[certain:]
            return False
        at, marker = found
        self._emit_content(self._text[:at], events)
        self._text = self._text[at + len(marker) :]
        if marker in self._form.starts:
            self._marker, self._tried = marker, 0
        return True

    def _take_body(self, events: list[Event]) -> bool:
        ends = (*self._form.ends, *self._form.starts)  # another start ends a call that was left open
        found = first_marker(self._text, ends, self._tried)
        if found is None:
            if len(self._text) > MAX_BODY_LEN:
                return self._close(self._text, "", "", "", events)
            # The marker may have begun in what is there.
            self._tried = max(0, len(self._text) - max(map(len, ends)) + 1)
            return False
        at, marker = found
        is_start = marker in self._form.starts
        rest = self._text[at:] if is_start else self._text[at + len(marker) :]
        return self._close(self._text[:at], marker, "" if is_start else marker, rest, events)

    def _close(self, body: str, marker: str, end: str, rest: str, events: list[Event]) -> bool:
        """The call's text is `body`, if it is one; behind it comes `marker`, of which `end` belongs to it.
        False when it may be whole only with more text."""
        start = self._marker or ""
        try:
            calls = self._form.calls(body, self._tools) if len(body) <= MAX_BODY_LEN else []
        except CallSyntaxError as error:
            if error.is_cut and marker:  # an end that is inside a string
                self._tried = len(body) + len(marker)
                return True
            calls = []
        self._marker, self._text = None, rest
        if calls:
            self._emit_calls(calls, events)
        else:
            self._emit_content(start + body + end, events)
        return bool(rest)

    def _calls(self, text: str) -> list[ToolCall]:
        try:
            return self._form.calls(text, self._tools)
        except CallSyntaxError:
            return []

    def _emit_calls(self, calls: list[ToolCall], events: list[Event]) -> None:
        self._space = ""
        for call in calls:
            events.append(ToolCallStart(self._num_calls, call.name))
            events.append(ToolCallArguments(self._num_calls, call.arguments))
            self._num_calls += 1

    def _emit_content(self, text: str, events: list[Event]) -> None:
        """Space at its end waits: it is dropped before a call."""
        text = self._space + text
        shown = text.rstrip()
        self._space = text[len(shown) :]
        if shown:
            self._has_content = True
            events.append(ContentDelta(shown))
