"""The worker: keeps one engine full across chunks and shards, and commits a chunk when its last row is done.

    claim a shard → plan and read ahead its missing rows → engine → chunk writer → commit → finalise the shard

The engine is never drained at a chunk's end: rows of the next chunks, and of the next shard, are admitted
while the last rows of this one finish, so several chunks are open at once and may commit in any order.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from engine.drawn import DrawnTokens
from engine.errors import InputError, RequestError
from engine.outputs import RequestOutput
from pipeline.cached_results import row_key, to_json
from pipeline.engine_meter import EngineMeter
from pipeline.hints import KEPT_SHARE, OutputLengths, Templates, WantedPrefixes
from pipeline.lease import Lease
from pipeline.ledger import Ledger
from pipeline.metrics import ChunkFacts, Metrics
from pipeline.open_work import EngineLike, OpenChunk, OpenShard, OpenWork, Refusal, merge_ranges, quarantine
from pipeline.openai_batch import MakeAnswer
from pipeline.partials import PartialRow
from pipeline.planned_reading import Assignment, PlacedRow
from pipeline.progress import Progress, Standing
from pipeline.read_ahead import Item, ReadAhead, ReadFailure
from pipeline.request_cache import RequestCache
from pipeline.rows import Prompt, Reject
from pipeline.shard_order import WorkerSettings, order_of
from pipeline.shards import Shard, current_version
from pipeline.sharing import HeldShards, let_parts
from pipeline.signals import StopRequest
from pipeline.tally import Tally
from pipeline.watchdog import StepWatchdog
from pipeline.work_watch import WorkWatch

# Another process's lease is watched this long (a dead one on another machine is taken over after 120 s).
HELD_PATIENCE_SECONDS = 150.0
MAX_FOUND_AT_ONCE = 64
"""Rows completed from the request cache before leases, the drain and the progress are seen to again."""


@dataclass(frozen=True, slots=True)
class WorkResult:
    """How the work ended. `totals` counts what this attempt committed."""

    totals: Metrics = field(default_factory=Metrics)
    too_many_rejects: bool = False
    rows_rejected: int = 0  # of all attempts, and in chunks that were given up
    failed_shards: dict[int, InputError] = field(default_factory=dict)  # changed, or unreadable


class Worker:
    """Runs the unfinished shards of a ledger through an engine. Make one, call `run` once."""

    def __init__(
        self,
        ledger: Ledger,
        shards: Sequence[Shard],
        engine: EngineLike,
        reader: ReadAhead,
        stop: StopRequest,
        progress: Callable[[Standing], Progress],
        facts: ChunkFacts,
        watchdog: StepWatchdog,
        *,
        max_num_seqs: int,
        page_size: int,
        max_reject_fraction: float,
        place: WorkerSettings = WorkerSettings(),  # noqa: B008 - frozen
        make_answer: MakeAnswer | None = None,
        watch: WorkWatch | None = None,
        cache: RequestCache | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._ledger = ledger
        self._shards = shards
        self._engine = engine
        self._reader = reader
        self._stop = stop
        self._facts = facts
        self._watchdog = watchdog
        self._make_answer = make_answer
        self._watch = watch or WorkWatch()
        self._clock = clock
        self._meter = EngineMeter(engine, max_num_seqs, clock)
        # As many waiting as running: the scheduler always has a next row, and others if that one must wait.
        self._max_unfinished = 2 * max_num_seqs
        # Rows are told to the lease before they run: many at a time, where each time is a request to a store.
        is_dear = ledger.storage.requests_are_dear
        self._refill_below = self._max_unfinished - (max_num_seqs // 2 if is_dear else 0)

        self._wanted = WantedPrefixes(
            engine, self._max_unfinished, max_kept_tokens=int(KEPT_SHARE * engine.num_pages * page_size)
        )
        self._templates = Templates()
        self._lengths = OutputLengths()

        self._has_place = place.count > 1
        self._unclaimed = deque(order_of(ledger.unfinished(), place))
        self._held = HeldShards(ledger, clock)
        self._work = OpenWork(ledger, engine)
        self._cache = cache
        self._num_found = 0  # rows in the cache
        self._alone: deque[PlacedRow] = deque()
        self._alone_steps: int | None = None  # steps of the row that runs alone now
        self._failed: dict[int, InputError] = {}
        self._tally = Tally(ledger.counts(), ledger.plan.num_rows, max_reject_fraction)
        self._progress = progress(self._tally.standing([]))

    def run(self) -> WorkResult:
        """Work until nothing is left, a drain is asked for, or too many rows are rejected."""
        held_since: float | None = None
        while not self._stop.is_asked and not self._tally.is_over_limit(self._work.metrics):
            self._assign()
            self._admit()
            if self._engine.has_unfinished:
                held_since = None
                self._step()
            elif not self._reader.is_exhausted:
                self._wait_for_rows()
            elif self._alone or self._unclaimed:
                continue
            elif not self._held:
                break
            else:  # only what others hold is left
                held_since = self._clock() if held_since is None else held_since
                if self._clock() - held_since > HELD_PATIENCE_SECONDS:
                    break
                time.sleep(0.1)
        too_many = self._tally.is_over_limit(self._work.metrics)
        standing = self._tally.standing(self._work.metrics)
        self._watch.stands(standing)  # rejects alone take no step
        if self._stop.is_asked or too_many:
            self._drain()
        self._wanted.release_all()
        if self._cache is not None:
            self._cache.close()
        self._progress.close()
        return WorkResult(self._tally.totals, too_many, standing.rows_rejected, self._failed)

    # Shards: claim, assign, give up.

    def _assign(self) -> None:
        """Claim the next shard, or a part of another's, once the reader is through with the last one."""
        while self._reader.wants_assignment:
            if self._unclaimed:
                index = self._unclaimed.popleft()
                lease = self._ledger.claim(index)
                if lease is None and not self._ledger.is_known_finished(index):
                    self._held.add(index)
                    if not self._has_place:  # others are at work: begin elsewhere than they did
                        self._unclaimed.rotate(random.randrange(len(self._unclaimed) + 1))
            elif not self._runs_dry or (lease := self._held.next_lease()) is None:
                return
            if lease is not None:
                self._open(lease)

    @property
    def _runs_dry(self) -> bool:
        """All that was read runs: time to ask others for work. Sooner, they may have as much to do."""
        return self._reader.is_exhausted and 2 * self._engine.num_unfinished <= self._max_unfinished

    def _open(self, lease: Lease) -> None:
        self._work.shards[lease.shard] = OpenShard(self._shards[lease.shard], lease)
        self._begin(lease.shard, self._ledger.chunks_to_run(lease))

    def _begin(self, index: int, chunks: Sequence[int]) -> None:
        """Have the rows of these chunks read; where there are none, see how to end."""
        if not chunks:
            self._end_shard(index)
            return
        plan, opened = self._ledger.plan, self._work.shards[index]
        if not opened.is_untouched:  # by others, who may have died or left rows half done
            opened.suspects = self._ledger.suspects(index)
            opened.partials = self._ledger.partials(index)
        ranges = merge_ranges([plan.chunk_bounds(index, chunk) for chunk in chunks])
        assignment = Assignment(self._shards[index], plan.shards[index].num_rows, ranges)
        opened.begin(chunks, assignment)
        self._reader.assign(assignment)

    def _end_shard(self, index: int) -> None:
        """All of ours is committed: finalise the shard, unless others are still at it."""
        opened = self._work.shards[index]
        if opened.is_shared and (missing := self._ledger.missing_chunks(index)):
            self._ledger.leases.look_again(opened.lease)
            chunks = [chunk for chunk in missing if opened.lease.covers(chunk)]
            if chunks:  # of a part whose holder died
                self._begin(index, chunks)
                return
            self._held.add(index)
        else:
            self._ledger.finalise_shard(index)
            self._watch.shard_finished()
        self._work.shards.pop(index).lease.release()

    def _drop_shard(self, index: int) -> None:
        self._work.drop(index)
        if self._alone_steps is not None and not self._engine.has_unfinished:
            self._alone_steps = None
        self._alone = deque(placed for placed in self._alone if placed.row.shard_index != index)

    def _fail_shard(self, index: int, error: InputError) -> None:
        self._failed[index] = error
        if index in self._work.shards:
            self._drop_shard(index)

    # Rows: take, admit, complete.

    def _admit(self) -> None:
        """Top up the engine from the reader; rows that killed their worker before are run alone."""
        if self._alone_steps is not None:
            return
        wait_for_idle = any(chunk.waits_for_isolation for chunk in self._work.chunks.values())
        if self._alone and (wait_for_idle or self._reader.is_exhausted):
            if not self._engine.has_unfinished:
                self._start_alone()
            return
        if self._engine.num_unfinished >= self._refill_below:
            return
        # Rows that are found in the cache never fill the engine: look up from them now and then.
        found_before = self._num_found
        while (
            self._engine.num_unfinished < self._max_unfinished
            and self._num_found - found_before < MAX_FOUND_AT_ONCE
        ):
            item = self._reader.take()
            if item is None:
                return
            self._take(item)

    def _take(self, item: Item) -> None:
        if isinstance(item, ReadFailure):
            if not isinstance(item.error, InputError):
                raise item.error
            self._fail_shard(item.shard_index, item.error)
            return
        row = item.row
        if not self._work.wants(item):
            return
        self._wanted.take(item)
        opened = self._work.shards[row.shard_index]
        chunk = self._work.chunk_of(item)
        chunk.num_seen += 1
        if isinstance(row, Reject):
            self._reject(chunk, row)
        elif row.row_id in opened.suspects.quarantined:
            self._reject(chunk, quarantine(row, opened.shard))
        elif row.row_id in opened.suspects.isolate:
            chunk.num_alone += 1
            self._alone.append(item)
        else:
            self._submit(chunk, opened, item, row)

    def _submit(self, chunk: OpenChunk, opened: OpenShard, placed: PlacedRow, prompt: Prompt) -> None:
        request_id = f"{prompt.shard_index}:{prompt.position}"
        found = None if self._cache is None else self._cache.find(prompt, request_id)
        if found is not None:
            self._num_found += 1
            chunk.metrics.cache_hits += 1
            self._complete(chunk, placed, prompt, found, None)
            return
        begun = chunk.begun.get(prompt.row_id)
        try:
            self._engine.add_request(
                request_id,
                prompt_token_ids=prompt.token_ids,
                sampling=prompt.sampling,
                identity=prompt.row_id,
                expected_output_len=self._lengths.expected(
                    self._templates.of(placed), prompt.sampling.max_tokens
                ),
                drawn=begun.samples if begun is not None and begun.fits(prompt) else None,
            )
        except RequestError as error:
            self._complete(chunk, placed, prompt, None, error)
            return
        opened.in_flight[request_id] = placed
        opened.has_changed = True

    def _start_alone(self) -> None:
        placed = self._alone.popleft()
        assert isinstance(placed.row, Prompt), "a rejected row is never run"
        chunk = self._work.chunk_of(placed)
        chunk.num_alone -= 1
        opened = self._work.shards[placed.row.shard_index]
        self._submit(chunk, opened, placed, placed.row)
        self._alone_steps = 0 if opened.in_flight else None

    def _complete(
        self,
        chunk: OpenChunk,
        placed: PlacedRow,
        prompt: Prompt,
        output: RequestOutput | None,
        error: RequestError | None,
    ) -> None:
        response = None
        if self._make_answer is not None and output is not None:
            response = self._make_answer(prompt, output)
        reject = chunk.writer.add_completion(prompt, output, error, response)
        if reject is not None:
            chunk.metrics.reject(reject.reason)
        elif output is not None:
            template = self._templates.of(placed)
            chunk.metrics.complete(output, placed.window.achievable(placed.place), template)
            for sample in output.outputs:
                self._lengths.add(template, len(sample.token_ids))
            chunk.done.append(PartialRow.of(prompt, tuple(map(DrawnTokens.of, output.outputs))))
        self._row_done(chunk)

    def _reject(self, chunk: OpenChunk, reject: Reject) -> None:
        chunk.writer.add_reject(reject)
        chunk.metrics.reject(reject.reason)
        self._row_done(chunk)

    def _step(self) -> None:
        self._tell_leases()
        with self._watchdog.watched():
            outputs = self._meter.step()
        if self._alone_steps is not None:
            self._alone_steps += 1
        for output in outputs:
            placed = self._work.take_back(output.request_id)
            if placed is None:
                continue
            self._alone_steps = None
            assert isinstance(placed.row, Prompt), "a rejected row is never run"
            chunk = self._work.chunk_of(placed)
            if isinstance(output, Refusal):
                self._complete(chunk, placed, placed.row, None, output.error)
                continue
            if self._cache is not None and (result := to_json(output)) is not None:
                chunk.results[row_key(placed.row)] = result
            self._complete(chunk, placed, placed.row, output, None)
        standing = self._tally.standing(self._work.metrics)
        self._progress.update(standing)
        self._watch.stands(standing)

    def _tell_leases(self) -> None:
        """Before a step that could kill the process: which rows are about to run."""
        for index in list(self._work.shards):
            opened = self._work.shards[index]
            if opened.lease.is_lost:
                self._drop_shard(index)
                self._held.add(index)
                continue
            let_parts(opened, self._ledger.plan)
            row_ids = [placed.row.row_id for placed in opened.in_flight.values() if placed.row.row_id]
            if self._alone_steps is not None and row_ids:
                opened.lease.set_alone(row_ids[0], self._alone_steps)
            elif opened.has_changed:
                opened.lease.set_in_flight(row_ids)
            opened.has_changed = False

    def _row_done(self, chunk: OpenChunk) -> None:
        chunk.num_done += 1
        if chunk.is_done:
            self._commit(chunk)

    # Chunks: commit, finalise.

    def _commit(self, chunk: OpenChunk) -> None:
        key = (chunk.shard, chunk.chunk)
        opened = self._work.shards[chunk.shard]
        if next(iter(self._work.chunks)) == key:
            self._meter.settle(chunk.metrics)
        chunk.metrics.count_requests(self._ledger.storage.take_requests())
        if self._cache is not None:
            chunk.metrics.cache_damaged += self._cache.take_damaged()
            chunk.metrics.count_requests(self._cache.take_requests())
            chunk.metrics.cache_stored += self._cache.store(chunk.results)
        try:
            files = chunk.writer.close(metrics=chunk.metrics.to_json() | self._facts.to_json())
            version = current_version(opened.shard)
            is_ours = self._ledger.commit_chunk(opened.lease, files, input_version=version)
        except InputError as error:  # the shard's content changed: never mix old rows and new ones
            self._fail_shard(chunk.shard, error)
            return
        del self._work.chunks[key]
        self._watch.committed(chunk.metrics, is_ours)
        if is_ours:
            self._tally.commit(chunk.metrics)
        opened.num_missing -= 1
        if opened.num_missing == 0:
            self._end_shard(chunk.shard)

    # Waiting and stopping.

    def _wait_for_rows(self) -> None:
        started = self._clock()
        item = self._reader.take(timeout=0.1)
        self._meter.waited(self._clock() - started)
        if item is not None:
            self._take(item)

    def _drain(self) -> None:
        """Finish the chunks whose rows are all here already, as far as time allows; of the rest save how far
        its rows have come.
        """
        self._reader.close()
        cut_short = [
            self._work.abandon(key)
            for key, chunk in list(self._work.chunks.items())
            if chunk.num_seen < chunk.num_rows or chunk.num_alone
        ]
        reserve = min(2.0, 0.2 * max(self._stop.seconds_left, 0.0))  # for the last commits
        while self._engine.has_unfinished and self._stop.seconds_left > reserve + self._meter.step_seconds:
            self._step()
        cut_short += [self._work.abandon(key) for key in list(self._work.chunks)]
        for each in cut_short if self._stop.is_asked else []:
            if each.rows and self._stop.seconds_left > 0:
                self._ledger.save_partials(each.lease, each.chunk, each.attempt, each.rows)
        for opened in self._work.shards.values():
            opened.lease.release()
