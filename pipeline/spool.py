"""The local folder where results are written, whole and hashed, before they are published."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.errors import OutputError

_PREFIX = "tidemill-spool-"


@contextmanager
def open_spool(parent: str | None) -> Iterator[Path]:
    """A private folder inside `parent` (None: the system's temporary folder), removed at the end.

    Folders left by processes of ours that were killed are removed on the way in.
    """
    base = Path(parent or tempfile.gettempdir()).expanduser()
    try:
        base.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(base)
        folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=base))
    except OSError as error:
        raise OutputError(
            f"{base}: cannot make the spool folder ({error.strerror}): set output.spool_dir to a local "
            "folder that can be written"
        ) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(base: Path) -> None:
    for folder in base.glob(f"{_PREFIX}*-*"):
        pid = folder.name.removeprefix(_PREFIX).partition("-")[0]
        if (
            pid.isdigit()
            and folder.is_dir()
            and folder.stat().st_uid == os.getuid()
            and not _is_alive(int(pid))
        ):
            shutil.rmtree(folder, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
