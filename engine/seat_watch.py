"""What the running requests have drawn since the last look: a few numpy operations whatever their number."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from engine.seat_table import SeatTable


class Drawn(NamedTuple):
    """The requests of one table that have drawn tokens since the last look, an entry each."""

    requests: list[Any]
    lens: np.ndarray  # i32[R], tokens of prompt and output
    token_ids: np.ndarray  # i32[R, most that one has drawn], the last ones of each


class SeatWatch:
    """Looks at one table, between two steps."""

    def __init__(self, table: SeatTable):
        self._table = table
        # As they were at the last look, by seat.
        self._lens = table.num_tokens.copy()
        self._tickets = table.tickets.copy()

    def look(self) -> Drawn | None:
        """What has been drawn since the last look; of a request that has taken its seat since, all that it
        has ever drawn. None when nothing."""
        table = self._table
        seats = table.tickets.nonzero()[0]
        lens, tickets = table.num_tokens[seats], table.tickets[seats]
        known = np.where(self._tickets[seats] == tickets, self._lens[seats], table.prompt_lens[seats])
        self._lens[seats], self._tickets[seats] = lens, tickets
        has_grown = lens > known
        if not has_grown.any():
            return None
        seats, lens, num_new = seats[has_grown], lens[has_grown], (lens - known)[has_grown]
        most = int(num_new.max())
        places = np.maximum(lens[:, None] - np.arange(most, 0, -1), 0)
        return Drawn(table.requests[seats].tolist(), lens, table.tokens[seats[:, None], places])
