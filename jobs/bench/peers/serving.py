"""What every peer's process does: one JSON job a line in, one JSON answer a line out.

    {"do": "load", ...settings of the peer}              -> {"about": versions and options, in words}
    {"do": "prepare", "requests", "sampling"}            -> {"plan": what the peer found best, anything}
    {"do": "run", "requests", "sampling", "plan"}        -> {"seconds", "token_ids", "details"}

This runs in the peer's own environment, so it imports nothing but the standard library.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt to be continued by `max_tokens` tokens, or fewer where end-of-sequence is honoured."""

    index: int
    prompt: Sequence[int]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Sampling:
    """How all requests of a workload are sampled; temperature 0 is greedy."""

    n: int
    temperature: float
    ignore_eos: bool
    seed: int


@dataclass(frozen=True, slots=True)
class Generated:
    """The new token ids of each request's samples, request after request, and what else is to be told."""

    token_ids: list[list[int]]
    details: dict[str, Any] = field(default_factory=dict)


class Peer(Protocol):
    """An engine with the model loaded."""

    @property
    def about(self) -> str: ...

    def prepare(self, requests: Sequence[Request], sampling: Sampling) -> dict[str, Any]:
        """Reach the speed a long job has: warm up, and choose what is to be chosen for such requests."""
        ...

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, plan: dict[str, Any]
    ) -> Generated: ...


def serve(load: Callable[[dict[str, Any]], Peer]) -> None:
    """Answer jobs until the standard input ends. `load` gets the settings of the first one."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    # Whatever a library prints, from C++ too, must not mix with the answers.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    peer: Peer | None = None
    for line in sys.stdin:
        job = json.loads(line)
        requests = [Request(i, prompt, num) for i, (prompt, num) in enumerate(job.get("requests", []))]
        sampling = Sampling(**job["sampling"]) if "sampling" in job else None
        answer: dict[str, Any]
        if job["do"] == "load":
            peer = load({key: value for key, value in job.items() if key != "do"})
            answer = {"about": peer.about}
        elif peer is None or sampling is None:
            raise RuntimeError("the first job must be 'load', and the others must say how to sample")
        elif job["do"] == "prepare":
            answer = {"plan": peer.prepare(requests, sampling)}
        else:
            started = time.perf_counter()
            generated = peer.generate(requests, sampling, job["plan"])
            seconds = time.perf_counter() - started
            answer = {
                "seconds": seconds,
                "token_ids": generated.token_ids,
                "details": generated.details,
            }
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
