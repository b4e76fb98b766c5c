"""The ledger: what of a run is claimed, committed and finished, kept in the output folder itself.

The intended order of calls, by a worker of one process (several may run at once on one output):

    storage = open_storage(output.path)
    storage.check()                                  # OutputError before anything slow is loaded
    with Ledger.open(storage, parts=..., make_plan=..., ...) as ledger:
        for shard in ledger.unfinished():
            lease = ledger.claim(shard)              # None: somebody else holds it, come back later
            if lease is None: continue
            suspects = ledger.suspects(shard)        # rows to reject as `quarantined`, rows to run alone
            for chunk in ledger.missing_chunks(shard):
                window = ledger.window(shard, start) or ledger.settle_window(planned)
                writer = ledger.writer(lease, chunk, window)
                ... lease.set_in_flight(row_ids)     # whenever they change, before the next engine.step()
                ... writer.add_completion(prompt, output) or writer.add_reject(reject), in any order
                files = writer.close(metrics)        # BalanceError unless every row is there once
                ledger.commit_chunk(lease, files, input_version=current_version(shard))  # False: another won
            ledger.finalise_shard(shard)             # once missing_chunks(shard) is empty
            lease.release()
        manifest = ledger.finish()                   # None while a shard is unfinished

Only exclusive create decides anything: leases save work, commit records decide who won. What goes wrong is
`OutputError` (exit 2: not writable, damaged, another configuration), `InputChanged` (exit 2: the shard ends)
or `RetryLater` (exit 75: disk full, outcome unknown), with nothing half visible.

A row that kills the process is found from heartbeats (pipeline/suspects.py). An *isolated* row is run with
nothing else in flight, calling `lease.set_alone(row_id, num_steps_so_far)` before every engine step.
A *quarantined* row becomes a reject with that reason.

A changed configuration is refused, or with `on_change="fork"` runs into `<output>/fork-<8 digits>/`, an
output folder of its own; what was there stays as it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from engine.errors import InputError, OutputError, TidemillError
from pipeline.commits import CommitRecord, FileRef, publish_file, publish_record, retrying
from pipeline.finalise import Finaliser, MetricsMerge
from pipeline.fingerprint import Fingerprint, canonical_json, readable_json
from pipeline.job_file import begin_run
from pipeline.lease import HEARTBEAT_S, TAKEOVER_S, Lease, LeaseBook, Suspects
from pipeline.manifest import ShardRecord, check_balance, manifest, sum_counts
from pipeline.plan import RunPlan
from pipeline.process_identity import ProcessIdentity
from pipeline.row_order import WindowOrder, order_path
from pipeline.run_state import MANIFEST, RunState
from pipeline.storage import Storage
from pipeline.suspects import find_suspects
from pipeline.writer import CHUNK_SUFFIXES, ChunkFiles, ChunkWriter


class InputChanged(InputError):
    """A shard's content is not what was planned: the shard ends, none of its old and new rows are mixed."""


