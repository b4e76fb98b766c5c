"""From what the user named (a file, a folder, a glob, or a list of them) to the files it means."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import fsspec

from engine.errors import InputError
from pipeline.input_files import errors_named, filesystem, scheme_of, url_of

ShardFormat = Literal["parquet", "jsonl", "datasets"]

_EXTENSIONS: dict[str, ShardFormat] = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".jsonlines": "jsonl",
}
_COMPRESSED = (".gz", ".zst")
_MAGIC = frozenset("*?[")


@dataclass(frozen=True, slots=True)
class InputFile:
    name: str  # relative to the input's root, with forward slashes
    url: str
    path: str  # inside fs
    fs: fsspec.AbstractFileSystem
    info: dict[str, Any]
    format: ShardFormat


@dataclass(frozen=True, slots=True)
class _Match:
    """The files that one of the named paths means, under the folder it is rooted at."""

    scheme: str
    fs: fsspec.AbstractFileSystem
    root: str
    files: dict[str, dict[str, Any]]  # path inside fs -> the store's facts
    formats: dict[str, ShardFormat]


def find_files(paths: Sequence[str], format: str) -> list[InputFile]:
    """The files, each once, sorted by name. InputError for a path that matches nothing."""
    matches = [_match(path, format) for path in paths]
    schemes = {match.scheme for match in matches}
    found: dict[str, InputFile] = {}
    for match in matches:
        root = _common_root([other.root for other in matches if other.scheme == match.scheme])
        for path, info in match.files.items():
            name = path.removeprefix(root).lstrip("/")
            name = name if len(schemes) == 1 else f"{match.scheme}/{name}"
            found[name] = InputFile(name, url_of(match.fs, path), path, match.fs, info, match.formats[path])
    return [found[name] for name in sorted(found)]


def format_of(path: str) -> ShardFormat | None:
    """The format a file's extension stands for, None for an unknown one."""
    stem, extension = posixpath.splitext(path.lower())
    if extension in _COMPRESSED:
        inner = _EXTENSIONS.get(posixpath.splitext(stem)[1])
        return inner if inner == "jsonl" else None
    return _EXTENSIONS.get(extension)


def _match(named: str, format: str) -> _Match:
    scheme = scheme_of(named)
    with errors_named(named, "list"):
        fs, path = filesystem(named)
        path = path.rstrip("/") or "/"
        if _MAGIC & set(path) and not fs.exists(path):  # a name may hold a bracket
            root = _fixed_folder(path)
            listed = _files_only(fs.glob(path, detail=True))
            visible = {file: info for file, info in listed.items() if not _is_hidden(file, root)}
            # As in a shell, hidden files are meant only where the pattern itself is of hidden ones.
            return _Match(scheme, fs, root, *_chosen(named, visible or listed, format, is_folder=False))
        if fs.isdir(path):
            listed = fs.find(path, detail=True)
            visible = {file: info for file, info in _files_only(listed).items() if not _is_hidden(file, path)}
            return _Match(scheme, fs, path, *_chosen(named, visible, format, is_folder=True))
        listed = {path: fs.info(path)}
        return _Match(scheme, fs, posixpath.dirname(path), *_chosen(named, listed, format, is_folder=False))


def _chosen(
    named: str, files: dict[str, dict[str, Any]], format: str, is_folder: bool
) -> tuple[dict[str, dict[str, Any]], dict[str, ShardFormat]]:
    if not files:
        raise InputError(f"{named}: matches no file; check input.path")
    formats: dict[str, ShardFormat] = {}
    for path in files:
        by_extension = format_of(path)
        if format in ("parquet", "jsonl") and not is_folder:
            formats[path] = format  # type: ignore[assignment]
        elif by_extension is not None and format in ("auto", by_extension):
            formats[path] = by_extension
        elif format == "jsonl" and _is_json(path):
            formats[path] = "jsonl"
        elif not is_folder:
            raise InputError(f"{path}: its extension names no format; set input.format=parquet or jsonl")
    if not formats:
        wanted = "Parquet or JSONL" if format == "auto" else format
        example = posixpath.basename(min(files))
        raise InputError(
            f"{named}: no {wanted} file among its {len(files)} files (such as {example}); set input.format"
        )
    return {path: info for path, info in files.items() if path in formats}, formats


def _is_json(path: str) -> bool:
    stem, extension = posixpath.splitext(path.lower())
    return (posixpath.splitext(stem)[1] if extension in _COMPRESSED else extension) == ".json"


def _files_only(listed: Any) -> dict[str, dict[str, Any]]:
    return {path: info for path, info in listed.items() if info.get("type", "file") != "directory"}


def _is_hidden(path: str, root: str) -> bool:
    """Whether a folder's tools keep the file for themselves: `_SUCCESS`, `.crc`, `_temporary/...`."""
    return any(part.startswith((".", "_")) for part in path.removeprefix(root).split("/"))


def _fixed_folder(pattern: str) -> str:
    """The folder that a glob's matches all lie under."""
    parts = pattern.split("/")
    fixed = next(i for i, part in enumerate(parts) if _MAGIC & set(part))
    return "/".join(parts[:fixed])


def _common_root(roots: Sequence[str]) -> str:
    return roots[0] if len(set(roots)) == 1 else posixpath.commonpath(roots)
