"""What the batch builder remembers of each running request between steps, as rows of numbers.

A decode changes three numbers of a request: its input token, its position and its length. All else, its
page table and the numbers it is sampled with, is written once here and gathered for each step.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

from engine.request import Request, RequestStatus
from engine.step_inputs import SAMPLED_COLUMNS

# What a request's draws need, as bits.
PENALTY, MASK, BIAS, LOGPROBS, HISTORY = (1 << bit for bit in range(5))

_NUMBERS = struct.Struct("=" + "".join(np.dtype(dtype).char for dtype in SAMPLED_COLUMNS.values()))


class Seats:
    """A seat each for all running requests and as many that ran before; pure numpy.

    A seat is given up when all are taken and its request does not run any more.
    """

    def __init__(self, max_num_seqs: int, table_width: int, vocab_size: int):
        self.num_seats = 2 * max_num_seqs
        self._vocab_size = vocab_size
        self.page_tables = np.zeros((self.num_seats, table_width), np.int32)
        self.sampled = np.zeros((self.num_seats, len(SAMPLED_COLUMNS)), np.int32)
        """The columns of SAMPLED_COLUMNS, by their bits."""
        self.needs = np.zeros(self.num_seats, np.int32)
        """Bits: what the request's draws need."""
        self.min_total_len = np.zeros(self.num_seats, np.int32)
        """Tokens a sequence must have before anything may end it."""
        self.page_ids: list[list[int]] = [[] for _ in range(self.num_seats)]
        """The page ids written in `page_tables`."""
        self.idle = self._numbers(0.0, vocab_size, 1.0, 0.0, 0, 0, 1.0, 0.0, 0.0, 0)
        """What rows of logits that nobody draws from are given."""
        self.seat_of: dict[Request, int] = {}
        self._free = list(range(self.num_seats))

    def take(self, request: Request) -> int:
        """A seat for a request that has none."""
        if not self._free:
            self._give_up()
        seat = self.seat_of[request] = self._free.pop()
        sampling = request.sampling
        has_penalty = (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty)
        needs = 0
        if has_penalty != (1, 0, 0):
            needs |= PENALTY
        if sampling.allowed_token_ids is not None or request.bad_words_token_ids:
            needs |= MASK
        if needs & PENALTY or request.bad_words_token_ids:
            needs |= HISTORY
        if sampling.logit_bias:
            needs |= BIAS
        if sampling.logprobs is not None:
            needs |= LOGPROBS
        self.needs[seat] = needs
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
        self.sampled[seat] = self._numbers(*drawn_with, *request.key, *has_penalty, prompt_len)
        self.write_pages(seat, request.page_ids)
        return seat

    def write_pages(self, seat: int, page_ids: Sequence[int]) -> None:
        self.page_ids[seat] = list(page_ids)
        self.page_tables[seat, : len(page_ids)] = page_ids

    def _give_up(self) -> None:
        for request, seat in list(self.seat_of.items()):
            if request.status is not RequestStatus.RUNNING:
                del self.seat_of[request]
                self._free.append(seat)

    @staticmethod
    def _numbers(*values: float) -> np.ndarray:
        """i32[len(SAMPLED_COLUMNS)]: each value's bits in its column's type."""
        return np.frombuffer(_NUMBERS.pack(*values), np.int32)
