"""Storage on a local disk: a synced temporary file in the same folder, linked to its name.

`link` is the one local call that is both exclusive and all-or-nothing. What a dead process left half done
is a temporary file of a telling name, ignored by every listing and removed by the next one who writes
there.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import time
import uuid
from contextlib import suppress
from pathlib import Path

from engine.errors import OutputError
from pipeline.process_identity import ProcessIdentity, is_tag_gone
from pipeline.storage import Outcome, Storage, explain, nearest_existing

TEMPORARY_PREFIX = ".tidemill-tmp-"
_FOREIGN_TEMPORARY_AGE_S = 24 * 3600.0
_NO_LINK = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


class LocalStorage(Storage):
    """A folder on a disk of this machine, or one mounted on several (its file system must know hard
    links).
    """

    def __init__(self, root: Path):
        self._root = Path(os.path.abspath(root))
        self._known_folders: set[Path] = set()
        self._tag = ProcessIdentity.of_this_process().tag

    @property
    def url(self) -> str:
        return str(self._root)

    def subfolder(self, name: str) -> LocalStorage:
        return LocalStorage(self._root / name)

    def check(self) -> None:
        place = nearest_existing(self._root)
        if not place.is_dir():
            raise OutputError(
                f"output.path {self._root}: {place} is not a folder; choose another output.path"
            )
        # By trying, not by asking: permissions say little to root, and nothing of hard links.
        probe, linked = self._temporary_name(place), self._temporary_name(place)
        try:
            _remove_leftovers(place)
            probe.write_bytes(b"probe")
            self._link(probe, linked)
        except OSError as error:
            raise explain(error, self._root) from error
        finally:
            for path in (probe, linked):
                with suppress(OSError):
                    os.unlink(path)

    def create(self, path: str, data: bytes) -> Outcome:
        if not data:
            raise ValueError(f"an empty object is never written: {path}")
        target = self._root / path
        if os.path.lexists(target):
            return Outcome.LOST
        temporary = self._temporary(target)
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            return self._link(temporary, target)
        except OSError as error:
            raise explain(error, target, len(data)) from error
        finally:
            with suppress(OSError):  # left behind, it is ignored and removed later
                os.unlink(temporary)

    def create_from_file(self, path: str, spool: Path) -> Outcome:
        target = self._root / path
        if os.path.lexists(target):
            return Outcome.LOST
        temporary = self._temporary(target)
        try:
            _sync(spool)
            try:
                # On one disk the spool file itself takes the name: no second copy is written.
                os.link(spool, temporary)
            except OSError as error:
                if error.errno != errno.EXDEV and error.errno not in _NO_LINK:
                    raise
                shutil.copyfile(spool, temporary)
                _sync(temporary)
            return self._link(temporary, target)
        except OSError as error:
            raise explain(error, target, spool.stat().st_size if spool.exists() else 0) from error
        finally:
            with suppress(OSError):
                os.unlink(temporary)

    def _link(self, temporary: Path, target: Path) -> Outcome:
        links = os.stat(temporary).st_nlink
        try:
            os.link(temporary, target)
        except FileExistsError:
            # A network file system repeats a call whose answer was lost, and then finds its own link.
            if os.stat(temporary).st_nlink == links:
                return Outcome.LOST
        except OSError as error:
            if error.errno in _NO_LINK:
                raise OutputError(
                    f"{target.parent} is on a file system without hard links ({error.strerror}); "
                    "choose an output.path on another disk"
                ) from error
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
                raise
            return Outcome.UNKNOWN
        try:
            _sync(target.parent)
        except OSError:
            return Outcome.UNKNOWN
        return Outcome.WON

    def read(self, path: str) -> bytes | None:
        try:
            return (self._root / path).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise explain(error, self._root / path) from error

    def size(self, path: str) -> int | None:
        try:
            return os.stat(self._root / path).st_size
        except FileNotFoundError:
            return None
        except OSError as error:
            raise explain(error, self._root / path) from error

    def local_file(self, path: str, spool_dir: Path) -> Path | None:
        return self._root / path if self.size(path) is not None else None

    def list(self, folder: str) -> list[str]:
        try:
            names = os.listdir(self._root / folder)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise explain(error, self._root / folder) from error
        return sorted(name for name in names if not name.startswith(TEMPORARY_PREFIX))

    def overwrite_heartbeat(self, path: str, data: bytes) -> None:
        target = self._root / path
        self._ensure_folder(target.parent)
        try:
            # In place and in one write: replacing the file would make some file systems write it to the disk,
            # and this is done before most engine steps. What an older, longer one leaves is blank.
            descriptor = os.open(target, os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                size = max(os.fstat(descriptor).st_size, len(data))
                os.pwrite(descriptor, data.ljust(size), 0)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise explain(error, target, len(data)) from error

    def discard(self, path: str) -> None:
        try:
            os.unlink(self._root / path)
        except FileNotFoundError:
            return
        except OSError as error:
            raise explain(error, self._root / path) from error

    def ages(self, folder: str) -> dict[str, float]:
        found = {}
        for name in self.list(folder):
            with suppress(FileNotFoundError):  # removed since
                status = os.stat(self._root / folder / name)
                if stat.S_ISREG(status.st_mode):
                    found[name] = time.time() - status.st_mtime
        return found

    def leftovers(self, min_age_s: float) -> list[str]:
        found = []
        for path in self._root.rglob(f"{TEMPORARY_PREFIX}*"):
            with suppress(FileNotFoundError):
                if time.time() - os.stat(path).st_mtime >= min_age_s:
                    found.append(str(path.relative_to(self._root)))
        return sorted(found)

    def remove_leftover(self, name: str) -> None:
        self.discard(name)

    def _temporary(self, target: Path) -> Path:
        self._ensure_folder(target.parent)
        return self._temporary_name(target.parent)

    def _temporary_name(self, folder: Path) -> Path:
        return folder / f"{TEMPORARY_PREFIX}{self._tag}-{uuid.uuid4().hex}"

    def _ensure_folder(self, folder: Path) -> None:
        if folder in self._known_folders:
            return
        try:
            missing = []
            place = folder
            while not place.is_dir():
                missing.append(place)
                if place == place.parent:
                    break
                place = place.parent
            for place in reversed(missing):
                with suppress(FileExistsError):
                    os.mkdir(place)
                _sync(place.parent)  # the name of a new folder must outlive a power cut as its files do
            _remove_leftovers(folder)
        except OSError as error:
            raise explain(error, folder) from error
        self._known_folders.add(folder)


def _sync(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_leftovers(folder: Path) -> None:
    """Remove temporary files of processes that ended here, and any that are a day old."""
    for entry in os.scandir(folder):
        if not entry.name.startswith(TEMPORARY_PREFIX):
            continue
        tag = entry.name.removeprefix(TEMPORARY_PREFIX).rpartition("-")[0]
        with suppress(FileNotFoundError):  # its owner, or another cleaner, was first
            if is_tag_gone(tag) or time.time() - entry.stat().st_mtime > _FOREIGN_TEMPORARY_AGE_S:
                os.unlink(entry.path)
