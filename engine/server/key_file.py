"""The file that keeps API keys (their hashes) and what they used: one writer, replaced whole, for its owner
only."""

from __future__ import annotations

import fcntl
import json
import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from engine.errors import ConfigError, OutputError

VERSION = 1


class KeyFile:
    """A JSON file of records, locked for as long as this object is open: a second server on it is refused.

    A reader sees the records before a save or those after it, never a part. The file and its lock have mode
    0600.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._lock_fd = self._lock()

    def load(self) -> list[dict[str, Any]]:
        """The records; none where there is no file yet. Raises ConfigError for a file that is not to be
        trusted."""
        try:
            fd = os.open(self.path, os.O_RDONLY)
        except FileNotFoundError:
            return []
        with open(fd, encoding="utf-8") as file:
            mode = stat.S_IMODE(os.fstat(fd).st_mode)
            if mode & 0o077:
                raise ConfigError(
                    f"{self.path} can be read or written by others (mode {mode:o}): run chmod 600 on it and, "
                    "if others may have read it, rotate its keys"
                )
            try:
                content = json.load(file)
            except ValueError as error:
                raise ConfigError(f"{self.path} is not the JSON of a key file: {error}") from error
        if not isinstance(content, dict) or content.get("version") != VERSION:
            raise ConfigError(f"{self.path} is no key file of version {VERSION}: give another keys_file")
        return content["keys"]

    def save(self, records: Sequence[dict[str, Any]]) -> None:
        """Replace the records. Raises OutputError; the file is then as it was."""
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.new")
        text = json.dumps({"version": VERSION, "keys": records}, indent=1)
        try:
            with suppress(FileNotFoundError):  # of a process that died while it wrote and had this number
                os.unlink(temporary)
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(fd, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(fd)
            os.replace(temporary, self.path)
            self._sync_folder()
        except OSError as error:
            with suppress(OSError):
                os.unlink(temporary)
            raise OutputError(f"cannot write the key file {self.path}: {error.strerror}") from error

    def close(self) -> None:
        os.close(self._lock_fd)

    def _lock(self) -> int:
        lock = self.path.with_name(self.path.name + ".lock")
        try:
            fd = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise ConfigError(f"cannot create {lock}: {error.strerror}; give another keys_file") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            raise ConfigError(
                f"{self.path} is in use by another server: give each its own keys_file"
            ) from error
        return fd

    def _sync_folder(self) -> None:
        fd = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
