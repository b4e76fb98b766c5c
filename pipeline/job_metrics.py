"""What a job says of itself while it runs, beside what its engine does: rows, shards, commits, the store."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from engine.monitoring.definitions import Definition, Sample
from pipeline.work_watch import WorkWatch

if TYPE_CHECKING:
    from pipeline.ledger import Ledger
    from pipeline.metrics import Metrics
    from pipeline.progress import Standing


ROWS = Definition("job_rows", "gauge", "Rows of all shards.", ())
ROWS_DONE = Definition(
    "job_rows_done_total",
    "counter",
    "Rows that have a result or were rejected, those of earlier attempts and of open chunks included.",
    (),
)
ROWS_REJECTED = Definition("job_rows_rejected_total", "counter", "Those of them that were rejected.", ())
REJECTS = Definition(
    "job_rejects_committed_total",
    "counter",
    "Rejected rows of chunks that this attempt committed, by reason.",
    ("reason",),
)
SHARDS = Definition("job_shards", "gauge", "Shards there are.", ())
SHARDS_FINISHED = Definition(
    "job_shards_finished_total",
    "counter",
    "Shards that were finished when this attempt began, or that it finished.",
    (),
)
CHUNKS = Definition("job_chunks", "gauge", "Chunks of all shards.", ())
CHUNKS_COMMITTED = Definition(
    "job_chunks_committed_total",
    "counter",
    "Chunks this attempt committed (won), and those that another one had committed before (lost).",
    ("outcome",),
)
STORE_REQUESTS = Definition(
    "job_store_requests_total",
    "counter",
    "Requests to the output's store until the last commit, by kind; a local disk has none.",
    ("kind",),
)
WAIT_SECONDS = Definition(
    "job_wait_seconds_total",
    "counter",
    "Seconds until the last commit that the engine had nothing to do for want of rows.",
    (),
)

JOB_METRICS = (
    ROWS,
    ROWS_DONE,
    ROWS_REJECTED,
    REJECTS,
    SHARDS,
    SHARDS_FINISHED,
    CHUNKS,
    CHUNKS_COMMITTED,
    STORE_REQUESTS,
    WAIT_SECONDS,
)


class JobMetrics(WorkWatch):
    """Counts a run, as an `engine.monitoring.metrics.Source`."""

    definitions = JOB_METRICS

    def __init__(self, ledger: Ledger):
        plan = ledger.plan
        self._lock = threading.Lock()
        self._num_rows, self._num_shards = plan.num_rows, plan.num_shards
        self._num_chunks = sum(plan.num_chunks(shard) for shard in range(plan.num_shards))
        counts = ledger.counts()
        self._rows_done, self._rows_rejected = counts["rows"], counts["rejected"]
        self._shards_finished = plan.num_shards - len(ledger.unfinished())
        self._commits = Counter(won=0, lost=0)
        self._rejects: Counter[str] = Counter()
        self._requests: Counter[str] = Counter()
        self._wait_seconds = 0.0

    def stands(self, standing: Standing) -> None:
        with self._lock:
            self._rows_done, self._rows_rejected = standing.rows_done, standing.rows_rejected

    def committed(self, metrics: Metrics, is_ours: bool) -> None:
        with self._lock:
            self._commits["won" if is_ours else "lost"] += 1
            self._requests.update(metrics.store_requests)
            self._wait_seconds += metrics.wait_seconds
            if is_ours:
                self._rejects.update(metrics.rejected)

    def shard_finished(self) -> None:
        with self._lock:
            self._shards_finished += 1

    def samples(self) -> Iterator[Sample]:
        with self._lock:
            found = [
                Sample(ROWS, (), self._num_rows),
                Sample(ROWS_DONE, (), self._rows_done),
                Sample(ROWS_REJECTED, (), self._rows_rejected),
                Sample(SHARDS, (), self._num_shards),
                Sample(SHARDS_FINISHED, (), self._shards_finished),
                Sample(CHUNKS, (), self._num_chunks),
                Sample(WAIT_SECONDS, (), self._wait_seconds),
            ]
            for definition, counts in (
                (REJECTS, self._rejects),
                (CHUNKS_COMMITTED, self._commits),
                (STORE_REQUESTS, self._requests),
            ):
                found += [Sample(definition, (label,), count) for label, count in counts.items()]
        yield from found

    def facts(self) -> Mapping[str, str]:
        with self._lock:
            share = self._rows_done / self._num_rows if self._num_rows else 1.0
            return {
                "Rows": f"{self._rows_done:,} of {self._num_rows:,} ({share:.0%})",
                "Rejected rows": f"{self._rows_rejected:,}",
                "Chunks committed": f"{self._commits['won']:,}",
                "Shards finished": f"{self._shards_finished:,} of {self._num_shards:,}",
            }
