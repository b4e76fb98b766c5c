"""The ledger: what of a run is claimed, committed and finished, kept in the output folder itself.

The intended order of calls (a worker of one process; several may run at once on one output):

    storage = open_storage(output.path)
    storage.check()                                   # OutputError before anything slow is loaded
    with Ledger.open(storage, parts=..., config=..., make_plan=..., spool_dir=..., merge_metrics=...) as ledger:
        for shard in ledger.unfinished():
            lease = ledger.claim(shard)               # None: somebody else holds it, come back later
            if lease is None: continue
            suspects = ledger.suspects(shard)         # rows to reject as `quarantined`, rows to run alone
            for chunk in ledger.missing_chunks(shard):
                writer = ledger.writer(lease, chunk)
                ... lease.set_in_flight(row_ids, progress=steps) before each engine.step() that follows a change
                ... writer.add_completion(prompt, output) / writer.add_reject(reject)
                files = writer.close(metrics=summary) # BalanceError unless every row of the chunk is there once
                ledger.commit_chunk(lease, files, input_version=current_version(shard))   # False: another won
            ledger.finalise_shard(shard)              # once missing_chunks(shard) is empty
            lease.release()
        manifest = ledger.finish()                    # None while a shard is unfinished

Only exclusive create decides anything: leases save work, commit records decide who won. Everything raises
`OutputError` (exit 2: not writable, damaged, another configuration), `InputChanged` (exit 2: the shard ends) or
`RetryLater` (exit 75: disk full, outcome unknown), with nothing half visible.

A row that kills the process is found by its heartbeats. A row that was in flight in the last two deaths of its
shard's workers is *isolated*: the worker runs it with nothing else in flight and calls
`lease.set_in_flight([row_id], progress=steps_so_far)` before every engine step. A row that was alone in flight in
the last three deaths at the same progress (or the last six at any) is *quarantined*: the worker writes a reject.
Deaths from outside (`kill -9`, a machine lost) hit a different row or step each time and so never quarantine one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engine.errors import InputError
from pipeline.commits import CommitRecord
from pipeline.lease import Lease, ProcessIdentity, Suspects
from pipeline.manifest import ShardRecord
from pipeline.plan import RunPlan
from pipeline.storage import Storage
from pipeline.writer import ChunkFiles, ChunkWriter

MetricsMerge = Callable[[list[dict[str, Any]]], dict[str, Any]]


class InputChanged(InputError):
    """A shard's content is no longer what was planned; the shard ends and none of its old and new rows are mixed."""


class Ledger:
    plan: RunPlan
    fingerprint: str
    storage: Storage  # of the output actually used: a fork's folder when forked
    is_fork: bool

    @classmethod
    def open(
        cls,
        storage: Storage,
        *,
        parts: Mapping[str, Any],
        config: Mapping[str, Any],
        make_plan: Callable[[], RunPlan],
        spool_dir: Path,
        merge_metrics: MetricsMerge,
        on_change: str = "refuse",
        heartbeat_s: float = 20.0,
        takeover_s: float = 120.0,
        owner: ProcessIdentity | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> Ledger:
        """Open or begin a run. `parts` are the named JSON-able values whose change invalidates results (config,
        model, tokenizer, template, sampling, inputs, ...); `config` is the whole resolved configuration, kept
        for the reader in job.json with secrets removed. `make_plan` is called only when there is no plan yet,
        and before anything is created. Raises OutputError naming the part that differs when the output belongs to
        another configuration and `on_change` is "refuse"; with "fork" the run goes to `fork-<8 digits>/` inside it.
        """
        raise NotImplementedError

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def unfinished(self) -> list[int]:
        """Indices of the shards that have no final files yet."""
        raise NotImplementedError

    def claim(self, shard: int) -> Lease | None:
        """Take the shard's lease, or None while another live worker holds it (call again some seconds later)."""
        raise NotImplementedError

    def suspects(self, shard: int) -> Suspects:
        """Rows implicated in deaths of this shard's workers: `.isolate` and `.quarantined`, sets of row ids."""
        raise NotImplementedError

    def committed(self, shard: int) -> dict[int, CommitRecord]:
        raise NotImplementedError

    def missing_chunks(self, shard: int) -> list[int]:
        raise NotImplementedError

    def writer(self, lease: Lease, chunk: int) -> ChunkWriter:
        """A writer for one attempt at a chunk; its clock (trace times) starts now."""
        raise NotImplementedError

    def commit_chunk(self, lease: Lease, files: ChunkFiles, *, input_version: Mapping[str, Any]) -> bool:
        """Publish an attempt. True: it counts; False: another attempt at the chunk already did, ours is discarded.

        Raises InputChanged when `input_version` (as found now) is not the planned one, RetryLater when the
        outcome stays unknown.
        """
        raise NotImplementedError

    def finalise_shard(self, shard: int) -> ShardRecord:
        raise NotImplementedError

    def finish(self) -> dict[str, Any] | None:
        """Write manifest.json once every shard is final, and return it; None while one is not."""
        raise NotImplementedError

    def close(self) -> None:
        """Release every lease still held and stop the heartbeat."""
        raise NotImplementedError
