"""The audit log: who did what to which API key, and when, as JSON lines that are only ever added to; never a
key."""

from __future__ import annotations

import errno
import json
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from engine.errors import OutputError

KEY_PATTERN = re.compile(r"sk-tm-[A-Za-z0-9_-]{8,}")


def redacted(text: str) -> str:
    """`text` without what looks like a key of ours."""
    return KEY_PATTERN.sub("sk-tm-[redacted]", text)


class AuditLog:
    """Events in a file (mode 0600) and the last of them in memory; thread-safe.

    At `max_bytes` the file becomes `<path>.1`, that one `<path>.2` and so on; `num_kept` old ones are kept.
    Without a path only the last `num_recent` events are, and they are gone when the process ends.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        max_bytes: int = 16 << 20,
        num_kept: int = 4,
        num_recent: int = 1000,
        clock: Callable[[], float] = time.time,
    ):
        self.path = None if path is None else Path(path)
        self._max_bytes = max_bytes
        self._num_kept = num_kept
        self._recent: deque[dict[str, Any]] = deque(maxlen=num_recent)
        self._clock = clock
        self._lock = threading.Lock()

    def record(self, action: str, *, actor: str, key_id: str | None = None, **details: Any) -> None:
        """Add an event. Raises OutputError when it cannot be written: what it records must then not
        happen."""
        at = datetime.fromtimestamp(self._clock(), UTC).isoformat(timespec="milliseconds")
        event = {"at": at, "actor": actor, "action": action, "key_id": key_id, **details}
        line = redacted(json.dumps(event, default=str))
        with self._lock:
            if self.path is not None:
                self._append(self.path, line.encode() + b"\n")
            self._recent.append(json.loads(line))

    def recent(self, limit: int = 100) -> list[dict[str, Any]]:
        """The last events, the newest first."""
        with self._lock:
            return list(self._recent)[::-1][:limit]

    def _append(self, path: Path, line: bytes) -> None:
        try:
            with suppress(FileNotFoundError):
                if os.stat(path).st_size + len(line) > self._max_bytes:
                    self._rotate(path)
            fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                if os.write(fd, line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            finally:
                os.close(fd)
        except OSError as error:
            raise OutputError(f"cannot write the audit log {path}: {error.strerror}") from error

    def _rotate(self, path: Path) -> None:
        for number in range(self._num_kept, 0, -1):
            older = path.with_name(f"{path.name}.{number}")
            newer = path if number == 1 else path.with_name(f"{path.name}.{number - 1}")
            with suppress(FileNotFoundError):
                os.replace(newer, older)
        if not self._num_kept:
            os.unlink(path)
