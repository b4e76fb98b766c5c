"""What one more token in a step costs, learnt from the steps themselves."""

from __future__ import annotations

MEMORY = 0.98
"""What a step counts for after another one; about fifty count together."""
_OUTLIER = 4.0
"""A step this many times slower than expected was held up by something else."""


class StepCosts:
    """Seconds of a step as a line over its tokens, by least squares over the last steps."""

    def __init__(self) -> None:
        self._weight = self._mean_tokens = self._mean_seconds = 0.0
        self._spread = self._slope_sum = 0.0  # sums of squares and of products about the means

    def note(self, num_tokens: int, seconds: float) -> None:
        """A step computed so many tokens and drew behind each of them."""
        if self._weight > 5:
            seconds = min(seconds, _OUTLIER * self._mean_seconds)
        for name in ("_weight", "_spread", "_slope_sum"):
            setattr(self, name, getattr(self, name) * MEMORY)
        self._weight += 1
        off_tokens, off_seconds = num_tokens - self._mean_tokens, seconds - self._mean_seconds
        self._mean_tokens += off_tokens / self._weight
        self._mean_seconds += off_seconds / self._weight
        self._spread += off_tokens * (num_tokens - self._mean_tokens)
        self._slope_sum += off_tokens * (seconds - self._mean_seconds)

    def share(self, num_tokens: int) -> float | None:
        """The cost of one token more in a step of `num_tokens`, as a share of what each of them costs: 0
        where it is free, 1 where tokens cost the same alone. None as long as all steps had the same size.

        A draft pays where its tokens are accepted at a higher rate than this.
        """
        if self._weight < 2 or self._spread < 1e-3 * self._weight:
            return None
        slope = max(0.0, self._slope_sum / self._spread)
        seconds = self._mean_seconds + slope * (num_tokens - self._mean_tokens)
        return min(1.0, slope * num_tokens / seconds) if seconds > 0 else 1.0
