"""Files to read from: which URLs are allowed, how they are opened, what pins their version.

URLs come from the configuration alone, never from rows. Only the schemes below are opened, and never a chain
(`a::b`), because fsspec would otherwise run whatever driver a URL names.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

import fsspec
import pyarrow as pa

from engine.errors import ConfigError, InputError, MissingExtraError, RetryLater, TidemillError

# scheme -> (package, extra of ours that installs it)
_DRIVERS: dict[str, tuple[str, str | None] | None] = {
    "file": None,
    "local": None,
    "memory": None,
    "s3": ("s3fs", "s3"),
    "s3a": ("s3fs", "s3"),
    "gs": ("gcsfs", "gcs"),
    "gcs": ("gcsfs", "gcs"),
    "hf": ("huggingface_hub", None),
    "http": ("aiohttp", None),
    "https": ("aiohttp", None),
    "az": ("adlfs", None),
    "abfs": ("adlfs", None),
    "abfss": ("adlfs", None),
    "sftp": ("paramiko", None),
    "ssh": ("paramiko", None),
    "webdav": ("webdav4", None),
}
ALLOWED_SCHEMES = tuple(sorted(_DRIVERS))

END_BYTES = 64 * 1024
"""How much of each end of a file its version covers."""

# What pins a remote file, the best first. Only one is used: a listing and a single look-up agree on it, but
# they do not name the same set, nor write times the same way.
_PINS = ("etag", "generation", "crc32c", "md5hash", "content_md5", "blob_id", "versionid")
_TIMES = ("lastmodified", "last_modified", "updated", "mtime", "created")
_PASSING = {
    errno.EIO,
    errno.EBUSY,
    errno.EAGAIN,
    errno.ETIMEDOUT,
    errno.ECONNRESET,
    errno.ECONNREFUSED,
    errno.ENETUNREACH,
    errno.EHOSTUNREACH,
    errno.ESTALE,
    errno.EMFILE,
    errno.ENFILE,
    errno.EPIPE,
}
_STORE_CLIENTS = {
    "botocore",
    "aiobotocore",
    "s3fs",
    "aiohttp",
    "gcsfs",
    "google",
    "adlfs",
    "azure",
    "paramiko",
}


def scheme_of(url: str) -> str:
    """The URL's scheme in lower case (`file` for a plain path); ConfigError if it is not allowed."""
    if "::" in url:
        raise ConfigError(f"{url}: chained URLs ('::') are not opened; name the file itself")
    scheme, separator, _ = url.partition("://")
    if not separator:
        return "file"
    scheme = scheme.lower()
    if scheme not in _DRIVERS:
        raise ConfigError(f"{url}: scheme {scheme!r} is not opened; use a local path or one of {_listed()}")
    return "file" if scheme == "local" else scheme


def _listed() -> str:
    return ", ".join(f"{scheme}://" for scheme in ALLOWED_SCHEMES)


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of `url` and the path inside it (absolute on a local disk)."""
    scheme = scheme_of(url)
    if scheme == "file":
        local = fsspec.filesystem("file")
        path = url.partition("://")[2] if "://" in url else url
        return local, os.path.abspath(os.path.expanduser(path))
    try:
        # A cached listing would hide files that appeared, and versions that changed, since it was made.
        fs, path = fsspec.url_to_fs(scheme + url[len(scheme) :], use_listings_cache=False)
    except ImportError as error:
        package, extra = _DRIVERS[scheme] or (scheme, None)
        if extra is not None:
            raise MissingExtraError(package, extra, f"{url}:") from error
        raise ConfigError(f"{url}: needs the package {package!r}: pip install {package}") from error
    return fs, path


def is_local(fs: fsspec.AbstractFileSystem) -> bool:
    return "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)


def url_of(fs: fsspec.AbstractFileSystem, path: str) -> str:
    """A URL that opens `path` again: a plain path on a local disk."""
    return path if is_local(fs) else fs.unstrip_protocol(path)


def open_file(fs: fsspec.AbstractFileSystem, path: str) -> BinaryIO:
    return cast(BinaryIO, fs.open(path, "rb"))


@contextmanager
def errors_named(url: str, what: str = "read") -> Iterator[None]:
    """Turns storage and decoding errors inside it into InputError, or RetryLater where the fault may pass.

    An OSError without an errno is how pyarrow reports bytes it cannot decode.
    """
    try:
        yield
    except TidemillError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{url}: no such file; check input.path") from error
    except PermissionError as error:
        raise InputError(f"{url}: permission denied; check the file's mode or the credentials") from error
    except IsADirectoryError as error:
        raise InputError(f"{url}: is a folder, not a file") from error
    except TimeoutError as error:
        raise RetryLater(f"{url}: timed out: {one_line(error)}; start again later") from error
    except MemoryError as error:
        raise InputError(
            f"{url}: cannot {what} it: {one_line(error)}; a value is too large to decode"
        ) from error
    except OSError as error:
        if error.errno in _PASSING:
            raise RetryLater(f"{url}: cannot {what} it now: {one_line(error)}; start again later") from error
        raise InputError(damaged(url, error)) from error
    except (pa.ArrowException, EOFError, UnicodeDecodeError) as error:
        raise InputError(damaged(url, error)) from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in _STORE_CLIENTS:
            raise
        # A store's client raises its own errors for credentials, endpoints and answers it cannot use.
        message = f"cannot {what} it: {one_line(error)}; check the credentials and the address"
        raise InputError(f"{url}: {message}") from error


def damaged(url: str, error: BaseException) -> str:
    return f"{url}: damaged or cut short: {one_line(error)}; write the file again or take it out of the input"


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:299] + "…"


def file_version(
    fs: fsspec.AbstractFileSystem, path: str, info: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What changes when the file's content does, as JSON values, without reading the whole file.

    Local: size, mtime, inode and a hash of both ends. Remote: size and the store's own version, or its time
    of change; where it has neither, a hash of both ends. `info` is what a listing said of the file.
    """
    if is_local(fs):
        stat = os.stat(path)
        version: dict[str, Any] = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "inode": stat.st_ino}
        return version | {"ends_sha256": _hash_of_ends(fs, path, stat.st_size)}
    for names in (_PINS, _TIMES):
        if info is None or names is _TIMES:
            info = fs.info(path)
        found = {key.lower(): value for key, value in info.items() if value is not None}
        for name in names:
            if name in found:
                return {"size": found.get("size"), name: str(found[name])}
    size = fs.size(path)
    return {"size": size, "ends_sha256": _hash_of_ends(fs, path, size or 0)}


def _hash_of_ends(fs: fsspec.AbstractFileSystem, path: str, size: int) -> str:
    digest = hashlib.sha256()
    with open_file(fs, path) as file:
        digest.update(file.read(END_BYTES))
        if size > END_BYTES:
            file.seek(max(END_BYTES, size - END_BYTES))
            digest.update(file.read(END_BYTES))
    return digest.hexdigest()
