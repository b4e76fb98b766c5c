"""A circuit breaker: who failed several times in a row is left alone for a while, then tried with one
request."""

from __future__ import annotations

from collections.abc import Callable


class CircuitBreaker:
    """Closed (requests pass), open (none do) or half open (one does, as a trial).

    After `failures_to_open` failures in a row it opens for `backoff_s`, then lets one request pass. If that
    fails it opens for twice as long as before, up to `max_backoff_s`; a success closes it. `clock`: seconds
    that do not go back.
    """

    def __init__(
        self, failures_to_open: int, backoff_s: float, max_backoff_s: float, clock: Callable[[], float]
    ):
        self._failures_to_open = failures_to_open
        self._first_backoff_s = backoff_s
        self._max_backoff_s = max_backoff_s
        self._clock = clock
        self._num_failures = 0
        self._backoff_s = backoff_s
        self._open_until: float | None = None
        self._in_trial = False

    @property
    def state(self) -> str:
        if self._open_until is None:
            return "closed"
        return "open" if self._clock() < self._open_until or self._in_trial else "half_open"

    @property
    def allows(self) -> bool:
        return self.state != "open"

    def begin(self) -> None:
        """A request is sent. Half open, it is the trial, and no other passes until it ends."""
        if self.state == "half_open":
            self._in_trial = True

    def succeeded(self) -> None:
        self._num_failures = 0
        self._backoff_s = self._first_backoff_s
        self._open_until = None
        self._in_trial = False

    def failed(self) -> None:
        self._num_failures += 1
        if self._open_until is not None:
            if not self._in_trial:
                return  # sent before it opened
            self._backoff_s = min(self._max_backoff_s, self._backoff_s * 2)
        elif self._num_failures < self._failures_to_open:
            return
        self._open_until = self._clock() + self._backoff_s
        self._in_trial = False

    def cancelled(self) -> None:
        """A request ended without telling anything about its upstream: another may be the trial."""
        self._in_trial = False
