"""Takes the reasoning out of text that grows."""

from __future__ import annotations

from engine.parsers.events import ContentDelta, Event, ReasoningDelta
from engine.parsers.formats import ReasoningFormat
from engine.parsers.markers import first_marker, may_begin_with, num_certain


class ReasoningStage:
    """The reasoning comes first and once; what looks like a start behind it is part of the answer.

    Space around the reasoning, and before the answer that follows it, is dropped.
    """

    def __init__(self, form: ReasoningFormat, is_inside: bool | None = None):
        """is_inside: the prompt ended inside the reasoning, or it did not (None: as the format says)."""
        self._form = form
        self._text = ""
        self._space = ""
        self._has_begun = False
        self._is_inside = form.begins_inside if is_inside is None else is_inside
        self._state = "start"
        """"start", "inside", "behind" (space before the answer) or "answer"."""

    def push(self, text: str) -> list[Event]:
        self._text += text
        events: list[Event] = []
        if self._state == "start":
            self._begin()
        if self._state == "inside":
            self._think(events)
        if self._state == "behind" and self._text.lstrip():
            self._text, self._state = self._text.lstrip(), "answer"
        if self._state == "answer" and self._text:
            events.append(ContentDelta(self._text))
            self._text = ""
        return events

    def finish(self) -> list[Event]:
        events: list[Event] = []
        if self._state == "inside":
            self._emit(self._text, events)
        elif self._text and self._state == "start":
            # Nothing but the beginning of a marker, or space.
            if self._is_inside:
                self._emit(self._text, events)
            else:
                events.append(ContentDelta(self._text))
        self._text = ""
        return events

    def _begin(self) -> None:
        text = self._text.lstrip()
        found = next(
            (s for s in sorted(self._form.starts, key=len, reverse=True) if text.startswith(s)), None
        )
        if found is not None:
            self._text, self._state = text[len(found) :], "inside"
        elif not may_begin_with(text, self._form.starts):
            self._state = "inside" if self._is_inside else "answer"

    def _think(self, events: list[Event]) -> None:
        found = first_marker(self._text, self._form.ends)
        if found is not None:
            at, marker = found
            self._emit(self._text[:at], events)
            self._text, self._state = self._text[at + len(marker) :], "behind"
            return
        certain = num_certain(self._text, self._form.ends)
        self._emit(self._text[:certain], events)
        self._text = self._text[certain:]

    def _emit(self, text: str, events: list[Event]) -> None:
        text = self._space + text
        if not self._has_begun:
            text = text.lstrip()
        shown = text.rstrip()
        self._space = text[len(shown) :]
        if shown:
            self._has_begun = True
            events.append(ReasoningDelta(shown))