class Ledger:
    """One run's records. Open it with `Ledger.open`; `storage` is the output used, a fork's when
    `is_fork`.
    """

    def __init__(
        self,
        storage: Storage,
        fingerprint: str,
        plan: RunPlan,
        *,
        is_fork: bool,
        spool_dir: Path,
        merge_metrics: MetricsMerge,
        leases: LeaseBook,
    ):
        self.storage = storage
        self.fingerprint = fingerprint
        self.plan = plan
        self.is_fork = is_fork
        self._state = RunState(storage, fingerprint)
        self._spool_dir = spool_dir
        self._leases = leases
        self._finaliser = Finaliser(self._state, plan, spool_dir, merge_metrics)
        self._num_attempts: dict[tuple[int, int], int] = {}
        self._to_rebuild: frozenset[int] = frozenset()  # finished, and a file of theirs is gone

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
        heartbeat_s: float = HEARTBEAT_S,
        takeover_s: float = TAKEOVER_S,
        owner: ProcessIdentity | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> Ledger:
        """Open or begin a run.

        `parts` are the named JSON values whose change invalidates results (config, model, tokenizer,
        template, sampling, inputs, ...). `config` is the whole resolved configuration, kept in job.json
        for its readers. Secrets are removed from both. `make_plan` is called only when there is no plan
        yet, and before anything is created. `clock` (seconds) times take-overs.

        Raises OutputError saying which part differs when the output belongs to another configuration and
        `on_change` is "refuse".
        """
        begun = begin_run(storage, Fingerprint.of(parts), config, make_plan, on_change)
        storage = begun.state.storage
        leases = LeaseBook(
            storage,
            begun.state.folder,
            owner=owner or ProcessIdentity.of_this_process(),
            heartbeat_s=heartbeat_s,
            takeover_s=takeover_s,
            clock=clock,
        )
        return cls(
            storage,
            begun.state.fingerprint,
            begun.plan,
            is_fork=begun.is_fork,
            spool_dir=spool_dir,
            merge_metrics=merge_metrics,
            leases=leases,
        )

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        # A crash is left as a crash, leases unreleased, so that a row that always causes it is found.
        orderly = kind is None or issubclass(kind, (TidemillError, KeyboardInterrupt, SystemExit))
        self.close(release=orderly)

    def unfinished(self) -> list[int]:
        """Indices of the shards without (all of) their final files."""
        done = self._state.finished()
        self._to_rebuild = frozenset(shard for shard, record in done.items() if not self._is_whole(record))
        return [s.index for s in self.plan.shards if s.index not in done or s.index in self._to_rebuild]

    def is_finished(self, shard: int) -> bool:
        """Whether a shard of `unfinished` was finished since; one request to a store."""
        if shard in self._to_rebuild:
            return False
        return retrying(lambda: self.storage.size(self._state.shard_path(shard))) is not None

    def not_finished(self, shards: Iterable[int]) -> list[int]:
        """Those of `unfinished` that nobody finished since, in the order given; one look at all records."""
        done = set(self._state.finished_shards()) - self._to_rebuild
        return [shard for shard in shards if shard not in done]

    def _is_whole(self, record: ShardRecord) -> bool:
        for kind, ref in record.files.items():
            size = retrying(lambda ref=ref: self.storage.size(ref.path))
            if size is None:
                return False  # its chunks are kept: it can be made again
            if size != ref.num_bytes and kind != "metrics":
                raise OutputError(
                    f"{self.storage.url}/{ref.path} has {size:,} bytes and was finished with "
                    f"{ref.num_bytes:,}; move it away and start the same command again to have it rebuilt"
                )
        return True

    def claim(self, shard: int) -> Lease | None:
        """Take the shard's lease, or None while another live worker holds it (ask again some seconds
        later).
        """
        return self._leases.claim(shard)

    def suspects(self, shard: int) -> Suspects:
        """Rows implicated in the deaths of the former workers of a shard that is ours now."""
        return find_suspects(self.storage, self._state.folder, shard)

    def committed(self, shard: int) -> dict[int, CommitRecord]:
        """The shard's commit records by chunk, in order."""
        return self._state.committed(shard)

    def missing_chunks(self, shard: int) -> list[int]:
        """The chunks still to be made, in order."""
        done = self._state.committed(shard)
        return [chunk for chunk in range(self.plan.num_chunks(shard)) if chunk not in done]

    def counts(self) -> dict[str, int]:
        """What is committed of the whole run: rows, ok, rejected, duplicates, samples, tokens.

        Of an unfinished shard the duplicates are those inside each chunk.
        """
        finished = self._state.finished()
        claimed = set(self._state.list("claims"))  # of the others there is nothing
        parts = [
            [finished[shard.index].counts]
            if shard.index in finished
            else [record.counts for record in self._state.committed(shard.index).values()]
            for shard in self.plan.shards
            if shard.index in finished or f"{shard.index:05d}" in claimed
        ]
        return sum_counts(count for part in parts for count in part)

    def window(self, shard: int, start: int) -> WindowOrder | None:
        """The recorded order of the window that begins at row `start`; None when it is not planned yet."""
        return self._state.window(shard, start)

    def settle_window(self, planned: WindowOrder) -> WindowOrder:
        """Record the order of a window, and return the one that counts: another's, if it was there first."""
        path = order_path(self._state.folder, planned.shard, planned.start)
        data = planned.to_bytes()
        if publish_record(self.storage, path, data) == data:
            return planned
        settled = self._state.window(planned.shard, planned.start)
        if settled is None:
            raise OutputError(
                f"{self.storage.url}/{path} was there and is gone; start the same command again"
            )
        return settled

    def writer(self, lease: Lease, chunk: int, window: WindowOrder) -> ChunkWriter:
        """A writer for one attempt at a chunk of a settled window; the times in trace/ count from now."""
        start, stop = self.plan.chunk_bounds(lease.shard, chunk)
        key = (lease.shard, chunk)
        self._num_attempts[key] = self._num_attempts.get(key, 0) + 1
        again = f"-{self._num_attempts[key]}" if self._num_attempts[key] > 1 else ""
        return ChunkWriter(
            self._spool_dir,
            shard=lease.shard,
            source=self.plan.shards[lease.shard].name,
            chunk=chunk,
            start=start,
            positions=window.positions(start, stop),
            order=window.sha256,
            carried=self.plan.carried,
            with_token_ids=self.plan.with_token_ids,
            attempt=f"{lease.epoch:04d}-{lease.attempt[:12]}{again}",
        )

    def commit_chunk(self, lease: Lease, files: ChunkFiles, *, input_version: Mapping[str, Any]) -> bool:
        """Publish an attempt. True: it counts; False: another attempt at the chunk already did, ours is
        discarded.

        `input_version` is the shard's version as found now. Raises InputChanged when it is not the
        planned one, RetryLater when the disk is full or the outcome stays unknown (then the spool files
        are kept).
        """
        planned = self.plan.shards[lease.shard]
        if canonical_json(input_version) != canonical_json(planned.version):
            files.remove()
            self._end_shard(lease, planned.version, input_version)
            raise InputChanged(
                f"{planned.url} changed while it was being read; its shard ends as INPUT_CHANGED with what "
                "was committed before: put the planned file back, or give another output.path for the new one"
            )
        refs = {}
        for kind, spool in files.by_kind.items():
            name = f"{files.chunk:05d}-{files.attempt}{CHUNK_SUFFIXES[kind]}"
            path = self._state.path("chunks", f"{lease.shard:05d}", name)
            if not publish_file(self.storage, path, spool.path, spool.sha256, self._spool_dir):
                raise OutputError(f"{self.storage.url}/{path} exists with another content; move it away")
            refs[kind] = FileRef(path, spool.sha256, spool.num_bytes)
        record = CommitRecord(
            shard=lease.shard,
            chunk=files.chunk,
            attempt=files.attempt,
            start=files.start,
            stop=files.stop,
            order=files.order,
            data=refs["data"],
            trace=refs["trace"],
            rejects=refs.get("rejects"),
            counts=dict(files.counts),
            duplicate_keys=files.duplicate_keys,
            input_version=dict(input_version),
            metrics=dict(files.metrics),
        ).to_bytes()
        path = self._state.commit_path(lease.shard, files.chunk)
        stored = publish_record(self.storage, path, record)
        self._state.remember_commit(lease.shard, files.chunk, stored)
        won = stored == record
        if not won:
            for ref in refs.values():
                retrying(lambda ref=ref: self.storage.discard(ref.path))
        files.remove()
        return won

    def _end_shard(self, lease: Lease, planned: Mapping[str, Any], found: Mapping[str, Any]) -> None:
        path = self._state.path("ended", f"{lease.shard:05d}", f"{lease.epoch:06d}.json")
        state = {"state": "INPUT_CHANGED", "planned": dict(planned), "found": dict(found)}
        publish_record(self.storage, path, canonical_json(state))

    def finalise_shard(self, shard: int) -> ShardRecord:
        """Make the shard's final files from its commit records; harmless to repeat, or to race another
        worker.

        Raises OutputError when a chunk is missing or damaged, RetryLater when a disk is full.
        """
        committed = self._state.committed(shard)
        record = self._finaliser.finalise(shard, committed)
        path = self._state.shard_path(shard)
        data = publish_record(self.storage, path, record.to_bytes())
        stored = ShardRecord.from_bytes(data, f"{self.storage.url}/{path}")
        if _content(stored) != _content(record):
            raise OutputError(
                f"{self.storage.url}: shard {shard} was finished with other content than its chunks make "
                f"now; remove {self._state.shard_path(shard)} there and start the same command again"
            )
        # Every chunk is decided, so what no commit refers to never will be.
        kept = {
            ref.path
            for chunk in committed.values()
            for ref in (chunk.data, chunk.trace, chunk.rejects)
            if ref
        }
        for name in self._state.list("chunks", f"{shard:05d}"):
            path = self._state.path("chunks", f"{shard:05d}", name)
            if path not in kept:
                retrying(lambda path=path: self.storage.discard(path))
        return stored

    def finish(self) -> dict[str, Any] | None:
        """Write manifest.json once every shard is final, and return its content; None while one is not."""
        if self.unfinished():
            return None
        records = list(self._state.finished().values())
        content = manifest(self.fingerprint, records)
        check_balance(content["totals"], self.plan.num_rows, "the run")
        publish_record(self.storage, MANIFEST, readable_json(content))
        return content

    def close(self, release: bool = True) -> None:
        """Stop the heartbeat and release the leases still held; safe to call twice."""
        self._leases.close(release)


def _content(record: ShardRecord) -> dict[str, Any]:
    return {kind: ref for kind, ref in record.files.items() if kind != "metrics"} | dict(record.counts)
