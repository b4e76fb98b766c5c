"""What makes two runs the same run: named parts, each hashed, and what to say when one differs.

Secrets are removed before anything is hashed or stored, so a rotated key changes no fingerprint and no
key can be found, or guessed from its hash, in an output folder.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

REDACTED = "<removed>"
_MAX_STORED_PART = 256 * 1024
_MAX_SHOWN = 3


def canonical_json(value: Any) -> bytes:
    """One spelling for equal JSON values, whatever order their keys came in."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=_plain).encode()


def readable_json(value: Any) -> bytes:
    """The same content, laid out for people."""
    return json.dumps(value, sort_keys=True, indent=1, allow_nan=False, default=_plain).encode() + b"\n"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} is not a JSON value: {value!r}")


def sha256_json(value: Any) -> str:
    return hashlib.sha256(canonical_json(value)).hexdigest()


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """`id` names the run's state folder; `parts` maps each part's name to its SHA-256."""

    id: str
    parts: Mapping[str, str]
    values: Mapping[str, Any]

    @classmethod
    def of(cls, parts: Mapping[str, Any]) -> Fingerprint:
        values = {name: redact(value) for name, value in parts.items()}
        hashes = {name: sha256_json(value) for name, value in values.items()}
        return cls(sha256_json(hashes)[:16], hashes, values)

    def to_json(self) -> dict[str, Any]:
        """For job.json: big parts (a long list of inputs) by their hash alone."""
        return {
            name: {
                "sha256": self.parts[name],
                "value": value if len(canonical_json(value)) <= _MAX_STORED_PART else None,
            }
            for name, value in self.values.items()
        }

    def difference(self, stored: Mapping[str, Any]) -> str:
        """Which parts of a stored fingerprint (as `to_json` made it) differ from this one, and in what."""
        said = []
        for name in sorted({*stored, *self.parts}):
            old = stored.get(name, {}).get("sha256")
            if old == self.parts.get(name):
                continue
            before, after = stored.get(name, {}).get("value"), self.values.get(name)
            changes = list(_changes(before, after, name)) if before is not None and after is not None else []
            more = f" and {len(changes) - _MAX_SHOWN} more" if len(changes) > _MAX_SHOWN else ""
            said.append(
                f"{name} differs" + (f" ({', '.join(changes[:_MAX_SHOWN])}{more})" if changes else "")
            )
        return ", ".join(said)


def _changes(before: Any, after: Any, path: str) -> Iterator[str]:
    """The leaves that differ, as `path: before -> after`."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in sorted({*before, *after}, key=str):
            yield from _changes(before.get(key), after.get(key), f"{path}.{key}")
    elif _is_list(before) and _is_list(after) and len(before) == len(after):
        for index, (one, other) in enumerate(zip(before, after, strict=True)):
            label = other.get("url", index) if isinstance(other, Mapping) else index
            yield from _changes(one, other, f"{path}[{label}]")
    elif _is_list(before) and _is_list(after):
        yield f"{path}: {len(before)} entries -> {len(after)}"
    elif before != after:
        yield f"{path}: {_short(before)} -> {_short(after)}"


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_ALWAYS = {"secret", "secrets", "password", "passwd", "passphrase", "credential", "credentials", "apikey"}
_SPECIAL_TOKENS = {"bos", "eos", "pad", "unk", "sep", "cls", "mask", "stop", "special"}
_URL_LOGIN = re.compile(r"(?<=://)[^/@\s]*:[^/@\s]*@")
_URL_SIGNED = re.compile(
    r"([?&][^=&\s]*(?:signature|credential|token|secret|key|sig)[^=&\s]*=)[^&\s]+", re.IGNORECASE
)


def is_secret_name(name: str) -> bool:
    """Whether a setting of this name may hold a secret: keys, tokens, passwords; not `stop_token_ids`."""
    words = [word.lower() for word in _WORDS.findall(name)]
    for index, word in enumerate(words):
        follower = words[index + 1] if index + 1 < len(words) else ""
        if word in _ALWAYS or word in ("key", "keys"):
            return True
        before = words[index - 1] if index else ""
        if word in ("token", "tokens") and follower not in ("id", "ids") and before not in _SPECIAL_TOKENS:
            return True
    return False


def redact(value: Any, name: str = "") -> Any:
    """A copy with secrets replaced. Under a secret's name every text is one; numbers (max_tokens) never
    are.
    """
    if isinstance(value, Mapping):
        return {
            str(key): redact(item, name if name and is_secret_name(name) else str(key))
            for key, item in value.items()
        }
    if _is_list(value):
        return [redact(item, name) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(redact(item, name) for item in value)
    if isinstance(value, str):
        if value and is_secret_name(name):
            return REDACTED
        return _URL_SIGNED.sub(rf"\1{REDACTED}", _URL_LOGIN.sub(f"{REDACTED}@", value))
    return value
