"""Workers without work take chunks of another's shard: each chunk is run once, and no byte changes."""

from __future__ import annotations

import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import prefix_plan
from pipeline.exit_codes import ExitCode
from pipeline.lease import Asker, Lease
from pipeline.lease_book import LeaseBook
from pipeline.ledger import Ledger
from pipeline.local_storage import LocalStorage
from pipeline.open_work import OpenShard, merge_ranges
from pipeline.planned_reading import Assignment
from pipeline.process_identity import ProcessIdentity
from pipeline.results import open_run
from pipeline.run import run_job
from pipeline.settings import Settings
from pipeline.sharing import HeldShards, let_parts
from pipeline.storage import open_storage
from pipeline.verify import Verifier
from tests.pipeline.fake_engine import FakeEngine
from tests.pipeline.job_helpers import fake_model, final_bytes, job_settings, run_fake, write_shards
from tests.pipeline.small_run import NO_SUSPECTS, Crash, small_plan

NUM_ROWS = 60
STATE = "s"


def elsewhere(number: int) -> ProcessIdentity:
    """A process that nobody here can judge: only its heartbeats tell that it lives."""
    return ProcessIdentity(f"host-{number}", f"boot-{number}", "1", 7, "7")


class SlowEngine(FakeEngine):
    """Remembers which rows it was given; each step takes a while."""

    def __init__(self, seconds: float, **options: Any):
        super().__init__(**options)
        self.seconds = seconds
        self.added: list[str] = []

    def add_request(self, request_id: str, *args: Any, **options: Any) -> None:
        self.added.append(request_id)
        super().add_request(request_id, *args, **options)

    def step(self) -> list[Any]:
        time.sleep(self.seconds)
        return super().step()


class WorkerThread(threading.Thread):
    """A whole job in a thread, as a process of another machine would run it."""

    def __init__(self, number: int, settings: Settings, engine: SlowEngine, takeover_s: float = 60.0):
        super().__init__(daemon=True)
        self.engine = engine
        self.code: ExitCode | None = None
        self.error: BaseException | None = None
        self._settings = settings
        self._open_ledger = partial(
            Ledger.open, owner=elsewhere(number), heartbeat_s=0.05, takeover_s=takeover_s
        )

    def run(self) -> None:
        try:
            self.code = run_job(
                self._settings,
                load_model=fake_model,
                make_engine=lambda *_: self.engine,
                open_ledger=self._open_ledger,
            )
        except BaseException as error:
            self.error = error


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.sharing.HELD_POLL_SECONDS", 0.02)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "in", num_shards=1, rows_per_shard=NUM_ROWS)


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.005)


def run_together(workers: list[WorkerThread]) -> None:
    """The first has begun when the others start."""
    workers[0].start()
    wait_for(lambda: workers[0].engine.added)
    for worker in workers[1:]:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
        assert not worker.is_alive()


def slow(seconds: float = 0.01, **options: Any) -> SlowEngine:
    return SlowEngine(seconds, max_num_seqs=2, **options)


