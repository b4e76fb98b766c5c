"""Reads answers that a schema made calls of (`tool_choice` required or a name), as they grow.

named      {"city": "Paris"}                                         the arguments alone
required   [{"name": "get_weather", "arguments": {"city": "Paris"}}, ...]
"""

from __future__ import annotations

import json
import re
from typing import Any

from engine.parsers import ToolCallArguments, ToolCallStart

_HEAD = re.compile(r'\s*(?:\}\s*)?[\[,]\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*')


class NamedCall:
    """The whole text is the arguments of one call."""

    def __init__(self, name: str):
        self._name = name
        self._has_begun = False

    def push(self, delta: str) -> list[Any]:
        events: list[Any] = []
        if not self._has_begun:
            self._has_begun = True
            events.append(ToolCallStart(0, self._name))
        if delta:
            events.append(ToolCallArguments(0, delta))
        return events

    def finish(self) -> list[Any]:
        return [] if self._has_begun else self.push("")


class RequiredCalls:
    """An array of calls; what its schema did not get to write (cut by `max_tokens`) is given as it is."""

    def __init__(self) -> None:
        self._waiting = ""  # what has not been told from the next call's head
        self._num_calls = 0
        self._object: _ObjectEnd | None = None  # while the text is inside a call's arguments

    def push(self, delta: str) -> list[Any]:
        events: list[Any] = []
        self._waiting += delta
        while self._waiting:
            if self._object is None:
                head = _HEAD.match(self._waiting)
                if head is None:
                    break
                events.append(ToolCallStart(self._num_calls, json.loads(head[1])))
                self._num_calls += 1
                self._waiting = self._waiting[head.end() :]
                self._object = _ObjectEnd()
                continue
            end = self._object.find(self._waiting)
            inside = self._waiting[:end]
            events.append(ToolCallArguments(self._num_calls - 1, inside))
            self._waiting = self._waiting[len(inside) :]
            if end is not None:
                self._object = None
        return events

    def finish(self) -> list[Any]:
        return []


class _ObjectEnd:
    """Finds where a JSON object that comes in pieces ends."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._is_escaped = False

    def find(self, piece: str) -> int | None:
        """The position behind the object's last brace; None when it goes on."""
        for position, character in enumerate(piece):
            if self._is_escaped:
                self._is_escaped = False
            elif self._in_string:
                self._is_escaped = character == "\\"
                self._in_string = character != '"'
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return position + 1
        return None
