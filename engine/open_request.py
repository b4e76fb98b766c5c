"""A request as the asynchronous front knows it, from its submission to its last output or its error.

Each field has one writer: who submits it, the step thread, or the text thread (engine/async_engine.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from engine.outputs import RequestOutput
from engine.request_group import ends_with_hidden_token

if TYPE_CHECKING:
    from engine.request import Request
    from engine.request_group import RequestGroup
    from engine.text_thread import GrowingTexts


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
    """It is to end as soon as the step thread has it."""
    group: RequestGroup | None = None
    """Of a stream, once the step thread has queued it."""
    num_shown: list[int] = field(default_factory=list)
    """The step thread's: tokens of each sample that it has passed on."""
    texts: GrowingTexts | None = None
    """The text thread's: what a stream has shown."""

    def take_growth(self) -> Growth | None:
        """What the samples have drawn since the last time; None when nothing. Between two steps only."""
        assert self.group is not None
        parts: list[SampleGrowth] = []
        for index, request in enumerate(self.group.requests):
            count = request.num_tokens
            if count > self.num_shown[index]:
                parts.append(SampleGrowth.of(request, self.num_shown[index]))
                self.num_shown[index] = count
        return Growth(self, parts) if parts else None


class SampleGrowth(NamedTuple):
    """New tokens of one sample."""

    index: int
    token_ids: list[int]
    num_hidden: int
    """The last ones of these that are no part of its text: 1 where it ended with such a token."""
    finish_reason: str | None
    stop_reason: int | str | None

    @classmethod
    def of(cls, request: Request, start: int) -> SampleGrowth:
        """A sample's tokens from position `start` on."""
        # A stop string ends in a token of the text.
        hides = ends_with_hidden_token(request) and not isinstance(request.stop_reason, str)
        token_ids = request.token_ids(start, request.num_tokens)
        return cls(request.sample_index, token_ids, int(hides), request.finish_reason, request.stop_reason)


class Growth(NamedTuple):
    """A stream has grown."""

    request: OpenRequest
    samples: list[SampleGrowth]


class Ended(NamedTuple):
    """A request's last output."""

    request: OpenRequest
    output: RequestOutput


class Failed(NamedTuple):
    """A request comes to nothing."""

    request: OpenRequest
    error: Exception


Event = Growth | Ended | Failed
