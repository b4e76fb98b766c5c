"""The ledger: what of a run is claimed, committed and finished, kept in the output folder itself.

The intended order of calls, by a worker of one process (several may run at once on one output):

    storage = open_storage(output.path)
    storage.check()                                  # OutputError before anything slow is loaded
    with Ledger.open(storage, parts=..., make_plan=..., ...) as ledger:
        for shard in ledger.unfinished():
            lease = ledger.claim(shard)              # None: somebody else holds it, come back later
            if lease is None: continue
            suspects = ledger.suspects(shard)        # rows to reject as `quarantined`, rows to run alone
            for chunk in ledger.chunks_to_run(lease):    # all that are missing, but for what others hold
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

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.errors import InputError, OutputError, TidemillError
from pipeline.claims import is_inside
from pipeline.commits import CommitRecord, FileRef, pack_metrics, publish_file, publish_record, retrying
from pipeline.finalise import Finaliser, MetricsMerge
from pipeline.fingerprint import Fingerprint, canonical_json, readable_json
from pipeline.job_file import begin_run
from pipeline.lease import Lease, Suspects
from pipeline.lease_book import HEARTBEAT_S, TAKEOVER_S, LeaseBook
from pipeline.manifest import ShardRecord, check_balance, manifest, sum_counts
from pipeline.metrics import Metrics, counts_of
from pipeline.partials import PartialRow, Partials
from pipeline.partials import to_bytes as partials_to_bytes
from pipeline.plan import RunPlan
from pipeline.process_identity import ProcessIdentity
from pipeline.row_order import WindowOrder, order_path
from pipeline.run_state import MANIFEST, RunState
from pipeline.storage import Storage
from pipeline.suspects import find_suspects
from pipeline.writer import CHUNK_SUFFIXES, ChunkFiles, ChunkWriter

logger = logging.getLogger(__name__)


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
        self.leases = leases
        self._finaliser = Finaliser(self._state, plan, spool_dir, merge_metrics)
        self._num_attempts: dict[int, Counter[int]] = {}  # by shard and chunk
        self._partials: dict[int, Partials] = {}
        self._whole: set[int] = set()  # finished shards whose files were all found
        self._broken: set[int] = set()  # and those that lack one

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
        """Indices of the shards without (all of) their final files; each finished one is looked at once."""
        for index, record in self._state.finished().items():
            if index in self._whole:
                continue
            if self._has_all_files(record):
                self._whole.add(index)
                self._broken.discard(index)
            else:
                self._broken.add(index)
        return [shard.index for shard in self.plan.shards if shard.index not in self._whole]

    def _has_all_files(self, record: ShardRecord) -> bool:
        if self.storage.requests_are_dear:
            return True  # it would be four requests a shard at each start; mode=verify looks
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
        """Take the shard's lease, or None: others that are alive do all that is left of it (ask again some
        seconds later), or it is finished (`is_known_finished` says so).
        """
        seen = self.leases.look(shard)
        if seen.is_held or (seen.claims.latest and self._is_finished(shard)):
            return None
        if seen.parts:
            held = [each for part in seen.parts for each in part.chunks or ()]
            if all(is_inside(chunk, held) for chunk in self.missing_chunks(shard)):
                return None  # also where none is missing: who made the last one finalises the shard
        return self.leases.take(seen)

    def _is_finished(self, shard: int) -> bool:
        """Whether another worker has finished the shard, since it was found unfinished."""
        return shard not in self._broken and self._state.is_finished(shard)

    def finished_now(self) -> set[int]:
        """The shards that have a record, by one listing of the folder of these records."""
        return set(self._state.finished_shards()) - self._broken

    def is_known_finished(self, shard: int) -> bool:
        """Whether the shard was found finished; looks for nothing."""
        return shard not in self._broken and self._state.knows_finished(shard)

    def suspects(self, shard: int) -> Suspects:
        """Rows implicated in the deaths of the former workers of a shard that is ours now."""
        return find_suspects(self.storage, self._state.folder, shard)

    def committed(self, shard: int) -> dict[int, CommitRecord]:
        """The shard's commit records by chunk, in order."""
        return self._state.committed(shard)

    def missing_chunks(self, shard: int) -> list[int]:
        """The chunks still to be made, in order."""
        done = set(self._state.committed_chunks(shard))
        return [chunk for chunk in range(self.plan.num_chunks(shard)) if chunk not in done]

    def chunks_to_run(self, lease: Lease) -> list[int]:
        """The chunks still to be made under a lease, in order."""
        return [chunk for chunk in self.missing_chunks(lease.shard) if lease.covers(chunk)]

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

    def metrics_so_far(self) -> Metrics:
        """What is counted of all that is committed, by whoever: of a finished shard its metrics/ say it."""
        total = Metrics()
        files = {
            index: record.files["metrics"].path
            for index, record in self._state.finished().items()
            if "metrics" in record.files
        }
        lost = []  # with their file
        for index, data in zip(files, self._state.read_each(list(files.values())), strict=True):
            if data is None:
                lost.append(index)
            else:
                total.merge(counts_of(json.loads(data)))
        for index in [*lost, *(index for index in range(self.plan.num_shards) if index not in files)]:
            for record in self._state.committed(index).values():
                total.merge(Metrics.from_json(record.metrics))
        return total

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
        attempts = self._num_attempts.setdefault(lease.shard, Counter())
        attempts[chunk] += 1
        again = f"-{attempts[chunk]}" if attempts[chunk] > 1 else ""
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

    def partials(self, shard: int) -> Partials:
        """What was saved of the shard's rows by workers that were stopped."""
        self._partials[shard] = Partials(self._state, shard)
        return self._partials[shard]

    def save_partials(self, lease: Lease, chunk: int, attempt: str, rows: Sequence[PartialRow]) -> None:
        """Save how far an attempt at a chunk had come, for whoever goes on with it.

        A fault of the store only costs what would have been saved.
        """
        path = self._state.path("partials", f"{lease.shard:05d}", f"{chunk:05d}-{attempt}.json")
        try:
            publish_record(self.storage, path, partials_to_bytes(self.fingerprint, lease.shard, rows))
        except TidemillError as error:
            logger.warning("%d rows cut short are not saved: %s", len(rows), error)

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
            packed_metrics=pack_metrics(files.metrics),
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
        for path in self._partials.pop(shard).paths if shard in self._partials else ():
            retrying(lambda path=path: self.storage.discard(path))
        self._state.forget_commits(shard)
        self._num_attempts.pop(shard, None)
        self._whole.add(shard)
        self._broken.discard(shard)
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
        self.leases.close(release)


def _content(record: ShardRecord) -> dict[str, Any]:
    return {kind: ref for kind, ref in record.files.items() if kind != "metrics"} | dict(record.counts)
