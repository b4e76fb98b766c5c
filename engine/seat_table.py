"""The numbers of the running requests, a seat each: what a step reads and moves for all of them at once.

A step of decodes does the same to every request: one more token computed, one more known. As rows of arrays
that is a handful of numpy operations whatever the number of requests. Python looks at single requests only
when something happens to them: they come, need a page, fill one, draw a token that may end them, or go.

While a request has a seat its counters and its drawn tokens are here and nowhere else (`Request` reads them
from here); before and after, they are the request's own.
"""

from __future__ import annotations

from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from engine.request import Request

# Numbers between the tokens of two seats. A step writes one token a seat, mostly at like positions: if the
# seats were a power of two apart, these places would all belong to the same few lines of a CPU's caches.
_APART = 16

# Up to so many end tokens it is quicker to compare with each than to sort.
_FEW = 16

Rank = Callable[[Request], tuple[int, int]]


class SeatTable:
    """A seat for each of up to `num_seats` running requests; arrays are by seat.

    rank: the running requests are kept in the order of this.
    """

    def __init__(self, num_seats: int, max_len: int, page_size: int, rank: Rank):
        self._rank = rank
        self.requests: Any = np.full(num_seats, None, object)
        self.tickets = np.zeros(num_seats, np.int64)
        """Whose seat it is: a number that no two takings share; 0 when it is free. A seat may have been given
        to another since a step was planned, a ticket is not."""
        self.num_computed = np.zeros(num_seats, np.int32)
        self.num_tokens = np.zeros(num_seats, np.int32)
        self.num_pending = np.zeros(num_seats, np.int32)
        self.prompt_lens = np.zeros(num_seats, np.int32)
        self.max_computed_lens = np.zeros(num_seats, np.int32)
        self.tokens = np.zeros((num_seats, max_len + _APART), np.int32)[:, :max_len]
        """By position: the prompt's last token, and those drawn."""
        self.page_tables = np.zeros((num_seats, -(-max_len // page_size)), np.int32)
        """The first `len(page_ids)` of each are the request's page ids."""
        self._num_tickets = 0
        self._free = list(range(num_seats - 1, -1, -1))
        self._order = np.zeros(0, np.int64)
        self._has_gaps = False  # seats in _order were released
        self._newest: list[int] = []  # seats taken since, that come after all in _order
        # How many seated requests each set of end tokens has, and the tokens of all these sets.
        self._ends: Counter[frozenset[int]] = Counter()
        self._end_token_ids = np.zeros(0, np.int64)

    @property
    def num_taken(self) -> int:
        return len(self.tickets) - len(self._free)

    @property
    def order(self) -> np.ndarray:
        """The taken seats, in order."""
        if self._newest:
            self._order = np.concatenate((self._order, self._newest))
            self._newest = []
        if self._has_gaps:
            self._order = self._order[self.tickets[self._order] > 0]
            self._has_gaps = False
        return self._order

    @property
    def last(self) -> Request:
        return self.requests[self.order[-1]]

    def has_one_left(self, seats: np.ndarray) -> np.ndarray:
        """bool[len(seats)]: whether the seat's request has one token that no step has computed or is
        computing."""
        # Of all seats first: to add is cheaper than to gather.
        return (self.num_tokens + self.num_pending - self.num_computed == 1)[seats]

    def running(self) -> list[Request]:
        """The requests in order."""
        return self.requests[self.order].tolist()

    def take(self, request: Request) -> None:
        """Give a request a seat and put it in its place in the order."""
        # A seat that was released is taken out of the order before it is given away.
        before = self._newest if self._newest and not self._has_gaps else self.order
        seat = self._free.pop()
        if len(before) and self._rank(request) < self._rank(self.requests[before[-1]]):
            order = self.order
            place = bisect(order, self._rank(request), key=lambda seat: self._rank(self.requests[seat]))
            self._order = np.concatenate((order[:place], [seat], order[place:]))
        else:
            self._newest.append(seat)
        self._num_tickets += 1
        self.tickets[seat] = self._num_tickets
        self.requests[seat] = request
        self.num_computed[seat] = request.num_computed
        self.num_tokens[seat] = request.num_tokens
        self.num_pending[seat] = request.num_pending
        self.prompt_lens[seat] = request.prompt_len
        self.max_computed_lens[seat] = request.max_computed_len
        self.tokens[seat, request.prompt_len - 1] = request.prompt_token_ids[-1]
        if request.output_token_ids:
            self.tokens[seat, request.prompt_len : request.num_tokens] = request.output_token_ids
        if request.end_token_ids:
            self._ends[request.end_token_ids] += 1
            if self._ends[request.end_token_ids] == 1:
                self._list_end_tokens()
        request.sit(self, seat)
        self.write_pages(request)

    def release(self, request: Request) -> None:
        """The request takes its numbers with it."""
        seat = request.seat
        request.stand()
        if request.end_token_ids:
            self._ends[request.end_token_ids] -= 1
            if not self._ends[request.end_token_ids]:
                del self._ends[request.end_token_ids]
                self._list_end_tokens()
        self.tickets[seat] = 0
        self.requests[seat] = None
        self._free.append(seat)
        self._has_gaps = True

    def write_pages(self, request: Request) -> None:
        """The request's pages have changed."""
        self.page_tables[request.seat, : len(request.page_ids)] = request.page_ids

    def append(self, seats: np.ndarray, token_ids: np.ndarray) -> None:
        """The tokens that were pending have come."""
        positions = self.num_tokens[seats]
        self.tokens[seats, positions] = token_ids
        self.num_tokens[seats] = positions + 1
        self.num_pending[seats] = 0

    def append_one(self, seat: int, token_id: int) -> None:
        """One token more has come, whose place in the step was guessed (engine/speculation)."""
        self.tokens[seat, self.num_tokens[seat]] = token_id
        self.num_tokens[seat] += 1

    def write_draft(self, seat: int, token_ids: Sequence[int]) -> None:
        """Put guessed tokens behind those known, for the step's inputs; the drawn ones overwrite them."""
        start = self.num_tokens.item(seat)
        self.tokens[seat, start : start + len(token_ids)] = token_ids

    def cut(self, seat: int, num_tokens: int) -> None:
        """The first `num_tokens` stay known; of what is computed, all but the last of them."""
        self.num_tokens[seat] = num_tokens
        self.num_computed[seat] = min(self.num_computed.item(seat), num_tokens - 1)

    def may_end(self, token_ids: np.ndarray) -> np.ndarray:
        """bool[len(token_ids)]: which of these end some of the requests, not necessarily their own. To be
        asked only where there are any (`has_end_tokens`)."""
        if len(self._end_token_ids) > _FEW:
            return np.isin(token_ids, self._end_token_ids)
        is_end = token_ids == self._end_token_ids[0]
        for end in self._end_token_ids[1:]:
            is_end |= token_ids == end
        return is_end

    @property
    def has_end_tokens(self) -> bool:
        return len(self._end_token_ids) > 0

    def _list_end_tokens(self) -> None:
        together: Iterable[int] = frozenset().union(*self._ends)
        self._end_token_ids = np.array(sorted(together), np.int64)

    def check_integrity(self) -> None:
        """Raises AssertionError unless each seat is free or holds one request, as that one says."""
        taken = self.tickets.nonzero()[0].tolist()
        if sorted(self.order.tolist()) != taken or sorted([*taken, *self._free]) != [
            *range(len(self.tickets))
        ]:
            raise AssertionError("a seat is free and taken, or neither")
        ranks = [self._rank(request) for request in self.running()]
        if ranks != sorted(ranks):
            raise AssertionError("the running requests are out of order")
        for seat in taken:
            request = self.requests[seat]
            if request.table is not self or request.seat != seat:
                raise AssertionError(f"{request.request_id} does not know its seat")
            if self.page_tables[seat, : len(request.page_ids)].tolist() != request.page_ids:
                raise AssertionError(f"{request.request_id} has other pages in its seat")
            if request.remain_len < 1:
                raise AssertionError(f"{request.request_id} runs and has nothing to compute")
        if self._ends != Counter(
            request.end_token_ids for request in self.running() if request.end_token_ids
        ):
            raise AssertionError("end tokens are known of requests that do not run")
