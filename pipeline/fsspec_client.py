"""What buckets behind fsspec have in common, whatever store they are of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.object_storage import ObjectClient
from pipeline.request_meter import RequestMeter


class FsspecClient(ObjectClient):
    """A bucket through an fsspec file system, which `connect` sets as `_fs` and has count its requests.

    max_requests_per_second: None does not limit them.
    """

    _fs: Any

    def __init__(self, bucket: str, max_requests_per_second: float | None = None):
        self.bucket = bucket
        self._meter = RequestMeter(max_requests_per_second)
        self.connect()

    def take_requests(self) -> Mapping[str, int]:
        return self._meter.take()

    def create(self, key: str, data: bytes) -> None:
        self._fs.pipe_file(self._path(key), data, mode="create")

    def overwrite(self, key: str, data: bytes) -> None:
        self._fs.pipe_file(self._path(key), data)

    def fetch(self, key: str, path: Path) -> None:
        self._fs.get_file(self._path(key), str(path))

    def _path(self, key: str) -> str:
        return f"{self.bucket}/{key}"
