"""Who a process is, precisely enough to know later, on the same machine, that it is gone.

A pid alone is reused; a pid with its start time, in its pid namespace, on one boot of one machine, is
not. Where the system tells none of this (it is read from Linux's /proc), nothing is concluded and the
slow rules apply instead.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """`started` is in clock ticks since boot (proc(5), stat field 22); None where the system does not
    tell.
    """

    host: str
    boot_id: str | None
    pid_namespace: str | None
    pid: int
    started: str | None

    @classmethod
    def of_this_process(cls) -> ProcessIdentity:
        pid = os.getpid()
        state = _state_and_start(pid)
        return cls(socket.gethostname(), _boot_id(), _pid_namespace(), pid, state[1] if state else None)

    def is_gone(self) -> bool:
        """True when this process certainly ended; False when it runs or cannot be judged from here."""
        if self.boot_id is None or self.started is None or self.pid_namespace is None:
            return False
        if self.boot_id != _boot_id() or self.pid_namespace != _pid_namespace():
            return False
        state = _state_and_start(self.pid)
        # A zombie has ended: only its parent has not asked yet.
        return state is None or state[0] in "ZX" or state[1] != self.started

    @property
    def tag(self) -> str:
        """A file-name part that `is_tag_gone` understands."""
        boot = (self.boot_id or "unknown").replace("-", "")[:12]
        return f"{boot}.{self.pid_namespace or 'unknown'}.{self.pid}.{self.started or 'unknown'}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ProcessIdentity:
        return cls(**value)


def is_tag_gone(tag: str) -> bool:
    """Whether the process that made `tag` (on this machine and boot) certainly ended."""
    parts = tag.split(".")
    if len(parts) != 4 or not parts[2].isdigit():
        return False
    here = ProcessIdentity.of_this_process()
    if parts[:2] != here.tag.split(".")[:2] or "unknown" in parts:
        return False
    return ProcessIdentity(here.host, here.boot_id, here.pid_namespace, int(parts[2]), parts[3]).is_gone()


def _boot_id() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _pid_namespace() -> str | None:
    try:
        return str(os.stat("/proc/self/ns/pid").st_ino)
    except OSError:
        return None


def _state_and_start(pid: int) -> tuple[str, str] | None:
    """A process's state letter and start time, or None when there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes().decode("ascii", "replace")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # the command's name, in brackets, may hold anything
    return fields[0], fields[19]
