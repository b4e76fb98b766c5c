"""Where a run's output lives, behind an interface small enough for a local disk and an object store alike.

The only writing primitive is *exclusive create of a whole object*. Nothing is renamed, appended to or overwritten;
heartbeats are the one exception and nothing's correctness rests on them. A create has three outcomes, because an
answer can get lost after the write was applied.

Paths are relative to the root, with forward slashes, and come from the plan's numbers, never from data.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import Enum
from pathlib import Path

from engine.errors import ConfigError


class Outcome(Enum):
    WON = "won"  # the object is ours and durable
    LOST = "lost"  # an object of that name was there already
    UNKNOWN = "unknown"  # it may or may not have been applied: read it back


class Storage(ABC):
    """One output folder. Methods raise OutputError (cannot ever work), or RetryLater (may work later)."""

    @property
    @abstractmethod
    def url(self) -> str:
        """The root, as a user would type it."""

    @abstractmethod
    def check(self) -> None:
        """Raise OutputError unless the folder can be written; creates nothing."""

    @abstractmethod
    def create(self, path: str, data: bytes) -> Outcome:
        """Create a small object, whole and durable, if none of that name exists."""

    @abstractmethod
    def create_from_file(self, path: str, spool: Path) -> Outcome:
        """The same from a finished local file, which is left in place and must not be written to again."""

    @abstractmethod
    def read(self, path: str) -> bytes | None:
        """A small object's bytes, or None when there is none."""

    @abstractmethod
    def size(self, path: str) -> int | None:
        """An object's length in bytes, or None when there is none."""

    @abstractmethod
    def local_file(self, path: str, spool_dir: Path) -> Path | None:
        """A local file with the object's content, fetched into `spool_dir` if need be; None when there is none."""

    @abstractmethod
    def list(self, folder: str) -> list[str]:
        """Sorted names directly inside a folder; empty when the folder is not there."""

    @abstractmethod
    def overwrite_heartbeat(self, path: str, data: bytes) -> None:
        """Replace a heartbeat; not durable, never half visible."""

    @abstractmethod
    def discard(self, path: str) -> None:
        """Remove an object that nothing refers to or ever will; no error when it is gone already."""

    @abstractmethod
    def subfolder(self, name: str) -> Storage:
        """The storage of a folder inside this one."""


def open_storage(url: str) -> Storage:
    """The storage of an output path: a local path or a file:// URL. Touches nothing."""
    from pipeline.local_storage import LocalStorage

    scheme, separator, rest = url.partition("://")
    if not separator:
        return LocalStorage(Path(url).expanduser())
    if scheme == "file":
        return LocalStorage(Path(rest))
    raise ConfigError(
        f"output.path {url!r}: results go to a local disk only, {scheme}:// is not supported as an output; "
        "give a local path and copy it afterwards"
    )
