"""A whole run in milliseconds: the real ledger and writer, the fake engine, and a storage that fails
where told.

`work` is the worker loop in its simplest form (one chunk at a time); what it makes depends on the rows alone.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from engine.sampling_params import SamplingParams
from pipeline.lease import Suspects
from pipeline.ledger import Ledger
from pipeline.local_storage import LocalStorage
from pipeline.plan import PlannedShard, RunPlan
from pipeline.process_identity import ProcessIdentity
from pipeline.row_order import PlannedOrder, WindowOrder
from pipeline.rows import Prompt, Reject
from pipeline.schema import CarriedColumn, carried_from_values
from pipeline.storage import Outcome, PassingFault, Storage
from tests.pipeline.fake_engine import FakeEngine

PARTS = {"config": {"max_tokens": 6}, "model": "m-1", "inputs": [{"url": "a", "version": {"size": 1}}]}
Propose = Callable[[RunPlan, int, int], WindowOrder]
NO_SUSPECTS = Suspects(frozenset(), frozenset())


def spool_file(tmp_path: Path, content: bytes) -> Path:
    """A file of its own to create an object from."""
    path = tmp_path / f"spool-file-{uuid.uuid4().hex}"
    path.write_bytes(content)
    return path


_pids = itertools.count(10_000_000)


class Crash(BaseException):
    """The process is gone: nothing may be cleaned up by whoever catches it."""


def gone_process() -> ProcessIdentity:
    """An identity of this machine whose process does not exist, another one on each call."""
    here = ProcessIdentity.of_this_process()
    return ProcessIdentity(here.host, here.boot_id, here.pid_namespace, next(_pids), "1")


def small_plan(
    num_shards: int = 2,
    num_rows: int = 7,
    chunk_rows: int = 3,
    output_format: str = "parquet",
    carried: tuple[CarriedColumn, ...] = carried_from_values(["topic"], [{"topic": "t"}]),
    with_token_ids: bool = True,
) -> RunPlan:
    return RunPlan(
        shards=tuple(
            PlannedShard(index=i, name=f"in-{i}", url=f"/in-{i}", num_rows=num_rows, version={"size": i})
            for i in range(num_shards)
        ),
        chunk_rows=chunk_rows,
        carried=carried,
        output_format=output_format,
        with_token_ids=with_token_ids,
    )


def make_row(shard: int, position: int) -> Prompt | Reject:
    """Every fifth row is bad."""
    if position % 5 == 4:
        return Reject(
            shard, position, None, "not_json", f"in-{shard} row {position}: é\ud800", f"in-{shard}", "{"
        )
    return Prompt(
        row_id=f"{shard}-{position}",
        shard_index=shard,
        position=position,
        token_ids=tuple(range(10 + position)),
        text=None,
        sampling=SamplingParams(max_tokens=6, n=1 + position % 2, seed=position if position % 3 else None),
        carried={"topic": f"topic {position} é"},
        was_truncated=False,
    )


def merge_counts(summaries: Any) -> dict[str, Any]:
    summaries = list(summaries)
    return {"chunks": len(summaries), "rows": sum(summary["rows"] for summary in summaries)}


def open_ledger(storage: Storage, spool: Path, plan: RunPlan | None = None, **options: Any) -> Ledger:
    options.setdefault("parts", PARTS)
    options.setdefault("owner", gone_process())
    return Ledger.open(
        storage,
        config={"output": {"path": "o"}, "hub_token": "hf_secret"},
        make_plan=lambda: plan or small_plan(),
        spool_dir=spool,
        merge_metrics=merge_counts,
        **options,
    )


def scrambled(plan: RunPlan, shard: int, start: int) -> WindowOrder:
    """A window of two chunks whose rows run last first: no two chunks hold neighbours."""
    stop = min(start + 2 * plan.chunk_rows, plan.shards[shard].num_rows)
    offsets = np.arange(stop - start)[::-1]
    offsets = np.concatenate([offsets[::2], offsets[1::2]])
    none = np.zeros(stop - start, dtype=np.int64)
    planned = PlannedOrder(offsets=offsets, prefix_lens=none, achievable=none)
    return WindowOrder(shard=shard, start=start, stop=stop, planned=planned)


def in_input_order(plan: RunPlan, shard: int, start: int) -> WindowOrder:
    """All that is left of a shard in one window, as it comes."""
    return WindowOrder(shard=shard, start=start, stop=plan.shards[shard].num_rows)


def window_of(ledger: Ledger, shard: int, chunk: int, propose: Propose) -> WindowOrder:
    """The settled window that a chunk is in."""
    start, first = 0, ledger.plan.chunk_bounds(shard, chunk)[0]
    while True:
        window = ledger.window(shard, start) or ledger.settle_window(propose(ledger.plan, shard, start))
        if first < window.stop:
            return window
        start = window.stop


def fill(
    ledger: Ledger,
    lease: Any,
    chunk: int,
    engine: FakeEngine,
    suspects: Suspects,
    propose: Propose = scrambled,
) -> Any:
    """Run one chunk's rows; the finished files."""
    window = window_of(ledger, lease.shard, chunk, propose)
    writer = ledger.writer(lease, chunk, window)
    bounds = ledger.plan.chunk_bounds(lease.shard, chunk)
    rows = [make_row(lease.shard, position) for position in window.positions(*bounds)]
    prompts = {}
    for row in rows:
        if isinstance(row, Reject):
            writer.add_reject(row)
        elif row.row_id in suspects.quarantined:
            writer.add_reject(Reject(row.shard_index, row.position, row.row_id, "quarantined", "q", "s", ""))
        else:
            prompts[row.row_id] = row
    together = [prompt for prompt in prompts.values() if prompt.row_id not in suspects.isolate]
    alone = [[prompt] for prompt in prompts.values() if prompt.row_id in suspects.isolate]
    for group in [*alone, together]:
        for prompt in group:
            engine.add_request(prompt.row_id, prompt.token_ids, sampling=prompt.sampling)
        num_steps = 0
        if group is together:
            lease.set_in_flight(prompt.row_id for prompt in group)
        while engine.has_unfinished:
            if group is not together:
                lease.set_alone(group[0].row_id, num_steps)
            for output in engine.step():
                writer.add_completion(prompts[output.request_id], output)
            num_steps += 1
    lease.set_in_flight([])
    return writer.close({"rows": len(rows)})


