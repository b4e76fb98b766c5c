"""Leases and suspects: who may take a shard over and when, and which row is to blame for deaths."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import RetryLater
from pipeline.claims import Heartbeat, read_claims, read_heartbeat
from pipeline.lease import Lease
from pipeline.lease_book import LeaseBook
from pipeline.local_storage import LocalStorage
from pipeline.process_identity import ProcessIdentity
from pipeline.suspects import NUM_DEATHS_AT_ANY_STEP, NUM_DEATHS_AT_SAME_STEP, judge
from tests.pipeline.small_run import gone_process

ELSEWHERE = ProcessIdentity("other-host", "other-boot", "1", 7, "7")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "out")


def book(
    storage: LocalStorage,
    owner: ProcessIdentity | None = None,
    clock: Clock | None = None,
    heartbeat_s: float = 20.0,
) -> LeaseBook:
    return LeaseBook(
        storage,
        "s",
        owner=owner or ProcessIdentity.of_this_process(),
        heartbeat_s=heartbeat_s,
        clock=clock or time.monotonic,
    )


def must(lease: Lease | None) -> Lease:
    assert lease is not None
    return lease


def test_one_holder_at_a_time_until_released(storage: LocalStorage):
    first, second = book(storage), book(storage)
    lease = must(first.claim(3))
    assert (lease.shard, lease.epoch) == (3, 1)
    assert second.claim(3) is None
    assert second.claim(4) is not None, "shards do not hinder each other"
    lease.release()
    lease.release()
    assert must(second.claim(3)).epoch == 2
    assert read_claims(storage, "s", 3).epochs == {1: True, 2: False}
    first.close()
    second.close()


def test_a_process_gone_from_this_machine_is_succeeded_at_once(storage: LocalStorage):
    dead, heir = book(storage, gone_process()), book(storage)
    must(dead.claim(0))
    assert must(heir.claim(0)).epoch == 2
    dead.close(release=False)
    heir.close()
    assert read_claims(storage, "s", 0).epochs == {1: False, 2: True}


def test_a_silent_holder_elsewhere_is_succeeded_after_the_rule(storage: LocalStorage):
    clock = Clock()
    far, heir = book(storage, ELSEWHERE), book(storage, clock=clock)
    lease = must(far.claim(0))
    for _ in range(12):
        assert heir.claim(0) is None
        clock.now += 10
    lease.beat()  # alive after all: the watch begins anew
    for _ in range(12):
        assert heir.claim(0) is None
        clock.now += 10
    assert must(heir.claim(0)).epoch == 2
    lease.look()
    assert lease.is_lost
    far.close()
    heir.close()


def test_an_observer_that_was_stopped_has_not_watched(storage: LocalStorage):
    clock = Clock()
    far, heir = book(storage, ELSEWHERE), book(storage, clock=clock)
    must(far.claim(0))
    assert heir.claim(0) is None
    clock.now += 100_000
    assert heir.claim(0) is None
    far.close()
    heir.close()


def test_the_heartbeat_thread_keeps_a_lease_alive_and_sees_it_lost(storage: LocalStorage):
    holder = book(storage, gone_process(), heartbeat_s=0.02)
    lease = must(holder.claim(0))
    first = read_heartbeat(storage, "s", 0, "000001")
    assert first is not None
    deadline = time.monotonic() + 10
    while read_heartbeat(storage, "s", 0, "000001") == first and time.monotonic() < deadline:
        time.sleep(0.01)
    assert read_heartbeat(storage, "s", 0, "000001") != first
    assert not lease.is_lost
    heir = book(storage)
    must(heir.claim(0))
    while not lease.is_lost and time.monotonic() < deadline:
        time.sleep(0.01)
    assert lease.is_lost
    holder.close()
    heir.close()
    assert read_claims(storage, "s", 0).epochs == {1: False, 2: True}, "a lost lease is not released"


def test_rows_in_flight_are_told_before_they_run(storage: LocalStorage):
    leases = book(storage)
    lease = must(leases.claim(0))
    lease.set_in_flight(["b", "a"])
    told = read_heartbeat(storage, "s", 0, "000001")
    assert told is not None
    assert (told.in_flight, told.alone_progress) == ({"a", "b"}, None)
    lease.set_in_flight(["a", "b"])
    assert read_heartbeat(storage, "s", 0, "000001") == told, "nothing new to tell"
    lease.set_alone("a", 4)
    told = read_heartbeat(storage, "s", 0, "000001")
    assert told is not None
    assert (told.in_flight, told.alone_progress) == ({"a"}, 4)
    leases.close()


def test_where_requests_are_dear_they_name_no_row_too_few_and_are_few(storage: LocalStorage):
    class Dear(LocalStorage):
        requests_are_dear = True
        num_beats = 0

        def overwrite_heartbeat(self, path: str, data: bytes) -> None:
            self.num_beats += 1
            super().overwrite_heartbeat(path, data)

    dear = Dear(Path(storage.url))
    leases = book(dear)
    lease = must(leases.claim(0))
    rows = [f"row {number}" for number in range(40)]
    for step in range(40):  # ten come when five are left, and one goes each step
        running = rows[step : 5 + 5 * (1 + step // 5)]
        lease.set_in_flight(running)
        told = read_heartbeat(dear, "s", 0, "000001")
        assert told is not None
        assert set(running) <= told.in_flight
    assert dear.num_beats == 1 + 7, "at the claim, and when rows came"
    lease.set_alone(rows[0], 0)
    lease.set_alone(rows[0], 1)
    lease.set_in_flight([rows[1]])
    told = read_heartbeat(dear, "s", 0, "000001")
    assert told is not None
    assert (told.in_flight, told.alone_progress) == ({rows[1]}, None)
    leases.close()


def test_a_heartbeat_spoilt_by_a_power_cut_is_none(storage: LocalStorage):
    leases = book(storage, gone_process())
    must(leases.claim(0))
    storage.overwrite_heartbeat("s/heartbeats/00000/000001.json", b"")
    assert read_heartbeat(storage, "s", 0, "000001") is None
    heir = book(storage)
    assert heir.claim(0) is not None
    leases.close(release=False)
    heir.close()


def test_a_failing_heartbeat_does_not_end_the_work(storage: LocalStorage, caplog: pytest.LogCaptureFixture):
    leases = book(storage, heartbeat_s=0.01)
    lease = must(leases.claim(0))

    def fail() -> None:
        raise RetryLater("the disk is full")

    lease.beat = fail  # pyright: ignore[reportAttributeAccessIssue]
    deadline = time.monotonic() + 10
    while not caplog.records and time.monotonic() < deadline:
        time.sleep(0.01)
    leases.close()
    assert "heartbeat of shard 0: the disk is full" in caplog.text


def together(*rows: str) -> Heartbeat:
    return Heartbeat("n", frozenset(rows), None)


def alone(row: str, progress: int) -> Heartbeat:
    return Heartbeat("n", frozenset([row]), progress)


def test_rows_in_flight_at_two_deaths_in_a_row_are_isolated():
    assert judge([together("a", "b")]).isolate == frozenset()
    assert judge([together("a", "b"), together("b", "c")]).isolate == {"b"}
    assert judge([together("b"), None, together("b")]).isolate == frozenset(), "an orderly end between"
    assert judge([together("a"), together("a"), together()]).isolate == frozenset()


def test_a_row_that_dies_alone_at_the_same_step_three_times_is_quarantined():
    deaths: list[Heartbeat | None] = [together("a", "b"), together("a", "b")]
    for number in range(NUM_DEATHS_AT_SAME_STEP):
        assert judge(deaths).quarantined == frozenset(), number
        assert "b" in judge(deaths).isolate
        deaths.append(alone("b", 5))
    assert judge(deaths).quarantined == {"b"}
    assert judge(deaths).isolate == frozenset()
    for later in (None, together("a", "c"), together("c"), alone("c", 1)):
        deaths.append(later)
        assert judge(deaths).quarantined == {"b"}, "what was found stays found"


def test_steps_that_differ_need_more_deaths():
    deaths = [alone("b", step) for step in range(NUM_DEATHS_AT_ANY_STEP)]
    assert judge(deaths[:-1]).quarantined == frozenset()
    assert judge(deaths).quarantined == {"b"}


@given(st.data())
def test_a_row_that_always_kills_is_found_and_no_other_is_blamed(data: st.DataObject):
    """A worker that follows the verdicts, over any order and size of batch, loses exactly the killer."""
    rows = [f"r{i}" for i in range(data.draw(st.integers(2, 12), "rows"))]
    killer = data.draw(st.sampled_from(rows), "killer")
    history: list[Heartbeat | None] = []
    for _ in range(12):
        verdict = judge(history)
        assert verdict.quarantined <= {killer}
        if killer in verdict.quarantined:
            return
        order = data.draw(st.permutations(rows), "order")
        width = data.draw(st.integers(1, len(rows)), "batch")
        if killer in verdict.isolate:
            before = [row for row in order if row in verdict.isolate]
            history.append(alone(before[before.index(killer)], 3))
        else:
            group = [row for row in order if row not in verdict.isolate]
            at = group.index(killer)
            history.append(together(*group[max(0, at - width + 1) : at + 1]))
    raise AssertionError("the killer was not found in twelve deaths")
