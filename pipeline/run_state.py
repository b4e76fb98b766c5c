"""Reading a run's records: job.json, the plan, commits and finished shards. Ledger and results both use
it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from engine.errors import OutputError
from pipeline.commits import CommitRecord, damaged, parse_record, retrying
from pipeline.manifest import ShardRecord
from pipeline.plan import RunPlan
from pipeline.row_order import WindowOrder, order_path
from pipeline.storage import Storage

JOB = "job.json"
JOB_VERSION = 2
MANIFEST = "manifest.json"
# Objects of a bucket that are asked for at once where many are: an answer takes some 20 ms.
NUM_READERS = 16


class RunState:
    """The records of one fingerprint. Records never change once there, so each is read at most once."""

    def __init__(self, storage: Storage, fingerprint: str):
        self.storage = storage
        self.fingerprint = fingerprint
        self.folder = f"_state/{fingerprint}"
        self._commits: dict[int, dict[int, CommitRecord]] = {}  # by shard and chunk
        self._shards: dict[int, ShardRecord] = {}
        self._last_window: WindowOrder | None = None  # the orders of a large shard are not all held

    def path(self, *parts: str) -> str:
        return "/".join([self.folder, *parts])

    def commit_path(self, shard: int, chunk: int) -> str:
        return self.path("commits", f"{shard:05d}", f"{chunk:05d}.json")

    def shard_path(self, shard: int) -> str:
        return self.path("shards", f"{shard:05d}.json")

    def read(self, path: str) -> bytes | None:
        return retrying(lambda: self.storage.read(path))

    def read_each(self, paths: Sequence[str]) -> Iterator[bytes | None]:
        """The content of each, in order; from a bucket some at a time, and few are held."""
        if not self.storage.requests_are_dear:
            yield from map(self.read, paths)
            return
        with ThreadPoolExecutor(NUM_READERS) as pool:
            for start in range(0, len(paths), 4 * NUM_READERS):
                yield from pool.map(self.read, paths[start : start + 4 * NUM_READERS])

    def list(self, *folder: str) -> list[str]:
        return retrying(lambda: self.storage.list(self.path(*folder)))

    def plan(self) -> RunPlan | None:
        """The frozen plan; None before it was made."""
        path = self.path("plan.json")
        data = self.read(path)
        if data is None:
            return None
        place = f"{self.storage.url}/{path}"
        try:
            return RunPlan.from_json(parse_record(data, place))
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(place) from error

    def window(self, shard: int, start: int) -> WindowOrder | None:
        """The recorded window that begins at row `start` of a shard; None when nobody has planned it yet.

        Raises OutputError when the record is not the one that the committed chunks were made by.
        """
        last = self._last_window
        if last is not None and (last.shard, last.start) == (shard, start):
            return last
        path = order_path(self.folder, shard, start)
        data = self.read(path)
        if data is None:
            return None
        window = WindowOrder.from_bytes(data, f"{self.storage.url}/{path}")
        if (window.shard, window.start) != (shard, start):
            raise damaged(f"{self.storage.url}/{path}")
        for record in self.committed(shard).values():
            if window.start <= record.start < window.stop and record.order != window.sha256:
                commit = f"{self.storage.url}/{self.commit_path(shard, record.chunk)}"
                raise OutputError(
                    f"{self.storage.url}/{path} is not the order that committed chunks were made in; "
                    f"put the old record back, or remove {commit} and start the same command again"
                )
        self._last_window = window
        return window

    def windows(self, shard: int, num_rows: int) -> Iterator[WindowOrder]:
        """The recorded windows of a shard of `num_rows` rows, in order, up to the first that is not there."""
        start = 0
        while start < num_rows:
            window = self.window(shard, start)
            if window is None:
                return
            yield window
            start = window.stop

    def num_committed(self, shard: int) -> int:
        return len(self.committed_chunks(shard))

    def committed(self, shard: int) -> dict[int, CommitRecord]:
        """The commit records of a shard by chunk, in order."""
        return {chunk: self.commit(shard, chunk) for chunk in self.committed_chunks(shard)}

    def committed_chunks(self, shard: int) -> list[int]:
        """The numbers of the shard's chunks that have a commit record."""
        return self._indices("commits", f"{shard:05d}")

    def commit(self, shard: int, chunk: int) -> CommitRecord:
        """A chunk's commit record, which is there."""
        if chunk not in self._commits.get(shard, ()):
            data = self.read(self.commit_path(shard, chunk)) or b""
            self.remember_commit(shard, chunk, data)
        return self._commits[shard][chunk]

    def remember_commit(self, shard: int, chunk: int, data: bytes) -> None:
        """Take note of a commit record that is known to be stored, so that it need not be read."""
        place = f"{self.storage.url}/{self.commit_path(shard, chunk)}"
        self._commits.setdefault(shard, {})[chunk] = CommitRecord.from_bytes(data, place)

    def forget_commits(self, shard: int) -> None:
        """Hold the shard's commit records no longer: it is finished."""
        self._commits.pop(shard, None)

    def finished(self) -> dict[int, ShardRecord]:
        """The records of finished shards, in order."""
        shards = self.finished_shards()
        unread = [shard for shard in shards if shard not in self._shards]
        paths = [self.shard_path(shard) for shard in unread]
        for shard, path, data in zip(unread, paths, self.read_each(paths), strict=True):
            self._shards[shard] = ShardRecord.from_bytes(data or b"", f"{self.storage.url}/{path}")
        return {shard: self._shards[shard] for shard in shards}

    def finished_shards(self) -> list[int]:
        """The numbers of the shards that have a record."""
        return self._indices("shards")

    def is_finished(self, shard: int) -> bool:
        """Whether a shard has a record; looks for nothing but that one."""
        if not self.knows_finished(shard):
            path = self.shard_path(shard)
            data = self.read(path)
            if data is None:
                return False
            self._shards[shard] = ShardRecord.from_bytes(data, f"{self.storage.url}/{path}")
        return True

    def knows_finished(self, shard: int) -> bool:
        """Whether a shard's record was read before."""
        return shard in self._shards

    def finished_shard(self, shard: int) -> ShardRecord:
        """A finished shard's record, which is there."""
        if shard not in self._shards:
            path = self.shard_path(shard)
            self._shards[shard] = ShardRecord.from_bytes(self.read(path) or b"", f"{self.storage.url}/{path}")
        return self._shards[shard]

    def _indices(self, *folder: str) -> list[int]:
        names = (name.removesuffix(".json") for name in self.list(*folder) if name.endswith(".json"))
        return sorted(int(name) for name in names if name.isdigit())


def read_job(storage: Storage) -> dict[str, Any] | None:
    """The content of job.json, None where there is none; OutputError when it is not ours to read."""
    data = retrying(lambda: storage.read(JOB))
    if data is None:
        return None
    place = f"{storage.url}/{JOB}"
    try:
        job = parse_record(data, place)
        version, _, _ = job["job_version"], job["fingerprint"], job["parts"]
    except (KeyError, OutputError) as error:
        raise OutputError(f"{place} is not a job.json of Tidemill; choose another folder") from error
    if version != JOB_VERSION:
        raise OutputError(
            f"{place} was written in version {version} of the output format and this program writes "
            f"{JOB_VERSION}; choose another folder, or use the program that wrote it"
        )
    return job
