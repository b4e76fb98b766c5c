"""What each API key of a server has used, as metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from engine.monitoring.definitions import Definition, Sample

LABELS = ("key", "label")
_READ = {
    "requests": Definition(
        "api_key_requests_total", "counter", "Requests made with a key, by its id.", LABELS
    ),
    "prompt_tokens": Definition(
        "api_key_prompt_tokens_total", "counter", "Prompt tokens of requests made with a key.", LABELS
    ),
    "completion_tokens": Definition(
        "api_key_completion_tokens_total", "counter", "Tokens generated for requests made with a key.", LABELS
    ),
}
KEY_METRICS = tuple(_READ.values())


class KeyUsage:
    """An `engine.monitoring.metrics.Source` over a `KeyRing`'s `stats`: by key id, its label and totals.

    Ids and labels are exposed, keys never.
    """

    definitions = KEY_METRICS

    def __init__(self, stats: Callable[[], Mapping[str, Mapping[str, Any]]]):
        self._stats = stats

    def samples(self) -> Iterator[Sample]:
        for key_id, totals in self._stats().items():
            for name, definition in _READ.items():
                yield Sample(definition, (key_id, str(totals.get("label") or "")), totals[name])

    def facts(self) -> Mapping[str, str]:
        return {"API keys": f"{len(self._stats()):,}"}
