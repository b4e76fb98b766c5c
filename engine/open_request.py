"""A request as the asynchronous front knows it, from its submission to its last output or its error.

Each field has one writer: who submits it, the step thread, or any thread where it is set once
(engine/async_engine.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from engine.outputs import RequestOutput
from engine.request_group import ends_with_hidden_token

if TYPE_CHECKING:
    from engine.request import Request
    from engine.request_group import RequestGroup
    from engine.seat_watch import Drawn


@dataclass(slots=True, eq=False)
class OpenRequest:
    """One end comes of it, an output that is finished or an error, unless it was dropped before."""

    request_id: str
    on_output: Callable[[RequestOutput], None]
    on_error: Callable[[Exception], None]
    stream: bool
    tenant: str | None
    prompt: str | None
    deadline: float | None
    """Monotonic seconds."""

    is_dropped: bool = False
    """Whoever waited for it has gone: nothing is delivered any more. Set once, by any thread."""
    is_aborted: bool = False
    """It is to end as soon as the step thread has it. Set once, by any thread."""


class Opened(NamedTuple):
    """A stream has been queued in the engine."""

    request: OpenRequest
    group: RequestGroup


class SampleEnd(NamedTuple):
    """A sample of a stream has ended, others of it have not."""

    request: OpenRequest
    sample: Request
    token_ids: list[int]
    """Its output."""
    num_hidden: int
    """The last ones of these that are no part of its text: 1 where it ended with such a token."""
    finish_reason: str | None
    stop_reason: int | str | None

    @classmethod
    def of(cls, request: OpenRequest, sample: Request) -> SampleEnd:
        # A stop string ends in a token of the text.
        hides = ends_with_hidden_token(sample) and not isinstance(sample.stop_reason, str)
        token_ids, reason = sample.output_token_ids, sample.finish_reason
        return cls(request, sample, token_ids, int(hides), reason, sample.stop_reason)


class Growth(NamedTuple):
    """What was drawn since the last time, for streams and others, and samples of streams that have ended."""

    drawn: list[Drawn]
    ends: list[SampleEnd]


class Ended(NamedTuple):
    """A request's last output."""

    request: OpenRequest
    output: RequestOutput


class Failed(NamedTuple):
    """A request comes to nothing."""

    request: OpenRequest
    error: Exception


class Dropped(NamedTuple):
    """Nobody waits for a stream any more, and it has left the engine."""

    request: OpenRequest


Event = Opened | Growth | Ended | Failed | Dropped
