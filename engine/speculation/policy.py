"""When a draft pays. It changes how fast outputs come, never what they are.

With R rows in a step that takes t(R) seconds, drafting D tokens of which A are accepted gives (R + A) tokens
in t(R + D). With t a line, that is more a second where A / D is above the share that one token more costs of
what a token costs in that step (`StepCosts.share`). On a CPU with few rows the weights are read anyway and a
token more is nearly free; with hundreds of rows it costs nearly as much as any.

`Always` drafts whatever there is. `Measured` drafts where that has paid lately, and else looks again from
time to time, with a few tokens: while it rests, steps overlap and nothing is looked up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from engine.speculation.costs import StepCosts

TRIAL_STEPS = 8
TRIAL_DRAFT_LEN = 2
MIN_REST, MAX_REST = 64, 1024
"""Steps between two trials; each that fails doubles them."""
MIN_GAIN = 0.02
"""What drafts must save, in steps: below this, that planning waits for tokens costs more."""
_WARM_UP = 16
"""Steps over which the gain is averaged."""


@dataclass(slots=True)
class Acceptance:
    """Drafted tokens that were looked at, those up to the first that was wrong, and those that were right;
    the latest count most."""

    looked_at: float = 0.0
    right: float = 0.0

    def note(self, num_drafted: int, num_accepted: int, memory: float) -> None:
        self.fade(memory)
        self.right += num_accepted
        self.looked_at += num_accepted + (num_accepted < num_drafted)

    def fade(self, memory: float) -> None:
        self.right *= memory
        self.looked_at *= memory

    def rate(self, prior: float) -> float:
        """The chance of the next drafted token; `prior` counts as four that were looked at."""
        return (self.right + 4 * prior) / (self.looked_at + 4)


class Policy(Protocol):
    """Told of every step; asked before the next one is planned."""

    def budget(self, num_rows: int, most: int) -> int:
        """Tokens to draft in the next step of so many rows, `most` at most. 0: no row."""
        ...

    def draft_len(self, row: Acceptance, num_rows: int) -> int:
        """Tokens to draft for a row of that step."""
        ...

    def note(self, num_rows: int, num_drafted: int, num_accepted: int, seconds: float | None) -> None:
        """A step has ended. `seconds`: None where it is not to be compared with others (it also computed
        prompts, or was not timed)."""
        ...


class Always:
    """Drafts up to `max_draft_len` tokens for every row, in every step."""

    def __init__(self, max_draft_len: int):
        self._max_draft_len = max_draft_len

    def budget(self, num_rows: int, most: int) -> int:
        return most

    def draft_len(self, row: Acceptance, num_rows: int) -> int:
        return self._max_draft_len

    def note(self, num_rows: int, num_drafted: int, num_accepted: int, seconds: float | None) -> None:
        pass


class Measured:
    """Drafts where the steps so far say that it pays."""

    def __init__(self, max_draft_len: int):
        self._max_draft_len = max_draft_len
        self.costs = StepCosts()
        self._all = Acceptance()
        self._gain = 0.0
        self._rest = MIN_REST
        self._rested_at = 0
        self._begin_trial()

    @property
    def is_on(self) -> bool:
        """Drafts pay, as far as is known; neither resting nor trying."""
        return self._state == "on"

    def budget(self, num_rows: int, most: int) -> int:
        if self._state == "rest" and 2 * num_rows <= self._rested_at:  # few rows: another matter
            self._rest = MIN_REST
            self._begin_trial()
        if self._state == "rest":
            return 0
        return min(most, max(2 * TRIAL_DRAFT_LEN, num_rows // 8)) if self._state == "trial" else most

    def draft_len(self, row: Acceptance, num_rows: int) -> int:
        """The last token of a draft pays where the chance that all up to it are right is above its cost."""
        if self._state == "trial":
            return min(TRIAL_DRAFT_LEN, self._max_draft_len)
        share = self.costs.share(num_rows) or 0.0
        chance = row.rate(self._all.rate(0.5))
        if chance <= share:
            row.fade(0.97)  # what is known of it grows old, or it would never be tried again
            return 0
        if share <= chance**self._max_draft_len:
            return self._max_draft_len
        return max(1, int(math.log(share) / math.log(chance)))

    def note(self, num_rows: int, num_drafted: int, num_accepted: int, seconds: float | None) -> None:
        if seconds is not None:
            self.costs.note(num_rows + num_drafted, seconds)
        self._steps_left -= 1
        if self._state == "rest":
            if self._steps_left <= 0:
                self._begin_trial()
            return
        share = self.costs.share(num_rows) or 0.0
        if self._state == "trial":
            self._num_drafted += num_drafted
            if self._steps_left <= 0:
                has_tried = self._num_drafted >= TRIAL_STEPS
                self._decide(num_rows, has_tried and self._all.rate(share) > share + 0.05)
            return
        gain = (num_accepted - share * num_drafted) / max(1, num_rows)
        self._gain += (gain - self._gain) / _WARM_UP
        if self._steps_left <= 0 and self._gain < MIN_GAIN:
            self._decide(num_rows, False)
        elif self._steps_left <= -_WARM_UP:  # it has paid for a while, not by chance
            self._rest = MIN_REST

    def note_row(self, num_drafted: int, num_accepted: int) -> None:
        """What became of one row's draft."""
        self._all.note(num_drafted, num_accepted, 0.99)

    def _begin_trial(self) -> None:
        self._state = "trial"
        self._steps_left = TRIAL_STEPS
        self._num_drafted = 0

    def _decide(self, num_rows: int, pays: bool) -> None:
        if pays:
            self._state, self._steps_left, self._gain = "on", _WARM_UP, 0.0
            return
        self._state, self._steps_left, self._rested_at = "rest", self._rest, num_rows
        self._rest = min(2 * self._rest, MAX_REST)
