"""The folder that compiled steps are kept in, and whether what is in it may be run.

A local folder must be nobody else's to write to, nor any folder above it. Of a store that cannot be seen, so
there the user has to say it.
"""

from __future__ import annotations

import logging
import os
import stat
import tempfile
from pathlib import Path
from typing import Protocol

from engine.checkpoints.remote import is_url, local_path_of, open_filesystem, without_secrets
from engine.errors import ConfigError

_LOG = logging.getLogger(__name__)


class StepFiles(Protocol):
    """A folder of files, read and written whole."""

    def read(self, name: str) -> bytes | None: ...

    def write(self, name: str, data: bytes) -> None: ...


def open_step_files(path: str, is_trusted: bool) -> StepFiles:
    """The folder at a local path (made if it is not there, for its owner alone) or an fsspec URL.

    Raises ConfigError when others could write to it, or when it is a store and `is_trusted` is False.
    """
    local = local_path_of(path) if is_url(path) else Path(path).expanduser()
    if local is not None:
        return _LocalFiles(local)
    if not is_trusted:
        raise ConfigError(
            f"engine.compiled_steps_path={without_secrets(path)}: a compiled step is code that is run as it "
            "is read, and who may write to a store cannot be seen from here; if only people you would let "
            "run code on this machine can, set engine.compiled_steps_trusted=true"
        )
    return _RemoteFiles(path)


class _LocalFiles:
    """A folder that nobody but its owner and root can write to."""

    def __init__(self, folder: Path):
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._folder = folder.resolve(strict=True)
            _refuse_others(self._folder)
        except OSError as error:
            raise ConfigError(
                f"engine.compiled_steps_path={folder}: cannot be used ({error.strerror}); name another folder"
            ) from error

    def read(self, name: str) -> bytes | None:
        path = self._folder / name
        try:
            with path.open("rb") as file:
                _refuse_writable(path, os.fstat(file.fileno()))
                return file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigError(f"{path}: a saved step cannot be read ({error.strerror}); remove it") from error

    def write(self, name: str, data: bytes) -> None:
        try:
            handle, partial = tempfile.mkstemp(prefix=f".{name}.", dir=self._folder)
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.replace(partial, self._folder / name)
        except OSError as error:
            # Whoever has compiled can run: what was meant to save time must not cost the job.
            _LOG.warning("%s: a compiled step could not be saved there (%s)", self._folder, error.strerror)


def _refuse_others(folder: Path) -> None:
    """ConfigError when another user could change what is in `folder`, or put another in its place."""
    _refuse_writable(folder, folder.stat())
    for above in folder.parents:
        found = above.stat()
        # With the sticky bit, as in the system's temporary folder, nobody can move what is not his.
        if not found.st_mode & stat.S_ISVTX:
            _refuse_writable(above, found)


def _refuse_writable(path: Path, found: os.stat_result) -> None:
    whose = f"{path}: compiled steps are code that is run as it is read, and"
    if found.st_uid not in (os.geteuid(), 0):
        raise ConfigError(
            f"{whose} this belongs to another user (id {found.st_uid}); name a folder of your own"
        )
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(
            f"{whose} others may write here (mode {stat.S_IMODE(found.st_mode):o}): chmod go-w it, or name "
            "another engine.compiled_steps_path"
        )


class _RemoteFiles:
    """A folder behind an fsspec URL."""

    def __init__(self, url: str):
        self._shown = without_secrets(url)
        self._filesystem, self._folder = open_filesystem(url, "keeping compiled steps at")

    def read(self, name: str) -> bytes | None:
        try:
            return self._filesystem.cat_file(f"{self._folder}/{name}")
        except FileNotFoundError:
            return None
        except Exception as error:  # Each fsspec implementation raises its own library's errors.
            _LOG.warning(
                "%s/%s could not be read (%s): compiled again", self._shown, name, type(error).__name__
            )
            return None

    def write(self, name: str, data: bytes) -> None:
        try:
            self._filesystem.makedirs(self._folder, exist_ok=True)
            self._filesystem.pipe_file(f"{self._folder}/{name}", data)
        except Exception as error:  # As above; and what was meant to save time must not cost the job.
            _LOG.warning("%s: a compiled step could not be saved (%s)", self._shown, type(error).__name__)
