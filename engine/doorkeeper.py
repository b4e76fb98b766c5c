"""Who is let in where a bounded number of requests may be unfinished, and when others should come again."""

from __future__ import annotations

import math
from collections import Counter

from engine.errors import Overloaded

_LONGEST_S = 60
_WEIGHT = 0.1
"""Of the last gap between two ends in the mean."""


class Doorkeeper:
    """Counts unfinished requests by tenant.

    A tenant with less than its equal share of `max_waiting` is let in even when that many are there, so that
    nobody shuts the others out. Of k tenants there are then at most `max_waiting` x (1 + 1/2 + ... + 1/k).

    max_waiting: how many there may be; None: any number.
    """

    def __init__(self, max_waiting: int | None):
        self._max_waiting = max_waiting
        self._inside: Counter[str | None] = Counter()
        self._num_inside = 0
        self._last_end: float | None = None
        self._mean_gap = 0.0
        self._num_refused = 0

    def enter(self, tenant: str | None) -> None:
        """Raises Overloaded for one that has to stay outside."""
        most, inside = self._max_waiting, self._inside
        if most is not None and self._num_inside >= most:
            num_tenants = len(inside) + (tenant not in inside)
            if inside[tenant] >= max(1, most // num_tenants) or num_tenants == 1:
                raise Overloaded(most, self._retry_after())
        inside[tenant] += 1
        self._num_inside += 1

    def leave(self, tenant: str | None, now: float) -> None:
        """A request has ended; monotonic seconds."""
        self._num_inside -= 1
        self._inside[tenant] -= 1
        if not self._inside[tenant]:
            del self._inside[tenant]
        if self._last_end is not None:
            gap = now - self._last_end
            self._mean_gap += (_WEIGHT if self._mean_gap else 1.0) * (gap - self._mean_gap)
        self._last_end = now
        self._num_refused = 0

    def _retry_after(self) -> int:
        """Whole seconds until a request has probably ended, at the pace at which they do; more for each that
        was refused since, so that they do not all come back at once."""
        self._num_refused += 1
        return min(_LONGEST_S, max(1, math.ceil(self._mean_gap * self._num_refused)))
