"""What the running requests are sampled with, as rows of numbers by seat.

It stays the same as long as a request runs: written once here and gathered for each step.
"""

from __future__ import annotations

import struct

import numpy as np

from engine.draw_needs import PENALTY, needs_of
from engine.plan import RowArrays
from engine.request import Request
from engine.step_inputs import SAMPLED_COLUMNS

_NUMBERS = struct.Struct("=" + "".join(np.dtype(dtype).char for dtype in SAMPLED_COLUMNS.values()))


class SeatSampling:
    """By the scheduler's seats; a row is written when its seat is first seen with a ticket. Pure numpy."""

    def __init__(self, num_seats: int, vocab_size: int):
        self.num_seats = num_seats
        self._vocab_size = vocab_size
        self._tickets = np.zeros(num_seats, np.int64)
        self.sampled = np.zeros((len(SAMPLED_COLUMNS), num_seats), np.int32)
        """The columns of SAMPLED_COLUMNS, by their bits."""
        self.needs = np.zeros(num_seats, np.int32)
        """Bits: what the request's draws need."""
        self.min_total_len = np.zeros(num_seats, np.int32)
        """Tokens a sequence must have before anything may end it."""
        self.idle = self._numbers(0.0, vocab_size, 1.0, 0.0, 0, 0, 1.0, 0.0, 0.0, 0)
        """What rows of logits that nobody draws from are given."""

    def see(self, rows: RowArrays) -> None:
        """Write the numbers of those rows' requests that are new in their seats."""
        is_new = self._tickets[rows.seats] != rows.tickets
        for index in is_new.nonzero()[0].tolist():
            self._write(rows.seats.item(index), rows.requests[index])
        self._tickets[rows.seats] = rows.tickets

    def _write(self, seat: int, request: Request) -> None:
        sampling = request.sampling
        has_penalty = (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty)
        needs = self.needs[seat] = needs_of(request)
        self.min_total_len[seat] = request.prompt_len + sampling.min_tokens
        drawn_with = (
            sampling.temperature,
            sampling.top_k or self._vocab_size,
            sampling.top_p,
            sampling.min_p,
        )
        if sampling.temperature == 0:
            drawn_with = (0.0, self._vocab_size, 1.0, 0.0)
        prompt_len = request.prompt_len if needs & PENALTY else 0
        self.sampled[:, seat] = self._numbers(*drawn_with, *request.key, *has_penalty, prompt_len)

    @staticmethod
    def _numbers(*values: float) -> np.ndarray:
        """i32[len(SAMPLED_COLUMNS)]: each value's bits in its column's type."""
        return np.frombuffer(_NUMBERS.pack(*values), np.int32)
