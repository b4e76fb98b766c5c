"""A peer for the tests, with no model: it continues a prompt by counting on from its last token.

Its settings: `about`, `wrong_from` (a row's tokens are one too large from this place on, or null), `fail`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jobs.bench.peers.serving import Generated, Request, Sampling, serve


class CountingPeer:
    def __init__(self, settings: dict[str, Any]):
        print("a library says something on the standard output")
        if settings.get("fail"):
            raise ValueError("no such model")
        self._settings = settings

    @property
    def about(self) -> str:
        return self._settings["about"]

    def prepare(self, requests: Sequence[Request], sampling: Sampling) -> dict[str, Any]:
        return {"warmed_up_on": len(requests)}

    def generate(self, requests: Sequence[Request], sampling: Sampling, plan: dict[str, Any]) -> Generated:
        wrong_from = self._settings.get("wrong_from")
        rows = []
        for request in requests:
            right = [(request.prompt[-1] + 1 + step) % 100 for step in range(request.max_tokens)]
            wrong = [token + (wrong_from is not None and at >= wrong_from) for at, token in enumerate(right)]
            rows += [wrong] * sampling.n
        return Generated(rows, {"plan": plan})


if __name__ == "__main__":
    serve(CountingPeer)