def work(
    storage: Storage,
    spool: Path,
    plan: RunPlan | None = None,
    *,
    crash_on: Collection[str] = (),
    crash: Callable[[str], None] | None = None,
    propose: Propose = scrambled,
    **options: Any,
) -> Mapping[str, Any] | None:
    """Open the run, do all that is left of it, and finish; the manifest's content."""

    def die(request_id: str) -> None:
        raise Crash(request_id)

    with open_ledger(storage, spool, plan, **options) as ledger:
        engine = FakeEngine(crash_on=crash_on, crash=crash or die, crash_at_step=2)
        for shard in ledger.unfinished():
            lease = ledger.claim(shard)
            if lease is None:
                continue
            suspects = ledger.suspects(shard)
            for chunk in ledger.missing_chunks(shard):
                files = fill(ledger, lease, chunk, engine, suspects, propose)
                ledger.commit_chunk(lease, files, input_version=ledger.plan.shards[shard].version)
            ledger.finalise_shard(shard)
            lease.release()
        return ledger.finish()


def results(output: Path) -> dict[str, bytes]:
    """The bytes of data/ and rejects/, which no crash may change."""
    return stored_results(LocalStorage(output))


def stored_results(storage: Storage) -> dict[str, bytes]:
    """The same of any storage."""
    paths = [f"{kind}/{name}" for kind in ("data", "rejects") for name in storage.list(kind)]
    return {path: storage.read(path) or b"" for path in paths}


class FaultyStorage(Storage):
    """Passes everything on, and fails the operation numbered `fail_at` in the manner of `mode`:

    crash before, crash after; lost (applied, and the answer lost); unapplied (not applied, nor answered).
    """

    def __init__(self, inner: Storage, fail_at: int | None = None, mode: str = "crash before"):
        self.inner = inner
        self.requests_are_dear = inner.requests_are_dear
        self.fail_at = fail_at
        self.mode = mode
        self.num_operations = 0
        self.writes: list[int] = []  # numbers of the operations that create something

    def _do(self, action: Callable[[], Any], unsure: Callable[[], Any] | None = None) -> Any:
        if unsure is not None:
            self.writes.append(self.num_operations)
        self.num_operations += 1
        if self.num_operations - 1 != self.fail_at:
            return action()
        if self.mode == "crash before":
            raise Crash
        if self.mode != "unapplied":
            action()
        if self.mode == "crash after":
            raise Crash
        if unsure is None:
            raise PassingFault("the answer did not come")
        return unsure()

    @property
    def url(self) -> str:
        return self.inner.url

    def check(self) -> None:
        self.inner.check()

    def create(self, path: str, data: bytes) -> Outcome:
        return self._do(lambda: self.inner.create(path, data), lambda: Outcome.UNKNOWN)

    def create_from_file(self, path: str, spool: Path) -> Outcome:
        return self._do(lambda: self.inner.create_from_file(path, spool), lambda: Outcome.UNKNOWN)

    def read(self, path: str) -> bytes | None:
        return self._do(lambda: self.inner.read(path))

    def size(self, path: str) -> int | None:
        return self._do(lambda: self.inner.size(path))

    def local_file(self, path: str, spool_dir: Path) -> Path | None:
        return self._do(lambda: self.inner.local_file(path, spool_dir))

    def list(self, folder: str) -> list[str]:
        return self._do(lambda: self.inner.list(folder))

    def overwrite_heartbeat(self, path: str, data: bytes) -> None:
        self._do(lambda: self.inner.overwrite_heartbeat(path, data))

    def discard(self, path: str) -> None:
        self._do(lambda: self.inner.discard(path))

    def ages(self, folder: str) -> dict[str, float]:
        return self._do(lambda: self.inner.ages(folder))

    def leftovers(self, min_age_s: float) -> list[str]:
        return self._do(lambda: self.inner.leftovers(min_age_s))

    def remove_leftover(self, name: str) -> None:
        self._do(lambda: self.inner.remove_leftover(name))

    def subfolder(self, name: str) -> Storage:
        return self.inner.subfolder(name)


def undisturbed(folder: Path, plan: RunPlan | None = None) -> dict[str, bytes]:
    """The bytes of a run in input order that nothing befell."""
    output = LocalStorage(folder / "undisturbed")
    assert work(output, folder / "spool", plan, propose=in_input_order) is not None
    return results(folder / "undisturbed")
