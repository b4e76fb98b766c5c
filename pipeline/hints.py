"""What the engine is told beyond the rows themselves: which beginnings will be wanted again, and how long the
outputs of a template tend to be. Hints make a run faster and never change what comes out of it.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections import OrderedDict, deque
from dataclasses import dataclass

from pipeline.open_work import EngineLike
from pipeline.planned_reading import PlacedRow
from pipeline.row_order import MIN_PREFIX_LEN, MIN_TEMPLATE_ROWS, PrefixGroup
from pipeline.rows import Prompt, excerpt

# Of the engine's pages, what may stay pinned from one window to the next: pins take room from running rows.
KEPT_SHARE = 1 / 16
# Templates whose output lengths are remembered.
MAX_TEMPLATES = 1024
# So many rows of a template must have finished before their lengths say something about the next one's.
MIN_FINISHED = 8
# Expected is the mean and so many standard deviations: few rows turn out longer.
MARGIN = 2.0


@dataclass(frozen=True, slots=True)
class Template:
    """A beginning that many rows share, by the hash of its tokens; `text` is how its rows' prompts begin."""

    key: str
    num_tokens: int
    text: str


class Templates:
    """Finds a row's template: the longest beginning that it shares with many rows of its window."""

    def __init__(self) -> None:
        self._found: OrderedDict[tuple[int, int, int], Template] = OrderedDict()

    def of(self, placed: PlacedRow) -> Template | None:
        """None for a row that shares too little, or with too few."""
        group = placed.window.group(placed.place)
        group = None if group is None else group.template
        if group is None or not isinstance(placed.row, Prompt):
            return None
        where = (placed.window.shard, group.start, group.prefix_len)
        template = self._found.get(where)
        if template is None:
            tokens = array("I", placed.row.token_ids[: group.prefix_len])
            key = hashlib.blake2b(tokens.tobytes(), digest_size=8).hexdigest()
            template = Template(key, group.prefix_len, excerpt((placed.row.text or "")[:80]))
            self._found[where] = template
            if len(self._found) > MAX_TEMPLATES:
                self._found.popitem(last=False)
        return template


class OutputLengths:
    """How long the outputs of finished rows were, a template at a time and over all."""

    def __init__(self) -> None:
        self._by_template: OrderedDict[str, _Spread] = OrderedDict()
        self._overall = _Spread()

    def add(self, template: Template | None, length: int) -> None:
        """Count one finished output of `length` tokens."""
        self._overall.add(length)
        if template is None:
            return
        self._by_template.setdefault(template.key, _Spread()).add(length)
        self._by_template.move_to_end(template.key)
        if len(self._by_template) > MAX_TEMPLATES:
            self._by_template.popitem(last=False)

    def expected(self, template: Template | None, max_tokens: int) -> int | None:
        """Tokens that an output will hardly exceed, `max_tokens` at most; None while too little is known."""
        spread = None if template is None else self._by_template.get(template.key)
        if spread is None or spread.count < MIN_FINISHED:
            spread = self._overall
        if spread.count < MIN_FINISHED:
            return None
        return max(1, min(max_tokens, math.ceil(spread.mean + MARGIN * spread.deviation)))


class _Spread:
    """Mean and deviation of numbers as they come (Welford 1962)."""

    __slots__ = ("_squares", "count", "mean")

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self._squares = 0.0

    def add(self, value: float) -> None:
        self.count += 1
        off = value - self.mean
        self.mean += off / self.count
        self._squares += off * (value - self.mean)

    @property
    def deviation(self) -> float:
        return math.sqrt(self._squares / self.count) if self.count else 0.0


@dataclass(slots=True)
class _Open:
    """A group whose rows are being taken; `tokens` are pinned, unless it adds too little to be worth it."""

    group: PrefixGroup
    tokens: tuple[int, ...] | None


class WantedPrefixes:
    """Pins the beginnings that rows to come share, and releases each when no row is left that needs it.

    Rows come in the order of their plan, so a group is over when a row after it comes. Its last rows may
    still wait inside the engine then, so the pin is released `slack` rows later. A template is kept until a
    whole window has passed without it: the next shard often begins with the same ones. `max_kept_tokens`
    bounds how much is kept in this way.
    """

    def __init__(self, engine: EngineLike, slack: int, max_kept_tokens: int):
        self._engine = engine
        self._slack = slack
        self._max_kept_tokens = max_kept_tokens
        self._num_kept_tokens = 0
        self._num_taken = 0
        self._num_windows = 0
        self._window: tuple[int, int] | None = None
        self._open: list[_Open] = []  # each inside the one before
        self._over: deque[tuple[int, tuple[int, ...]]] = deque()  # with the row at which to release
        self._kept: deque[tuple[int, tuple[int, ...]]] = deque()  # with the number of their window

    def take(self, placed: PlacedRow) -> None:
        """A row is about to be given to the engine, or was rejected."""
        self._num_taken += 1
        window = (placed.window.shard, placed.window.start)
        if window != self._window:
            self._window = window
            self._begin_window()
        while self._open and self._open[-1].group.stop <= placed.place:
            self._close(self._open.pop())
        if isinstance(placed.row, Prompt):
            self._open_groups(placed, placed.row)
        while self._over and self._over[0][0] <= self._num_taken:
            self._engine.release_prefix(self._over.popleft()[1])

    def release_all(self) -> None:
        """Nothing is wanted any more."""
        held = [each.tokens for each in self._open if each.tokens is not None]
        for tokens in [*held, *(tokens for _, tokens in [*self._over, *self._kept])]:
            self._engine.release_prefix(tokens)
        self._open, self._over, self._kept, self._num_kept_tokens = [], deque(), deque(), 0

    def _begin_window(self) -> None:
        while self._open:
            self._close(self._open.pop())
        self._num_windows += 1
        while self._kept and self._kept[0][0] < self._num_windows - 1:
            _, tokens = self._kept.popleft()
            self._num_kept_tokens -= len(tokens)
            self._engine.release_prefix(tokens)

    def _open_groups(self, placed: PlacedRow, prompt: Prompt) -> None:
        known = self._open[-1].group if self._open else None
        path: list[PrefixGroup] = []
        group = placed.window.group(placed.place)
        while group is not None and group is not known:
            path.append(group)
            group = group.parent
        num_pinned = max((len(each.tokens) for each in self._open if each.tokens is not None), default=0)
        for group in reversed(path):
            tokens = None
            if group.prefix_len >= num_pinned + MIN_PREFIX_LEN:
                tokens = prompt.token_ids[: group.prefix_len]
                self._engine.pin_prefix(tokens)
                num_pinned = group.prefix_len
            self._open.append(_Open(group, tokens))

    def _close(self, over: _Open) -> None:
        if over.tokens is None:
            return
        num_kept_tokens = self._num_kept_tokens + len(over.tokens)
        if over.group.num_rows >= MIN_TEMPLATE_ROWS and num_kept_tokens <= self._max_kept_tokens:
            self._num_kept_tokens = num_kept_tokens
            self._kept.append((self._num_windows, over.tokens))
        else:
            self._over.append((self._num_taken + self._slack, over.tokens))
