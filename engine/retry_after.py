"""When somebody who was turned away should come again."""

from __future__ import annotations

import math

_LONGEST_S = 60
_WEIGHT = 0.1
"""Of the last gap between two ends in the mean."""


class RetryAfter:
    """Suggests how long to wait until a request has ended, from the pace at which requests end."""

    def __init__(self) -> None:
        self._last_end: float | None = None
        self._mean_gap = 0.0
        self._num_refused = 0

    def end(self, now: float) -> None:
        """A request has ended; monotonic seconds."""
        if self._last_end is not None:
            gap = now - self._last_end
            self._mean_gap = gap if self._mean_gap == 0.0 else self._mean_gap + _WEIGHT * (gap - self._mean_gap)
        self._last_end = now
        self._num_refused = 0

    def refuse(self) -> int:
        """One more is turned away: whole seconds from 1 to 60, later for each since a request last ended, so
        that they do not all come back at once."""
        self._num_refused += 1
        return min(_LONGEST_S, max(1, math.ceil(self._mean_gap * self._num_refused)))
