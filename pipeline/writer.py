"""One attempt at a chunk: collected in memory, then written to the local spool as whole, hashed files.

Nothing of an attempt is published from here; `Ledger.commit_chunk` does that, from files that are finished.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from engine.errors import OutputError, RequestError
from engine.outputs import CompletionOutput, RequestOutput, TokenLogprob
from pipeline.commits import sha256_file
from pipeline.exact_duplicates import duplicate_key, num_duplicates
from pipeline.parquet_files import write_table
from pipeline.rows import Prompt, Reject, excerpt, place
from pipeline.schema import RESPONSE, CarriedColumn, carried_value, data_schema, trace_schema
from pipeline.storage import explain


class BalanceError(OutputError):
    """Rows in are not rows out: a row is missing, or there twice."""


@dataclass(frozen=True, slots=True)
class SpoolFile:
    path: Path
    sha256: str
    num_bytes: int

    @classmethod
    def of(cls, path: Path) -> SpoolFile:
        return cls(path, sha256_file(path), path.stat().st_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkFiles:
    """A finished attempt: its spool files (`rejects` is None when there are none), counts, keys of rows that
    could be duplicates (`pipeline/exact_duplicates.py`), metrics summary.
    """

    shard: int
    chunk: int
    attempt: str
    start: int
    stop: int
    order: str
    data: SpoolFile
    trace: SpoolFile
    rejects: SpoolFile | None
    counts: Mapping[str, int]
    duplicate_keys: bytes
    metrics: Mapping[str, Any]

    @property
    def by_kind(self) -> dict[str, SpoolFile]:
        files = {"data": self.data, "trace": self.trace, "rejects": self.rejects}
        return {kind: file for kind, file in files.items() if file is not None}

    def remove(self) -> None:
        """Delete the spool files; safe to call twice."""
        for file in self.by_kind.values():
            file.path.unlink(missing_ok=True)


CHUNK_SUFFIXES = {"data": ".data.parquet", "trace": ".trace.parquet", "rejects": ".rejects.jsonl"}


class ChunkWriter:
    """Collects one attempt at a chunk: the rows of a shard at `positions`, which run from place `start` on.

    Get one from `Ledger.writer(lease, chunk, window)`. `order` is the hash of the window's record. Times in
    trace/ are seconds since `started`, a reading of the clock that the engine's metrics use.
    """

    def __init__(
        self,
        spool_dir: Path,
        *,
        shard: int,
        chunk: int,
        start: int,
        positions: Sequence[int],
        order: str,
        source: str = "",
        carried: Sequence[CarriedColumn] = (),
        with_token_ids: bool = False,
        with_responses: bool = False,
        attempt: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.attempt = attempt or uuid.uuid4().hex
        self._spool_dir = spool_dir
        self._shard = shard
        self._source = source
        self._chunk = chunk
        self._start = start
        self._positions = frozenset(positions)
        self._order = order
        self._carried = tuple(carried)
        self._with_token_ids = with_token_ids
        self._schema = data_schema(carried, with_responses)
        self._started = clock()
        self._started_utc = datetime.now(UTC)
        self._rows: dict[int, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {}
        self._rejects: dict[int, Reject] = {}
        self._keys: dict[int, bytes] = {}

    @property
    def missing(self) -> list[int]:
        """Positions that are neither completed nor rejected yet."""
        return sorted(p for p in self._positions if p not in self._rows and p not in self._rejects)

    def add_completion(
        self,
        prompt: Prompt,
        output: RequestOutput | None,
        error: RequestError | None = None,
        response: str | None = None,
    ) -> Reject | None:
        """Take a row's completions, one data row per sample; the reject made instead, if one was.

        With `error` (and no output) the row is rejected for the error's reason. A carried value that does
        not fit its column's type rejects the row too. `response`: of a batch file's row, its answer as JSON.
        """
        if error is not None or output is None:
            if error is None:
                raise ValueError("a row without an output needs the error that explains it")
            return self._reject(prompt, error.reason, str(error), prompt.text or "")
        for sample in output.outputs:
            if sample.finish_reason == "error":
                message = f"sample {sample.index} could not go on: {sample.stop_reason}"
                return self._reject(prompt, "generation_failed", message, sample.text)
        carried: dict[str, Any] = {}
        for column in self._carried:
            value = prompt.carried.get(column.name)
            try:
                carried[column.output_name] = carried_value(column, value)
            except (pa.ArrowException, ValueError, TypeError, OverflowError):
                message = (
                    f"column {column.name!r} holds {type(value).__name__} where others hold {column.type}"
                )
                return self._reject(prompt, "wrong_type", message, value)
        self._claim_position(prompt.shard_index, prompt.position)
        self._keys[prompt.position] = duplicate_key(prompt)
        samples = sorted(output.outputs, key=lambda sample: sample.index)
        self._rows[prompt.position] = (
            [{**self._data_row(prompt, output, sample), **carried} for sample in samples],
            [self._trace_row(prompt, output, sample) for sample in samples],
        )
        if response is not None:
            self._rows[prompt.position][0][0][RESPONSE] = response
        return None

    def add_reject(self, reject: Reject) -> None:
        self._claim_position(reject.shard_index, reject.position)
        self._rejects[reject.position] = reject

    def _reject(self, prompt: Prompt, reason: str, message: str, value: object) -> Reject:
        reject = Reject(
            shard_index=prompt.shard_index,
            position=prompt.position,
            row_id=prompt.row_id,
            reason=reason,
            message=f"{place(self._source, prompt.position, None)}: {message}",
            source=self._source,
            excerpt=excerpt(value),
        )
        self.add_reject(reject)
        return reject

    def _claim_position(self, shard: int, position: int) -> None:
        if shard != self._shard or position not in self._positions:
            raise BalanceError(
                f"row {position} of shard {shard} is not of chunk {self._chunk} of shard {self._shard}"
            )
        if position in self._rows or position in self._rejects:
            raise BalanceError(f"row {position} of shard {shard} came out twice")

    def _data_row(self, prompt: Prompt, output: RequestOutput, sample: CompletionOutput) -> dict[str, Any]:
        sampling = prompt.sampling
        wants_logprobs = sampling.logprobs is not None and sample.logprobs is not None
        prompt_logprobs = output.prompt_logprobs if sampling.prompt_logprobs is not None else None
        return {
            "row_id": prompt.row_id,
            "sample_index": sample.index,
            "status": "ok",
            # A lone surrogate has no UTF-8 form.
            "text": sample.text.encode("utf-8", "replace").decode("utf-8"),
            "token_ids": list(sample.token_ids) if self._with_token_ids else None,
            "finish_reason": sample.finish_reason,
            "stop_reason": None if sample.stop_reason is None else str(sample.stop_reason),
            "num_prompt_tokens": len(prompt.token_ids),
            "num_generated_tokens": len(sample.token_ids),
            "prompt_truncated": prompt.was_truncated,
            "cumulative_logprob": sample.cumulative_logprob,
            "logprobs": _chosen(sample.logprobs) if wants_logprobs else None,
            "top_logprobs": _tops(sample.logprobs) if wants_logprobs else None,
            "prompt_logprobs": _chosen(prompt_logprobs),
            "prompt_top_logprobs": _tops(prompt_logprobs),
            "seed": sampling.seed,
            "error": None,
        }

    def _trace_row(self, prompt: Prompt, output: RequestOutput, sample: CompletionOutput) -> dict[str, Any]:
        times = output.metrics
        return {
            "row_id": prompt.row_id,
            "sample_index": sample.index,
            "shard": self._shard,
            "chunk": self._chunk,
            "attempt": self.attempt,
            "num_cached_tokens": output.num_cached_tokens,
            "num_preemptions": times.num_preemptions,
            "chunk_started": self._started_utc,
            "arrival_s": self._since(times.arrival_time),
            "first_scheduled_s": self._since(times.first_scheduled_time),
            "first_token_s": self._since(times.first_token_time),
            "finished_s": self._since(times.finished_time),
        }

    def _since(self, moment: float | None) -> float | None:
        return None if moment is None else moment - self._started

    def close(self, metrics: Mapping[str, Any]) -> ChunkFiles:
        """Write the files, rows sorted by position and sample index.

        Raises BalanceError unless every row of the chunk is there once, RetryLater when the spool's disk
        is full (then nothing of the attempt is left in the spool).
        """
        if self.missing:
            raise BalanceError(
                f"rows {self.missing[:5]} of shard {self._shard} came out neither as results nor as rejects; "
                "the chunk is not committed, start the same command again"
            )
        keys = b"".join(self._keys[position] for position in sorted(self._keys))
        duplicates = num_duplicates([keys])
        data = [row for position in sorted(self._rows) for row in self._rows[position][0]]
        trace = [row for position in sorted(self._rows) for row in self._rows[position][1]]
        paths = {kind: self._path(kind) for kind in CHUNK_SUFFIXES}
        try:
            self._spool_dir.mkdir(parents=True, exist_ok=True)
            write_table(paths["data"], pa.Table.from_pylist(data, schema=self._schema))
            write_table(paths["trace"], pa.Table.from_pylist(trace, schema=trace_schema()))
            if self._rejects:
                lines = [reject_line(self._rejects[position]) for position in sorted(self._rejects)]
                paths["rejects"].write_text("".join(lines), encoding="utf-8")
            files = {kind: SpoolFile.of(path) for kind, path in paths.items() if path.exists()}
        except OSError as error:
            self.abandon()
            raise explain(error, self._spool_dir, _approximate_size(data)) from error
        return ChunkFiles(
            shard=self._shard,
            chunk=self._chunk,
            attempt=self.attempt,
            start=self._start,
            stop=self._start + len(self._positions),
            order=self._order,
            data=files["data"],
            trace=files["trace"],
            rejects=files.get("rejects"),
            counts={
                "rows": len(self._positions),
                "ok": len(self._rows) - duplicates,
                "rejected": len(self._rejects),
                "duplicates": duplicates,
                "samples": len(data),
                "prompt_tokens": sum(rows[0]["num_prompt_tokens"] for rows, _ in self._rows.values() if rows),
                "generated_tokens": sum(row["num_generated_tokens"] for row in data),
            },
            duplicate_keys=keys,
            metrics=metrics,
        )

    def abandon(self) -> None:
        """Drop the attempt's spool files (draining, or a fault); safe to call at any time."""
        for kind in CHUNK_SUFFIXES:
            with suppress(FileNotFoundError):
                self._path(kind).unlink()

    def _path(self, kind: str) -> Path:
        return self._spool_dir / f"{self._shard:05d}-{self._chunk:05d}-{self.attempt}{CHUNK_SUFFIXES[kind]}"


def reject_line(reject: Reject) -> str:
    """A line of rejects/. What UTF-8 cannot hold (a lone surrogate) is written out as its escape."""
    fields = {
        key: value.encode("utf-8", "backslashreplace").decode("utf-8") if isinstance(value, str) else value
        for key, value in asdict(reject).items()
        if key != "shard_index"
    }
    line = {"row_id": fields.pop("row_id"), "shard": reject.shard_index, **fields}
    return json.dumps(line, ensure_ascii=False) + "\n"


def _chosen(entries: Sequence[TokenLogprob | None] | None) -> list[float | None] | None:
    return None if entries is None else [entry and entry.logprob for entry in entries]


def _tops(entries: Sequence[TokenLogprob | None] | None) -> list[list[dict[str, Any]] | None] | None:
    if entries is None:
        return None
    return [
        None if entry is None else [{"token_id": token, "logprob": logprob} for token, logprob in entry.top]
        for entry in entries
    ]


def _approximate_size(rows: list[dict[str, Any]]) -> int:
    return sum(
        len(row["text"] or "") + len(row.get(RESPONSE) or "") + 4 * row["num_generated_tokens"] + 256
        for row in rows
    )
