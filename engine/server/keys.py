"""API keys: made, found, limited, counted and withdrawn. What is kept of a key is its SHA-256, never the
key."""

from __future__ import annotations

import hmac
import logging
import re
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.errors import ConfigError, TidemillError
from engine.server.api_key import (
    KEY_PREFIX,
    MAX_KEY_BYTES,
    ApiKey,
    KeyEntry,
    KeyStateError,
    UnknownKeyError,
    key_digest,
    steady_wall_clock,
)
from engine.server.audit import AuditLog
from engine.server.key_file import KeyFile
from engine.server.key_limits import Allowance, Exceeded, KeyLimits, KeyMeter

_log = logging.getLogger(__name__)


class KeyRing:
    """All API keys of a server; thread-safe.

    `path`: a file that keeps keys, totals and windows over restarts (0600; hashes only). Changes of keys are
    there before they take effect; what keys used is written every `save_interval_s` seconds, so a crash
    loses that much of it, and on `close`. `api_keys`: keys known beforehand, each with its label, role,
    `expires_in_s` and limits, as `{"demo-key": {"label": "UI", "requests_per_minute": 60}}`. One of them
    that `path` holds already keeps its id, state and totals and takes label, role and limits from here.
    `clock`: seconds since 1970.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        api_keys: Mapping[str, Mapping[str, Any]] | Sequence[str] = (),
        audit: AuditLog | None = None,
        clock: Callable[[], float] | None = None,
        save_interval_s: float = 5.0,
    ):
        self.audit = audit or AuditLog()
        self._clock = clock or steady_wall_clock()
        self._save_interval_s = save_interval_s
        self._lock = threading.RLock()  # entries and what keys used: held for microseconds
        self._change_lock = threading.Lock()  # changes of keys and writes of the file, one after the other
        self._entries: dict[str, KeyEntry] = {}
        self._by_digest_start: dict[bytes, list[str]] = {}
        self._saver: threading.Timer | None = None
        self._file = None if path is None else KeyFile(path)
        try:
            self._load()
            self._add_known(api_keys if isinstance(api_keys, Mapping) else {key: {} for key in api_keys})
        except BaseException:
            self.close(save=False)
            raise

    # Making and changing keys: each change is audited and saved before it holds.

    def generate_api_key(self, label: str = "", **options: Any) -> str:
        """A new key, which nobody can be told again; `options` as in `create`."""
        return self.create(label, **options)[1]

    def create(
        self,
        label: str = "",
        *,
        role: str = "user",
        limits: KeyLimits | None = None,
        expires_in_s: float | None = None,
        actor: str = "program",
    ) -> tuple[ApiKey, str]:
        """A new key and what to present for it. Raises ConfigError for bad values."""
        secret = KEY_PREFIX + secrets.token_urlsafe(32)
        entry = self._new_entry(secret, label, role, limits or KeyLimits(), expires_in_s)
        with self._change_lock:
            self._change(entry, "key.create", actor, label=label, role=role)
        return entry.key, secret

    def rotate(self, key_id: str, *, grace_s: float = 0.0, actor: str = "program") -> tuple[ApiKey, str]:
        """A new secret for a key; the old one is good for another `grace_s` seconds."""
        secret = KEY_PREFIX + secrets.token_urlsafe(32)
        with self._change_lock:
            entry = self._entry(key_id)
            if entry.key.status == "revoked":
                raise KeyStateError(f"API key {key_id} is revoked: create another")
            if not 0 <= grace_s < float("inf"):
                raise ConfigError(f"grace_s={grace_s}: expected a number of seconds of at least 0")
            ends_at = self._clock() + grace_s
            old = [(digest, min(ends_at, end or ends_at)) for digest, end in entry.digests] if grace_s else []
            entry = replace(entry, digests=[*old, (key_digest(secret), None)])
            self._change(entry, "key.rotate", actor, grace_s=grace_s)
        return entry.key, secret

    def suspend(self, key_id: str, *, actor: str = "program") -> ApiKey:
        """Refuse a key until it is reactivated."""
        return self._set_status(key_id, "suspended", "key.suspend", actor)

    def reactivate(self, key_id: str, *, actor: str = "program") -> ApiKey:
        return self._set_status(key_id, "active", "key.reactivate", actor)

    def revoke(self, key_id: str, *, actor: str = "program") -> ApiKey:
        """Refuse a key for ever; its totals stay."""
        return self._set_status(key_id, "revoked", "key.revoke", actor)

    def update(
        self,
        key_id: str,
        *,
        label: str | None = None,
        limits: KeyLimits | None = None,
        actor: str = "program",
    ) -> ApiKey:
        """Another label or other limits (all of them: what is not given is no limit)."""
        with self._change_lock:
            entry = self._entry(key_id)
            key = replace(entry.key, label=entry.key.label if label is None else label)
            key = replace(key, limits=limits or key.limits)
            entry = replace(entry, key=key)
            self._change(entry, "key.update", actor, label=key.label, limits=key.limits.to_mapping())
            return key

    # Using keys.

    def find(self, presented: bytes | str) -> ApiKey | None:
        """The key that `presented` is for, whatever its state; `why_refused` says whether it may be used."""
        if not presented or len(presented) > MAX_KEY_BYTES:
            return None
        digest = key_digest(presented)
        with self._lock:
            now = self._clock()
            found = None
            for key_id in self._by_digest_start.get(digest[:4], ()):
                entry = self._entries[key_id]
                for known, ends_at in entry.digests:
                    if hmac.compare_digest(known, digest) and (ends_at is None or now < ends_at):
                        found = entry.key
            return found

    def why_refused(self, key: ApiKey) -> str | None:
        """`suspended`, `revoked` or `expired`; None for a key that may be used."""
        if key.status != "active":
            return key.status
        return "expired" if key.expires_at is not None and self._clock() >= key.expires_at else None

    def admit(self, key_id: str) -> Exceeded | None:
        """Count a request of a key as begun, or say which limit it would exceed; `release` it when it
        ends."""
        with self._lock:
            meter, now = self._entry(key_id).meter, self._clock()
            exceeded = meter.exceeded(now)
            if exceeded is None:
                meter.add_request(now)
                meter.in_flight += 1
                self._save_soon()
            return exceeded

    def release(self, key_id: str) -> None:
        with self._lock:
            self._entry(key_id).meter.in_flight -= 1

    def record_usage(self, key_id: str, prompt_tokens: int, completion_tokens: int) -> None:
        """Add the tokens of a request to its key's totals and windows."""
        with self._lock:
            self._entry(key_id).meter.add_tokens(prompt_tokens, completion_tokens, self._clock())
            self._save_soon()

    def allowances(self, key_id: str) -> dict[str, Allowance]:
        """What is left to a key, by kind (`requests`, `tokens`); a kind without limits is left out."""
        with self._lock:
            return self._entry(key_id).meter.allowances(self._clock())

    # Looking at keys.

    def __len__(self) -> int:
        return len(self._entries)

    def keys(self) -> list[ApiKey]:
        with self._lock:
            return [entry.key for entry in self._entries.values()]

    def get(self, key_id: str) -> ApiKey:
        """Raises UnknownKeyError."""
        with self._lock:
            return self._entry(key_id).key

    def usage(self, key_id: str) -> dict[str, int]:
        """Totals of a key: `requests`, `prompt_tokens`, `completion_tokens`, `total_tokens`, and
        `in_flight`."""
        with self._lock:
            meter = self._entry(key_id).meter
            return {**meter.totals(), "in_flight": meter.in_flight}

    def stats(self) -> dict[str, dict[str, Any]]:
        """`usage` with label and status of every key, by id."""
        with self._lock:
            return {
                key_id: {"label": entry.key.label, "status": entry.key.status, **self.usage(key_id)}
                for key_id, entry in self._entries.items()
            }

    def close(self, *, save: bool = True) -> None:
        """Write what is not yet written and give the file free. Raises OutputError when it cannot be
        written."""
        with self._lock:
            if self._saver is not None:
                self._saver.cancel()
        with self._change_lock:
            file, self._file = self._file, None
            if file is None:
                return
            try:
                if save:
                    file.save(self._stored())
            finally:
                file.close()

    # What the above rests on.

    def _entry(self, key_id: str) -> KeyEntry:
        entry = self._entries.get(key_id)
        if entry is None:
            raise UnknownKeyError(f"there is no API key {key_id!r}")
        return entry

    def _new_entry(
        self, secret: str, label: str, role: str, limits: KeyLimits, expires_in_s: float | None
    ) -> KeyEntry:
        now = self._clock()
        if expires_in_s is not None and not 0 < expires_in_s < float("inf"):
            raise ConfigError(f"expires_in_s={expires_in_s}: expected a number of seconds above 0")
        expires_at = None if expires_in_s is None else now + expires_in_s
        key = ApiKey(f"key-{secrets.token_hex(8)}", label, role, "active", now, expires_at, limits)
        return KeyEntry(key, KeyMeter(limits), [(key_digest(secret), None)])

    def _set_status(self, key_id: str, status: str, action: str, actor: str) -> ApiKey:
        with self._change_lock:
            entry = self._entry(key_id)
            if entry.key.status == "revoked" and status != "revoked":
                raise KeyStateError(f"API key {key_id} is revoked, which is final: create another")
            key = replace(entry.key, status=status)
            self._change(replace(entry, key=key), action, actor)
            return key

    def _change(self, entry: KeyEntry, action: str, actor: str, **details: Any) -> None:
        """Put `entry` in the place of what its key was: audited, then saved, then true. The change lock is
        held."""
        key = entry.key
        self.audit.record(action, actor=actor, key_id=key.id, **details)
        if self._file is not None:
            try:
                self._file.save(self._stored(entry))
            except TidemillError:
                with suppress(TidemillError):  # the first error says what is wrong
                    self.audit.record(f"{action}.failed", actor=actor, key_id=key.id)
                raise
        with self._lock:
            entry.meter.limits = key.limits
            self._entries[key.id] = entry
            self._index()

    def _index(self) -> None:
        """Ids by the first bytes of their hashes: whose key it may be is then found by comparing one or
        two."""
        self._by_digest_start = {}
        for key_id, entry in self._entries.items():
            for digest, _ in entry.digests:
                self._by_digest_start.setdefault(digest[:4], []).append(key_id)

    def _stored(self, *changed: KeyEntry) -> list[dict[str, Any]]:
        with self._lock:
            entries = {**self._entries, **{entry.key.id: entry for entry in changed}}
            return [entry.to_stored() for entry in entries.values()]

    def _load(self) -> None:
        for record in [] if self._file is None else self._file.load():
            values = {name: value for name, value in record.items() if name not in ("sha256", "usage")}
            key = ApiKey(**{**values, "limits": KeyLimits.from_mapping(values["limits"])})
            digests = [(bytes.fromhex(digest), ends_at) for digest, ends_at in record["sha256"]]
            self._entries[key.id] = KeyEntry(key, KeyMeter(key.limits, record["usage"]), digests)
        self._index()

    def _add_known(self, api_keys: Mapping[str, Mapping[str, Any]]) -> None:
        for secret, given in api_keys.items():
            if not re.fullmatch(r"[\x21-\x7e]{1,512}", secret):
                raise ConfigError("a key of api_keys must be 1 to 512 visible ASCII characters")
            options = dict(given)
            label, role = options.pop("label", ""), options.pop("role", "user")
            expires_in_s = options.pop("expires_in_s", None)
            new = self._new_entry(secret, label, role, KeyLimits.from_mapping(options), expires_in_s)
            known = self.find(secret)
            if known is not None:
                entry = self._entry(known.id)
                key = replace(known, label=new.key.label, role=new.key.role, limits=new.key.limits)
                new = replace(entry, key=key)
            with self._change_lock:
                self._change(new, "key.provision", "config", label=label, role=role)

    def _save_soon(self) -> None:
        if self._file is None or self._saver is not None:
            return
        self._saver = threading.Timer(self._save_interval_s, self._save_usage)
        self._saver.daemon = True
        self._saver.start()

    def _save_usage(self) -> None:
        with self._change_lock:
            with self._lock:
                self._saver = None
            if self._file is None:
                return
            try:
                self._file.save(self._stored())
            except TidemillError as error:  # counted on in memory; the next request tries again
                _log.error("what API keys used is not saved: %s", error)
