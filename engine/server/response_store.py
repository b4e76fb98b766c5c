"""The responses that were stored, for `previous_response_id` and `GET /v1/responses/{id}`."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.server.responses_answer import ResponseAnswer


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """An answer, and the conversation up to and with it, as chat templates read it, without instructions."""

    answer: ResponseAnswer
    conversation: Sequence[Mapping[str, Any]]
    owner: str | None
    """The key it was asked for with; others cannot see it."""


class ResponseStore:
    """At most `max_count` responses and `max_bytes` of them; the least recently used are forgotten.

    Of one event loop: not thread-safe. A single response over `max_bytes` is not kept.
    """

    def __init__(self, max_count: int, max_bytes: int):
        self._max_count = max_count
        self._max_bytes = max_bytes
        self._kept: OrderedDict[str, tuple[StoredResponse, int]] = OrderedDict()
        self.num_bytes = 0
        """Of the answers and conversations that are kept, as JSON."""

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def is_off(self) -> bool:
        return self._max_count == 0 or self._max_bytes == 0

    def put(self, stored: StoredResponse) -> None:
        self.remove(stored.answer.id, stored.owner)
        size = len(stored.answer.model_dump_json()) + len(json.dumps(stored.conversation))
        self._kept[stored.answer.id] = (stored, size)
        self.num_bytes += size
        while self._kept and (len(self._kept) > self._max_count or self.num_bytes > self._max_bytes):
            _, (_, size) = self._kept.popitem(last=False)
            self.num_bytes -= size

    def get(self, response_id: str, owner: str | None) -> StoredResponse | None:
        """One of this owner's; None for what was never stored, is forgotten, or is somebody else's."""
        stored, _ = self._kept.get(response_id, (None, 0))
        if stored is None or stored.owner != owner:
            return None
        self._kept.move_to_end(response_id)
        return stored

    def remove(self, response_id: str, owner: str | None) -> bool:
        """Whether there was one of this owner's."""
        if self.get(response_id, owner) is None:
            return False
        _, size = self._kept.pop(response_id)
        self.num_bytes -= size
        return True
