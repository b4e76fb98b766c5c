"""Models behind an fsspec URL, fetched once into a private cache on the local disk."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from engine.checkpoints.reading import one_line
from engine.errors import MissingExtraError, ModelError

_EXTRAS = {"s3": ("s3fs", "s3"), "s3a": ("s3fs", "s3"), "gs": ("gcsfs", "gcs"), "gcs": ("gcsfs", "gcs")}
_VERSION_KEYS = (
    "ETag",
    "etag",
    "generation",
    "checksum",
    "md5Hash",
    "LastModified",
    "last_modified",
    "mtime",
)


def is_url(source: str) -> bool:
    """Whether `source` has a scheme (`s3://...`, `file:///...`)."""
    return "://" in source


def local_path_of(url: str) -> Path | None:
    """The path of a `file://` or `local://` URL, which needs no copy; None for any other."""
    scheme, _, rest = url.partition("://")
    return Path(rest).expanduser() if scheme in ("file", "local") else None


def cache_folder() -> Path:
    """Where fetched models lie: under $TIDEMILL_CACHE or the user's cache folder; for the user only."""
    chosen = os.environ.get("TIDEMILL_CACHE")
    base = Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "tidemill"
    folder = base.expanduser() / "models"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
    except OSError as error:
        raise ModelError(
            f"{folder}: the model cache cannot be made ({error.strerror}); "
            "set TIDEMILL_CACHE to a folder you can write"
        ) from error
    return folder


def download(url: str, wanted: Sequence[str]) -> Path:
    """Fetch a .gguf file, or the `wanted` files of a folder, and return its local copy.

    The copy is keyed by the URL and the remote versions and sizes, so a changed model is fetched again and an
    unchanged one is not; it appears whole or not at all. ModelError where it cannot be fetched.
    """
    shown = without_secrets(url)
    try:
        filesystem, remote = open_filesystem(url, "reading a model from")
        listing = _list(filesystem, remote, wanted, shown)
        target = cache_folder() / _key(url, listing)
        if not target.is_dir():
            _fetch(filesystem, listing, target)
    except (ModelError, MissingExtraError):
        raise
    except Exception as error:  # Each fsspec implementation raises its own library's errors.
        raise ModelError(
            f"{shown}: the model cannot be fetched ({type(error).__name__}: {_said(error, url)}); "
            "check the address, the credentials and the network"
        ) from error
    return target / listing[0][0] if remote.endswith(".gguf") else target


def open_filesystem(url: str, purpose: str) -> tuple[Any, str]:
    """The fsspec file system of a URL and the path in it. Raises ModelError, or MissingExtraError that begins
    with `purpose`.
    """
    import fsspec

    scheme = url.partition("://")[0]
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        package, extra = _EXTRAS.get(scheme, (None, None))
        if package is None or extra is None:
            raise ModelError(
                f"{scheme}://: needs a package that is not installed ({one_line(error)})"
            ) from error
        raise MissingExtraError(package, extra, f"{purpose} {scheme}://") from error
    except ValueError as error:
        raise ModelError(f"{without_secrets(url)}: {_said(error, url)}") from error


def _list(
    filesystem: Any, remote: str, wanted: Sequence[str], shown: str
) -> list[tuple[str, str, dict[str, Any]]]:
    """(name, remote path, info) of what is to be fetched."""
    if remote.endswith(".gguf"):
        return [(remote.rsplit("/", 1)[-1], remote, filesystem.info(remote))]
    entries = [entry for entry in filesystem.ls(remote, detail=True) if entry.get("type") == "file"]
    named = [(str(entry["name"]).rsplit("/", 1)[-1], str(entry["name"]), entry) for entry in entries]
    patterns = (*wanted, "*.gguf")
    kept = sorted(
        (item for item in named if any(fnmatch(item[0], p) for p in patterns)), key=lambda item: item[0]
    )
    names = {name for name, _, _ in kept}
    if "config.json" not in names and not any(name.endswith(".gguf") for name in names):
        raise ModelError(f"{shown}: no config.json and no .gguf file there, so it is not a model")
    # A folder may hold both forms; config.json says that it is meant as a Hugging Face one.
    return [item for item in kept if "config.json" not in names or not item[0].endswith(".gguf")]


def _key(url: str, listing: list[tuple[str, str, dict[str, Any]]]) -> str:
    versions = [
        (name, info.get("size"), *(str(info[key]) for key in _VERSION_KEYS if info.get(key) is not None))
        for name, _, info in listing
    ]
    return hashlib.sha256(repr((url, versions)).encode()).hexdigest()[:32]


def _fetch(filesystem: Any, listing: list[tuple[str, str, dict[str, Any]]], target: Path) -> None:
    partial = Path(tempfile.mkdtemp(prefix="partial-", dir=target.parent))
    try:
        for name, remote, info in listing:
            filesystem.get_file(remote, str(partial / name))
            size = info.get("size")
            if size is not None and (partial / name).stat().st_size != size:
                raise ModelError(f"{name}: {size} bytes were promised and others arrived; try again")
        try:
            partial.rename(target)
        except OSError:
            if not target.is_dir():  # Otherwise another process fetched the same model first.
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def without_secrets(url: str) -> str:
    """The URL as it may be shown: no user, password or query (which may carry a signature)."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _said(error: Exception, url: str) -> str:
    """A library's message, which may quote the URL, without what must not be shown."""
    parts = urlsplit(url)
    text = one_line(error, 1000)
    for secret in (parts.netloc.rpartition("@")[0], parts.query):
        if secret:
            text = text.replace(secret, "***")
    return one_line(text, 200)
