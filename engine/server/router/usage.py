"""The tokens of an answer, read as it passes through a router, so that its key's quotas hold there too."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

TAIL_BYTES = 16 << 10
_PROMPT = re.compile(rb'"(?:prompt|input)_tokens"\s*:\s*(\d{1,18})')
_COMPLETION = re.compile(rb'"(?:completion|output)_tokens"\s*:\s*(\d{1,18})')
_EVENT_END = re.compile(rb"\r?\n\r?\n")
_NO_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*\]')
_STREAMS_WITH_OPTIONS = ("/v1/chat/completions", "/v1/completions")


class UsageReader:
    """Finds the usage at the end of an answer, a JSON object or events, in its last 16 KiB.

    Text that a model wrote cannot pass for it: inside a JSON string its quotes are escaped.
    """

    def __init__(self) -> None:
        self._tail = b""
        self._num_events = 0

    def feed(self, chunk: bytes) -> None:
        self._tail = (self._tail + chunk)[-TAIL_BYTES:]
        self._num_events += chunk.count(b"\n\n")

    def tokens(self) -> tuple[int, int]:
        """Prompt and completion tokens. Of a stream that was broken off, which does not say: a token an
        event."""
        prompt, completion = _PROMPT.findall(self._tail), _COMPLETION.findall(self._tail)
        if not prompt:
            return 0, self._num_events
        return int(prompt[-1]), int(completion[-1]) if completion else 0


class UsageEventFilter:
    """Takes the event that only holds the usage out of a stream of events whose client did not ask for it.

    Events pass on when they are whole.
    """

    def __init__(self) -> None:
        self._begun = b""

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """The whole events up to the end of `chunk`, without that one."""
        self._begun += chunk
        start = 0
        for end in _EVENT_END.finditer(self._begun):
            event = self._begun[start : end.end()]
            start = end.end()
            if not (b'"usage"' in event and _NO_CHOICES.search(event)):
                yield event
        self._begun = self._begun[start:]

    def rest(self) -> bytes:
        """What came after the last whole event."""
        return self._begun


def with_usage_asked(path: str, body: Mapping[str, Any]) -> dict[str, Any] | None:
    """`body` with its stream told to end with the usage; None where it does so anyway or cannot be told."""
    options = body.get("stream_options") or {}
    if path not in _STREAMS_WITH_OPTIONS or body.get("stream") is not True or not isinstance(options, dict):
        return None
    if options.get("include_usage") is True:
        return None
    return {**body, "stream_options": {**options, "include_usage": True}}
