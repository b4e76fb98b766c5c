"""One attempt at a chunk, collected in memory and written to the local spool as whole, hashed files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import OutputError

if TYPE_CHECKING:
    from engine.errors import RequestError
    from engine.outputs import RequestOutput
    from pipeline.rows import Prompt, Reject


class BalanceError(OutputError):
    """Rows in are not rows out: a row of the chunk is missing or there twice."""


@dataclass(frozen=True, slots=True)
class SpoolFile:
    path: Path
    sha256: str
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkFiles:
    """A finished attempt: its files (`rejects` is None when there are none), counts and metrics summary."""

    shard: int
    chunk: int
    attempt: str
    start: int
    stop: int
    data: SpoolFile
    trace: SpoolFile
    rejects: SpoolFile | None
    counts: Mapping[str, int]
    metrics: Mapping[str, Any]

    def remove(self) -> None:
        """Delete the spool files."""
        raise NotImplementedError


class ChunkWriter:
    """Get one from `Ledger.writer(lease, chunk)`."""

    def add_completion(
        self,
        prompt: Prompt,
        output: RequestOutput | None,
        error: RequestError | None = None,
        *,
        is_duplicate: bool = False,
    ) -> None:
        """Take a row's completions: one data row per sample. With `error` (and no output) the row is rejected with
        the error's reason. `is_duplicate` marks a row whose output was fanned out from an identical one.
        """
        raise NotImplementedError

    def add_reject(self, reject: Reject) -> None:
        raise NotImplementedError

    def close(self, metrics: Mapping[str, Any]) -> ChunkFiles:
        """Write the files, rows sorted by position and sample. BalanceError unless every row of the chunk is there
        exactly once; RetryLater when the spool's disk is full (nothing is left behind)."""
        raise NotImplementedError

    def abandon(self) -> None:
        """Drop the attempt (draining); safe to call at any time."""
        raise NotImplementedError
