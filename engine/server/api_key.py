"""What an API key is: its facts, what may be shown of it, and how it is known again."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from engine.errors import ConfigError, TidemillError
from engine.server.audit import KEY_PATTERN
from engine.server.key_limits import KeyLimits, KeyMeter

KEY_PREFIX = "sk-tm-"
MAX_KEY_BYTES = 512  # of what a client presents
MAX_LABEL_CHARS = 200
ROLES = ("user", "admin", "monitor")
STATES = ("active", "suspended", "revoked")


class UnknownKeyError(TidemillError):
    """No key has this id."""


class KeyStateError(TidemillError):
    """The key is in a state in which this cannot be done to it."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What may be shown of a key. Times are seconds since 1970; `role` and `status` are of ROLES and STATES.

    A `user` may use the models, a `monitor` may read /metrics and /dashboard only, an `admin` may do
    everything.
    """

    id: str
    label: str
    role: str = "user"
    status: str = "active"
    created_at: float = 0.0
    expires_at: float | None = None
    limits: KeyLimits = field(default_factory=KeyLimits)

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ConfigError(f"role {self.role!r} of an API key: expected one of {', '.join(ROLES)}")
        if (
            not isinstance(self.label, str)
            or len(self.label) > MAX_LABEL_CHARS
            or not self.label.isprintable()
        ):
            raise ConfigError(
                f"the label of an API key is printable text of at most {MAX_LABEL_CHARS} characters"
            )
        if KEY_PATTERN.search(self.label):
            raise ConfigError("the label of an API key must not hold a key: labels are shown and logged")

    def to_mapping(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "label": self.label,
            "role": self.role,
            "status": self.status,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            "limits": self.limits.to_mapping(),
        }


@dataclass(slots=True)
class KeyEntry:
    """A key, what it used, and the hashes by which it is found, each with the time it ends (None: with the
    key)."""

    key: ApiKey
    meter: KeyMeter
    digests: list[tuple[bytes, float | None]]

    def to_stored(self) -> dict[str, Any]:
        digests = [[digest.hex(), ends_at] for digest, ends_at in self.digests]
        return {**self.key.to_mapping(), "sha256": digests, "usage": self.meter.to_stored()}


def key_digest(presented: bytes | str) -> bytes:
    """SHA-256 of a key. Keys made here hold 256 random bits, so a hash without salt and rounds is enough."""
    return hashlib.sha256(presented.encode() if isinstance(presented, str) else presented).digest()


def steady_wall_clock() -> Callable[[], float]:
    """Seconds since 1970 that do not jump when the system's clock is set: limits must not, either."""
    offset = time.time() - time.monotonic()
    return lambda: time.monotonic() + offset
