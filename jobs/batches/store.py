"""Where files and batches are kept: a local folder that survives its server.

    files/<id>.json, files/<id>.data      what is known of a file, and its bytes
    batches/<id>/batch.json               how a batch stands; written anew, whole, each time
    batches/<id>/input.jsonl              its input, which stays when the uploaded file is deleted
    batches/<id>/run/                     the output of its run, with the ledger

A record is written after what it refers to, and removed before it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import threading
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from engine.errors import ConfigError, OutputError
from engine.server.batches.backend import (
    Batch,
    BatchFault,
    FilePurpose,
    NotFound,
    Refused,
    RequestCounts,
    StoredFile,
)

T = TypeVar("T")
MAX_FILE_BYTES = 200 * 2**20
COPIED_BYTES = 1 << 20
_ID = re.compile(r"(file|batch)-[0-9a-f]{24,32}|batch_[0-9a-f]{24,32}")


class BatchStore:
    """Files and batches by their ids. One server a folder: ConfigError where another has it open."""

    def __init__(self, root: str | Path, *, max_file_bytes: int = MAX_FILE_BYTES):
        if "://" in str(root):
            raise ConfigError(f"{root}: batches are kept in a local folder; give its path")
        self.max_file_bytes = max_file_bytes
        self._root = Path(root)
        self._files, self._batches = self._root / "files", self._root / "batches"
        try:
            for folder in (self._root, self._files, self._batches):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock_file = open(self._root / "lock", "w")  # noqa: SIM115 - `close` closes it
        except OSError as error:
            raise ConfigError(f"{root}: cannot keep batches here: {error.strerror}") from error
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock_file.close()
            raise ConfigError(f"{root}: another server keeps its batches here; give each its own") from error
        self._lock = threading.Lock()
        self._known_files = {file.id: file for file in map(_file_of, _records(self._files.glob("*.json")))}
        self._known = {b.id: b for b in map(_batch_of, _records(self._batches.glob("*/batch.json")))}

    def close(self) -> None:
        """Let another server have the folder."""
        self._lock_file.close()

    # -- files -------------------------------------------------------------------------------------

    def add_file(
        self,
        tenant: str | None,
        filename: str,
        content: BinaryIO,
        purpose: FilePurpose,
        created_at: int,
        *,
        file_id: str | None = None,
        max_bytes: int | None = None,
    ) -> StoredFile:
        """Keep a file. `file_id`: adding it again replaces it. Raises Refused over `max_bytes`."""
        file_id = file_id or f"file-{uuid.uuid4().hex[:24]}"
        path = self._data_path(file_id)
        num_bytes = _copy(content, path, max_bytes)
        file = StoredFile(
            id=file_id,
            tenant=tenant,
            filename=filename,
            purpose=purpose,
            num_bytes=num_bytes,
            created_at=created_at,
        )
        _write_whole(self._files / f"{file_id}.json", asdict(file))
        with self._lock:
            self._known_files[file_id] = file
        return file

    def file(self, tenant: str | None, file_id: str) -> StoredFile:
        with self._lock:
            return _owned(self._known_files, tenant, file_id, "file")

    def files(self, tenant: str | None) -> list[StoredFile]:
        """The newest first."""
        with self._lock:
            found = [file for file in self._known_files.values() if file.tenant == tenant]
        return sorted(found, key=lambda file: (file.created_at, file.id), reverse=True)

    def content(self, tenant: str | None, file_id: str) -> Iterator[bytes]:
        """Opens the file at once, so that one deleted meanwhile is read to its end."""
        self.file(tenant, file_id)
        try:
            file = open(self._data_path(file_id), "rb")  # noqa: SIM115 - closed by the iterator
        except FileNotFoundError as error:
            raise NotFound("file", file_id) from error
        return _pieces(file)

    def delete_file(self, tenant: str | None, file_id: str) -> None:
        with self._lock:
            _owned(self._known_files, tenant, file_id, "file")
            (self._files / f"{file_id}.json").unlink(missing_ok=True)
            del self._known_files[file_id]
        self._data_path(file_id).unlink(missing_ok=True)

    # -- batches -----------------------------------------------------------------------------------

    def add_batch(self, batch: Batch) -> None:
        """Keep a new batch, and its input. Raises NotFound where that is deleted at this moment."""
        folder = self.folder(batch.id)
        folder.mkdir(mode=0o700)
        try:
            os.link(self._data_path(batch.input_file_id), folder / "input.jsonl")
        except FileNotFoundError as error:
            shutil.rmtree(folder)
            raise NotFound("file", batch.input_file_id) from error
        self.put_batch(batch)

    def put_batch(self, batch: Batch) -> None:
        """Keep how a batch stands."""
        _write_whole(self.folder(batch.id) / "batch.json", asdict(batch))
        with self._lock:
            self._known[batch.id] = batch

    def batch(self, tenant: str | None, batch_id: str) -> Batch:
        with self._lock:
            return _owned(self._known, tenant, batch_id, "batch")

    def batches(self, tenant: str | None) -> list[Batch]:
        """The newest first."""
        with self._lock:
            found = [batch for batch in self._known.values() if batch.tenant == tenant]
        return sorted(found, key=lambda batch: (batch.created_at, batch.id), reverse=True)

    def unfinished(self) -> list[Batch]:
        """Of all tenants, the oldest first."""
        with self._lock:
            found = [batch for batch in self._known.values() if not batch.is_finished]
        return sorted(found, key=lambda batch: (batch.created_at, batch.id))

    def folder(self, batch_id: str) -> Path:
        return self._batches / _checked_id(batch_id)

    def _data_path(self, file_id: str) -> Path:
        return self._files / f"{_checked_id(file_id)}.data"


def output_file_id(batch_id: str, kind: str) -> str:
    """The id of a file that a batch makes: the same when it is made again."""
    return f"file-{hashlib.blake2b(f'{batch_id}:{kind}'.encode(), digest_size=12).hexdigest()}"


def _owned(items: Mapping[str, Any], tenant: str | None, item_id: str, kind: str) -> Any:
    item = items.get(item_id)
    if item is None or item.tenant != tenant:
        raise NotFound(kind, item_id)
    return item


def _checked_id(item_id: str) -> str:
    """Only ids that were made here are names of files."""
    if _ID.fullmatch(item_id) is None:
        raise AssertionError(f"{item_id!r} is no id that was made here")
    return item_id


def _copy(content: BinaryIO, path: Path, max_bytes: int | None) -> int:
    """The number of bytes copied; nothing is left of a copy that is refused or fails."""
    num_bytes = 0
    part = path.with_suffix(".part")
    try:
        with open(part, "wb") as file:
            while piece := content.read(COPIED_BYTES):
                num_bytes += len(piece)
                if max_bytes is not None and num_bytes > max_bytes:
                    raise Refused(f"the file is over {max_bytes} bytes", "file", "file_too_large")
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return num_bytes


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    with file:
        while piece := file.read(COPIED_BYTES):
            yield piece


def _write_whole(path: Path, value: Mapping[str, Any]) -> None:
    """Write a record so that a crash leaves the old one or the new one."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with open(part, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _records(paths: Iterator[Path]) -> Iterator[dict[str, Any]]:
    for path in paths:
        if path.name.startswith("."):
            continue  # of a write that was cut short
        try:
            yield json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise OutputError(f"{path} is damaged; move it away to go on without it") from error


def _file_of(record: dict[str, Any]) -> StoredFile:
    return StoredFile(**record)


def _batch_of(record: dict[str, Any]) -> Batch:
    names = {each.name for each in fields(Batch)}
    values = {name: value for name, value in record.items() if name in names}
    values["errors"] = tuple(BatchFault(**fault) for fault in record["errors"])
    values["counts"] = RequestCounts(**record["counts"])
    return Batch(**values)