@pytest.mark.parametrize("place", ["disk", "s3"])
@pytest.mark.parametrize("order", ["input", "prefix", "windows"])
def test_a_worker_without_work_takes_chunks_that_are_not_begun(
    place: str, order: str, shards: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if order == "windows":
        monkeypatch = request.getfixturevalue("monkeypatch")
        monkeypatch.setattr(prefix_plan, "MAX_WINDOW_ROWS", 24)
        monkeypatch.setattr("pipeline.planned_reading.BATCH_ROWS", 4)
    options = {"input__order": "input" if order == "input" else "prefix", "engine__max_num_seqs": 2}
    assert run_fake(job_settings(shards, tmp_path / "alone", **options)) is ExitCode.DONE
    output = str(tmp_path / "out")
    if place == "s3":
        output = f"{request.getfixturevalue('s3_bucket')}/{uuid.uuid4().hex}"
    settings = job_settings(shards, output, **options)
    seconds = 0.01 if place == "disk" else 0.05
    workers = [WorkerThread(number, settings, slow(seconds)) for number in range(3)]
    run_together(workers)
    assert [worker.error for worker in workers] == [None] * 3
    assert final_bytes(output) == final_bytes(tmp_path / "alone")
    runs = Counter(request_id for worker in workers for request_id in worker.engine.added)
    assert runs == Counter(f"0:{position}" for position in range(NUM_ROWS)), "each row ran once"
    assert all(len(worker.engine.added) >= 6 for worker in workers), "each did its share"
    assert Verifier(open_storage(output), tmp_path).run().findings == []
    assert len({row["attempt"] for row in open_run(output).trace()}) >= 3


@pytest.mark.parametrize("dies", ["who lets", "who is let"])
def test_chunks_of_a_dead_worker_are_run_by_those_that_live(dies: str, shards: Path, tmp_path: Path) -> None:
    assert run_fake(job_settings(shards, tmp_path / "alone")) is ExitCode.DONE

    def crash(request_id: str) -> None:
        raise Crash(request_id)

    # The last rows are those that are let; in the middle are some that the first worker keeps.
    victim, last_words = (0, "0:27") if dies == "who lets" else (1, "0:57")
    engines = [slow(), slow()]
    engines[victim] = slow(crash_on={last_words}, crash_at_step=1, crash=crash)
    settings = job_settings(shards, tmp_path / "out", input__order="input", engine__max_num_seqs=2)
    workers = [WorkerThread(n, settings, engines[n], takeover_s=0.5) for n in range(2)]
    run_together(workers)
    assert isinstance(workers[victim].error, Crash)
    assert workers[1 - victim].code is ExitCode.DONE
    assert final_bytes(tmp_path / "out") == final_bytes(tmp_path / "alone")
    assert last_words in workers[1 - victim].engine.added


def test_who_is_let_a_part_may_let_some_of_it_on(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    books = [LeaseBook(storage, STATE, owner=elsewhere(n), heartbeat_s=60.0) for n in range(3)]
    first = books[0].claim(0)
    assert first is not None
    ask = books[1].ask(0)
    assert ask is not None
    assert books[1].answer(ask) is True, "not answered yet"
    first.look()
    assert first.asks == ("000001-001",)
    first.let(ask.key, must(first.asker(ask.key)), ((10, 20),))
    first.look()
    assert first.asks == ()
    part = books[1].answer(ask)
    assert isinstance(part, Lease)
    assert [chunk for chunk in range(30) if part.covers(chunk)] == list(range(10, 20))
    first.let_no_more()
    deeper = books[2].ask(0)
    assert deeper is not None
    assert deeper.key == "000001-001-001", "who has said that no more is let is not asked"
    part.let(deeper.key, must(part.asker(deeper.key)), ((15, 20),))
    books[1].look_again(part)
    assert [chunk for chunk in range(30) if part.covers(chunk)] == list(range(10, 15))
    books[0].look_again(first)
    assert [chunk for chunk in range(30) if first.covers(chunk)] == [*range(10), *range(20, 30)]
    first.release()
    seen = books[2].look(0)
    assert not seen.is_held
    assert {claim.key for claim in seen.parts} == {"000001-001", "000001-001-001"}
    assert books[2].claim(0) is None, "a whole shard is not to be had while parts of it are let"
    part.release()
    books[0].look_again(first)
    assert not first.covers(17), "that part is still held"
    for book in books:
        book.close()


def test_who_asked_and_is_gone_is_let_nothing(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    gone = ProcessIdentity.of_this_process()
    gone = ProcessIdentity(gone.host, gone.boot_id, gone.pid_namespace, 10_000_001, "1")
    holder, asking = (
        LeaseBook(storage, STATE, owner=each, heartbeat_s=60.0) for each in (elsewhere(1), gone)
    )
    lease = must(holder.claim(0))
    ask = must(asking.ask(0))
    lease.look()
    assert lease.asker(ask.key) is None
    lease.look()
    assert lease.asks == ()
    assert asking.answer(ask) is False
    holder.close()
    asking.close()


class AskedLease:
    """What a holder's lease tells `let_parts`, and what it is told."""

    def __init__(self, num_asks: int):
        self.asks = tuple(f"000001-{number + 1:03d}" for number in range(num_asks))
        self.let_to: dict[str, tuple[tuple[int, int], ...]] = {}
        self.is_full = False

    def asker(self, part: str) -> Asker:
        return Asker(part, elsewhere(0))

    def let(self, part: str, asker: Asker, chunks: tuple[tuple[int, int], ...]) -> None:
        assert asker.attempt == part
        self.let_to[part] = chunks

    def let_no_more(self) -> None:
        self.is_full = True


@given(st.data())
def test_what_is_let_is_not_begun_is_settled_and_is_let_once(data: st.DataObject) -> None:
    num_chunks = data.draw(st.integers(1, 20), "chunks")
    plan = small_plan(num_shards=1, num_rows=3 * num_chunks)
    to_run = data.draw(st.sets(st.integers(0, num_chunks - 1), min_size=1), "to run")
    num_begun = data.draw(st.integers(0, len(to_run)), "begun")
    settled = data.draw(st.integers(0, num_chunks), "settled chunks")
    lease: Any = AskedLease(data.draw(st.integers(1, 4), "asks"))
    shard: Any = SimpleNamespace(index=0)
    opened = OpenShard(shard, lease, NO_SUSPECTS)
    ranges = merge_ranges([plan.chunk_bounds(0, chunk) for chunk in sorted(to_run)])
    assignment = Assignment(shard, plan.shards[0].num_rows, ranges)
    assignment.settled_stop = 3 * settled
    opened.begin(sorted(to_run), assignment)
    begun = sorted(to_run)[:num_begun]
    opened.todo -= set(begun)
    free = [chunk for chunk in sorted(opened.todo) if chunk < settled]
    let_parts(opened, plan)
    given = [c for ranges in lease.let_to.values() for start, stop in ranges for c in range(start, stop)]
    assert len(given) == len(set(given))
    assert sorted(given) == free[len(free) - len(given) :], "the last ones of those that may be let"
    assert opened.todo == to_run - set(begun) - set(given)
    assert opened.num_missing == len(to_run) - len(given)
    assert opened.num_missing > 0 or begun, "who has begun nothing keeps something"
    assert all(assignment.is_withdrawn(3 * chunk) for chunk in given)
    assert not any(assignment.is_withdrawn(3 * chunk) for chunk in opened.todo | set(begun))
    all_settled = assignment.settled_stop >= ranges[-1][1]
    assert lease.is_full == (not free and all_settled)
    if len(free) > 1:
        assert given


def must(value: Any) -> Any:
    assert value is not None
    return value


def test_others_are_asked_for_work_when_ones_own_runs_out(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not while rows wait in the engine: whoever is asked may have as much to do."""
    unfinished = []

    class Watched(HeldShards):
        def next_lease(self) -> Any:
            thread: Any = threading.current_thread()
            unfinished.append(thread.engine.num_unfinished)
            return super().next_lease()

    monkeypatch.setattr("pipeline.worker.HeldShards", Watched)
    settings = job_settings(shards, tmp_path / "out", engine__max_num_seqs=2)
    run_together([WorkerThread(number, settings, slow()) for number in range(3)])
    assert unfinished
    assert max(unfinished) <= 2
