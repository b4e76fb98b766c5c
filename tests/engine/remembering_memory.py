"""A device's pages that remember what was written where, and refuse anything but a request's own tokens."""

from __future__ import annotations

from engine.plan import PlannedRow, StepPlan
from engine.request import Request
from engine.scheduler import Scheduler
from tests.engine.host import next_token


class RememberingMemory:
    """The pages of one scheduler's requests."""

    def __init__(self, scheduler: Scheduler):
        self._scheduler = scheduler
        self._page_size = scheduler.settings.page_size
        num_pages = scheduler.settings.num_pages
        self._pages: list[list[int | None]] = [[None] * self._page_size for _ in range(num_pages)]
        # A number for each (number of what comes before, token): equal numbers mean equal beginnings.
        self._numbers: dict[tuple[object, int], int] = {}
        self._contents: dict[int, list[int]] = {}

    def run(self, plan: StepPlan) -> None:
        """What a step does to the pages. AssertionError where it reads or writes what is not its own."""
        for source, target, num_tokens in plan.copies:
            self._pages[target][:num_tokens] = self._pages[source][:num_tokens]
        rows = [row for row in plan.rows if not row.request.is_finished]
        for row in rows:
            self._write(row, [copy.source for copy in plan.copies])
        for row in rows:
            self._attend(row)

    def _write(self, row: PlannedRow, copied: list[int]) -> None:
        """Store the row's tokens as its keys would be; only into pages that nobody else reads, but to copy
        what is before them."""
        pool, cache = self._scheduler.pool, self._scheduler.cache
        for position in range(row.start, row.stop):
            page = row.page_ids[position // self._page_size]
            assert 1 <= pool.num_holders(page) <= 1 + copied.count(page)
            assert cache is None or not cache.knows(page)
            self._pages[page][position % self._page_size] = self._content(row.request, position)

    def _attend(self, row: PlannedRow) -> None:
        for position in range(row.stop):
            found = self._pages[row.page_ids[position // self._page_size]][position % self._page_size]
            assert found == self._content(row.request, position)

    def _content(self, request: Request, position: int) -> int:
        """What a place with this token has to hold: the salt and all tokens up to this one, as a number."""
        contents = self._contents.setdefault(id(request), [])
        if position < len(contents):
            return contents[position]
        tokens = request.token_ids(0, request.num_tokens)
        if request.num_pending:  # the device has it already
            tokens.append(next_token(tokens))
        for token in tokens[len(contents) : position + 1]:
            before = (request.cache_salt,) if not contents else contents[-1]
            contents.append(self._numbers.setdefault((before, token), len(self._numbers)))
        return contents[position]
