"""What each step took, kept until it is asked for."""

from __future__ import annotations

from collections import deque

MAX_STEPS = 1 << 16


class StepTimes:
    """Seconds and sequences of the steps since they were last taken: of the last `MAX_STEPS`, so that an
    engine whose steps nobody asks for, such as a server's, does not grow by them.
    """

    def __init__(self, max_steps: int = MAX_STEPS) -> None:
        self._seconds: deque[float] = deque(maxlen=max_steps)
        self._occupancy: deque[int] = deque(maxlen=max_steps)

    def add(self, seconds: float, num_sequences: int) -> None:
        self._seconds.append(seconds)
        self._occupancy.append(num_sequences)

    def take(self) -> tuple[tuple[float, ...], tuple[int, ...]]:
        """Both, oldest step first; afterwards there are none."""
        seconds, occupancy = tuple(self._seconds), tuple(self._occupancy)
        self._seconds.clear()
        self._occupancy.clear()
        return seconds, occupancy
