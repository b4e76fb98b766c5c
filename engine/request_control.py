"""What can be done to requests from outside while they are unfinished: look, end, pause, resume."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from engine.drawn import DrawnTokens
from engine.duplicates import as_if_its_own
from engine.errors import ConfigError
from engine.observer import Observed
from engine.outputs import RequestOutput, ended_early
from engine.seat_watch import SeatWatch

if TYPE_CHECKING:
    from engine.duplicates import Duplicates
    from engine.in_flight import InFlight
    from engine.request import Request
    from engine.request_group import RequestGroup


class RequestControl(Observed):
    """The part of an `Engine` that acts on unfinished requests. Its thread is the engine's."""

    _groups: dict[str, RequestGroup]
    _duplicates: Duplicates
    _scheduler: Any
    _growing: set[Request]
    _ready: list[RequestOutput]
    _in_flight: InFlight | None
    _is_paused: bool

    def _take_back(self, step: InFlight) -> list[RequestOutput]:
        raise NotImplementedError

    # -- one request -------------------------------------------------------------------------------

    def abort_request(self, request_id: str) -> bool:
        """Drop a request and free its pages; no output comes of it. False when it is not unfinished."""
        is_dropped = self._drop(request_id)
        if is_dropped:
            self._tell_aborted(request_id)
        return is_dropped

    def _drop(self, request_id: str) -> bool:
        if request_id in self._duplicates:
            self._duplicates.leave(request_id)
            return True
        group = self._groups.pop(request_id, None)
        if group is None:
            return False
        heir = self._duplicates.abdicate(request_id)
        if heir is not None:
            group.hand_over(heir.request_id, heir.prompt, heir.arrival_time)
            self._groups[heir.request_id] = group
            self._scheduler.rename(request_id, heir.request_id)
            return True
        self._growing.difference_update(self._scheduler.abort(request_id, time.monotonic()))
        return True

    def end_request(self, request_id: str, reason: str) -> RequestOutput | None:
        """End a request as it stands and free its pages; its output, in which samples that were unfinished
        have this finish reason. None when it is not unfinished."""
        leader_id, follower = request_id, None
        if request_id in self._duplicates:
            leader_id, follower = self._duplicates.followed(request_id)
        group = self._groups.get(leader_id)
        if group is None:
            return None
        output = ended_early(group.output(""), reason, time.monotonic())
        self._drop(request_id)
        if follower is not None:
            output = as_if_its_own(output, follower)
        self._tell_finished(output)
        return output

    def request_group(self, request_id: str) -> RequestGroup | None:
        """What is known of an unfinished request's samples, to be read between two steps only; None when it
        is not unfinished, or is given another one's result."""
        return self._groups.get(request_id)

    def watch_seats(self) -> list[SeatWatch]:
        """What tells, between two steps, which tokens the running requests have drawn; one a replica."""
        return [SeatWatch(table) for table in self._scheduler.tables]

    def drawn_tokens(self, request_id: str) -> tuple[DrawnTokens, ...] | None:
        """What an engine to come can go on from, a sample each (`add_request`); None for a request that is
        not unfinished, or is given another one's result."""
        group = self._groups.get(request_id)
        return None if group is None else tuple(map(DrawnTokens.of, group.samples()))

    # -- all of them -------------------------------------------------------------------------------

    def pause(self) -> None:
        """Stop stepping and free every page that requests hold; what they have drawn is kept.

        Until `resume`, `step` computes nothing and requests that come wait. Pausing twice is pausing once.
        """
        if self._is_paused:
            return
        self._is_paused = True
        step, self._in_flight = self._in_flight, None
        if step is not None:
            self._ready += self._take_back(step)
        self._scheduler.preempt_all()

    def resume(self) -> None:
        """Go on after `pause`: what requests lack of keys and values is computed anew (or found in the prefix
        cache), and each comes out as if there had been no pause."""
        self._is_paused = False

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        return bool(self._ready) or (bool(self._groups) and not self._is_paused)

    @property
    def is_paused(self) -> bool:
        return self._is_paused

    def _check_runs(self) -> None:
        """Raises ConfigError when it would have to be waited for `resume`, which only the caller can call."""
        if self._is_paused:
            raise ConfigError("the engine is paused: call resume() before asking for whole outputs")
