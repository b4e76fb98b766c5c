"""Which rows repeat the id of an earlier row, over all shards, without holding the ids in memory.

The first row in (shard, position) order owns an id, even one that is rejected for another reason, so the
answer does not depend on which shards were read, or in which order they run.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import RetryLater
from pipeline.row_ids import named_id
from pipeline.rows import Refused, Reject

if TYPE_CHECKING:
    from pipeline.shards import InputSettings, Shard

_INSERT_ROWS = 10_000


class IdIndex:
    """The repeated ids of a run, in a local SQLite file made by `build`."""

    def __init__(self, path: str | Path):
        # Read by whichever thread builds prompts, one at a time.
        uri = f"{Path(path).resolve().as_uri()}?mode=ro"
        self._db = sqlite3.connect(uri, uri=True, check_same_thread=False)

    @classmethod
    def build(cls, path: str | Path, shards: Sequence[Shard], settings: InputSettings) -> IdIndex:
        """Reads the id column of all shards once and writes the index at `path`, replacing what is there.

        Raises InputError when a shard cannot be read, RetryLater when the disk of `path` is full.
        """
        if settings.id_column is None:
            raise ValueError("rows without an id column have ids that cannot repeat")
        unfinished = Path(f"{path}.unfinished")
        unfinished.unlink(missing_ok=True)
        try:
            with closing(sqlite3.connect(unfinished)) as db:
                _fill(db, _ids(shards, settings))
        except sqlite3.OperationalError as error:
            raise RetryLater(
                f"{unfinished}: cannot index the ids: {error}; make room on that disk"
            ) from error
        os.replace(unfinished, path)
        return cls(path)

    @property
    def num_duplicates(self) -> int:
        """Rows that repeat an earlier row's id."""
        return self._db.execute("SELECT COALESCE(SUM(num_rows - 1), 0) FROM repeated").fetchone()[0]

    def first_of(self, row_id: str, shard_index: int, position: int) -> tuple[int, int] | None:
        """(shard index, position) of the row that owns this id, or None when this row does."""
        found = self._db.execute(
            "SELECT shard, position FROM repeated WHERE id_hash = ?", (_hash(row_id),)
        ).fetchone()
        return None if found is None or found == (shard_index, position) else found

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> IdIndex:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _ids(shards: Iterable[Shard], settings: InputSettings) -> Iterator[tuple[bytes, int, int]]:
    from pipeline.shards import read_rows  # the prompt builder needs this module, and no reader

    column = settings.id_column
    assert column is not None
    for shard in shards:
        for row in read_rows(shard, settings, columns=(column,)):
            if isinstance(row, Reject) or column not in row.columns:
                continue
            try:
                row_id = named_id(row.columns[column], column)
            except Refused:
                continue  # rejected where prompts are built, with its reason
            yield _hash(row_id), row.shard_index, row.position


def _fill(db: sqlite3.Connection, ids: Iterator[tuple[bytes, int, int]]) -> None:
    # A crash leaves a file that is never used, so nothing is journalled or synced. SQLite sorts on disk, in
    # runs of at most its cache, whatever the number of ids; only the repeated ones are kept.
    db.executescript(
        """
        PRAGMA journal_mode = OFF;
        PRAGMA synchronous = OFF;
        PRAGMA temp_store = FILE;
        PRAGMA cache_size = -32768;
        CREATE TABLE ids (id_hash BLOB NOT NULL, shard INTEGER NOT NULL, position INTEGER NOT NULL);
        """
    )
    while batch := [row for _, row in zip(range(_INSERT_ROWS), ids, strict=False)]:
        db.executemany("INSERT INTO ids VALUES (?, ?, ?)", batch)
    # Insertion was in (shard, position) order, so the least rowid is the first row.
    db.executescript(
        """
        CREATE TABLE repeated (
            id_hash BLOB PRIMARY KEY,
            shard INTEGER NOT NULL,
            position INTEGER NOT NULL,
            num_rows INTEGER NOT NULL
        ) WITHOUT ROWID;
        INSERT INTO repeated
            SELECT ids.id_hash, ids.shard, ids.position, many.num_rows
            FROM (
                SELECT MIN(rowid) AS first, COUNT(*) AS num_rows FROM ids GROUP BY id_hash HAVING COUNT(*) > 1
            ) AS many JOIN ids ON ids.rowid = many.first;
        DROP TABLE ids;
        VACUUM;
        """
    )
    db.commit()


def _hash(row_id: str) -> bytes:
    return hashlib.blake2b(row_id.encode(), digest_size=16).digest()
