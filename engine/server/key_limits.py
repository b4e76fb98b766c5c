"""How much a key may use: requests and tokens in sliding windows and in all its life, and requests at
once."""

from __future__ import annotations

import dataclasses
import difflib
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from engine.errors import ConfigError

WINDOW_SECONDS = {"minute": 60, "hour": 3600, "day": 86400}
SLOTS_PER_WINDOW = 60

Kind = Literal["requests", "tokens", "concurrency"]
KINDS: tuple[Kind, Kind] = ("requests", "tokens")


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """The most that a key may use; None is no limit.

    Requests are those admitted. Tokens are those of prompts and completions together, known when a request
    ends: a key over its limit of tokens is refused the next request, and those that run go on.
    """

    requests_per_minute: int | None = None
    requests_per_hour: int | None = None
    requests_per_day: int | None = None
    requests_per_lifetime: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_hour: int | None = None
    tokens_per_day: int | None = None
    tokens_per_lifetime: int | None = None
    max_concurrent: int | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"limit {field.name}={value!r}: expected a whole number of at least 1")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> KeyLimits:
        """Limits by name. Raises ConfigError for a name that is none, with the nearest one, or a bad
        value."""
        names = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                near = difflib.get_close_matches(str(name), names, 1, 0.0)
                raise ConfigError(f"unknown limit {name!r} of an API key; did you mean {near[0]!r}?")
        return cls(**values)

    def to_mapping(self) -> dict[str, int]:
        """The limits that are set, by name."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True)
class Exceeded:
    """Which limit stands against a request. `retry_after_s` is None where waiting does not help."""

    kind: Kind
    window: str
    limit: int
    retry_after_s: float | None


@dataclass(frozen=True, slots=True)
class Allowance:
    """The tightest window of a kind: what is left of its limit, and seconds until nothing is used any
    more."""

    limit: int
    remaining: int
    reset_s: float


class SlidingWindow:
    """The sum of what was added within the last `length_s` seconds (a multiple of 60), in 61 numbers at most.

    Time is cut in slots of a sixtieth of the window, and an amount counts until its whole slot is `length_s`
    ago: never shorter than the window, one slot longer at most. So no interval of `length_s` seconds ever
    holds more than a limit that is kept at each moment. Times are seconds on any clock that does not go
    back.
    """

    def __init__(self, length_s: int, slots: Iterable[tuple[int, int]] = ()):
        self._slot_s = length_s // SLOTS_PER_WINDOW
        self._slots: deque[tuple[int, int]] = deque((slot, amount) for slot, amount in slots)
        self._sum = sum(amount for _, amount in self._slots)

    def add(self, amount: int, now: float) -> None:
        slot = self._forget(now)
        if self._slots and self._slots[-1][0] == slot:
            amount_before = self._slots.pop()[1]
            self._slots.append((slot, amount_before + amount))
        else:
            self._slots.append((slot, amount))
        self._sum += amount

    def used(self, now: float) -> int:
        self._forget(now)
        return self._sum

    def seconds_until(self, most: int, now: float) -> float:
        """Seconds until `used` is at most `most`, when nothing is added; 0.0 when it is now."""
        self._forget(now)
        excess, last = self._sum - most, None
        for slot, amount in self._slots:
            if excess <= 0:
                break
            excess, last = excess - amount, slot
        return 0.0 if last is None else (last + SLOTS_PER_WINDOW + 1) * self._slot_s - now

    def slots(self) -> list[tuple[int, int]]:
        """What `__init__` takes, to go on later."""
        return list(self._slots)

    def _forget(self, now: float) -> int:
        current = int(now // self._slot_s)
        while self._slots and self._slots[0][0] < current - SLOTS_PER_WINDOW:
            self._sum -= self._slots.popleft()[1]
        if self._slots and self._slots[-1][0] > current:  # stored by a process whose clock was ahead
            self._slots = deque([(current, self._sum)])
        return current


class KeyMeter:
    """What one key has used and uses now, against its limits. Not thread-safe: its key ring's lock guards
    it."""

    def __init__(self, limits: KeyLimits, stored: Mapping[str, Any] | None = None):
        stored = stored or {}
        self.limits = limits
        self.requests: int = stored.get("requests", 0)
        self.prompt_tokens: int = stored.get("prompt_tokens", 0)
        self.completion_tokens: int = stored.get("completion_tokens", 0)
        self.in_flight = 0
        slots = stored.get("windows", {})
        self._windows: dict[tuple[Kind, str], SlidingWindow] = {
            (kind, window): SlidingWindow(length_s, slots.get(f"{kind}_per_{window}", ()))
            for kind in KINDS
            for window, length_s in WINDOW_SECONDS.items()
        }

    def exceeded(self, now: float) -> Exceeded | None:
        """What stands against one more request at `now`, the longest wait first; None: it may run."""
        found: list[Exceeded] = []
        most = self.limits.max_concurrent
        if most is not None and self.in_flight >= most:
            found.append(Exceeded("concurrency", "concurrent", most, 1.0))
        for kind, total in zip(KINDS, (self.requests, self.total_tokens), strict=True):
            limit = getattr(self.limits, f"{kind}_per_lifetime")
            if limit is not None and total >= limit:
                return Exceeded(kind, "lifetime", limit, None)
        for (kind, window), used in self._windows.items():
            limit = getattr(self.limits, f"{kind}_per_{window}")
            if limit is not None and (wait := used.seconds_until(limit - 1, now)) > 0:
                found.append(Exceeded(kind, window, limit, wait))
        return max(found, key=lambda each: each.retry_after_s or 0.0, default=None)

    def add_request(self, now: float) -> None:
        self.requests += 1
        self._add("requests", 1, now)

    def add_tokens(self, prompt_tokens: int, completion_tokens: int, now: float) -> None:
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens
        self._add("tokens", prompt_tokens + completion_tokens, now)

    def allowances(self, now: float) -> dict[str, Allowance]:
        """For each kind with a limit by window, the window with the least left."""
        tightest: dict[str, Allowance] = {}
        for (kind, window), used in self._windows.items():
            limit = getattr(self.limits, f"{kind}_per_{window}")
            if limit is None:
                continue
            left = Allowance(limit, max(0, limit - used.used(now)), used.seconds_until(0, now))
            if kind not in tightest or left.remaining < tightest[kind].remaining:
                tightest[kind] = left
        return tightest

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def totals(self) -> dict[str, int]:
        return {
            "requests": self.requests,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.total_tokens,
        }

    def to_stored(self) -> dict[str, Any]:
        """What `__init__` takes as `stored`, as JSON has it."""
        windows = {f"{kind}_per_{window}": used.slots() for (kind, window), used in self._windows.items()}
        return {**self.totals(), "windows": {name: slots for name, slots in windows.items() if slots}}

    def _add(self, kind: Kind, amount: int, now: float) -> None:
        for window in WINDOW_SECONDS:
            self._windows[kind, window].add(amount, now)
