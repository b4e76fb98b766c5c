"""What processes of one engine tell each other; `tests/sharding` runs whole engines so."""

from __future__ import annotations

import threading
from multiprocessing import Pipe

import numpy as np
import pytest

from engine.buckets import Bucket
from engine.config import EngineConfig
from engine.errors import ConfigError, RetryLater
from engine.lockstep import Lockstep, decode, encode, facts_of
from engine.plan import PageCopy
from engine.replica_batch import HostStep


def make_step(seed: int = 0) -> HostStep:
    pick = np.random.default_rng(seed)
    unusual = {"token_mask": pick.integers(0, 2**32, (2, 4, 3), np.uint32), "bias_values": np.ones((2, 4, 2))}
    copies = ((PageCopy(1, 2, 3),), ())
    return HostStep(Bucket(16, 8), copies, bool(seed % 2), pick.integers(0, 99, (2, 50), np.int32), unusual)


def assert_same(found: HostStep, wanted: HostStep) -> None:
    assert (found.bucket, found.continues) == (wanted.bucket, wanted.continues)
    assert [[tuple(copy) for copy in each] for each in found.copies] == [list(each) for each in wanted.copies]
    assert found.unusual.keys() == wanted.unusual.keys()
    for name, array in {"numbers": wanted.numbers, **wanted.unusual}.items():
        other = found.numbers if name == "numbers" else found.unusual[name]
        assert other.dtype == array.dtype
        np.testing.assert_array_equal(other, array)


def test_a_step_comes_as_it_was_sent():
    for seed in range(2):
        assert_same(decode(encode(make_step(seed))), make_step(seed))


def both(facts: dict[str, str], others: dict[str, str]) -> list[Exception | None]:
    """What `begin` raises in the first process and in the second, which are threads here."""
    near, far = Pipe()
    errors: list[Exception | None] = [None, None]

    def begin(index: int, lockstep: Lockstep, known: dict[str, str]) -> None:
        try:
            lockstep.begin(known)
        except ConfigError as error:
            errors[index] = error

    second = threading.Thread(target=begin, args=(1, Lockstep([far], leads=False), others))
    second.start()
    begin(0, Lockstep([near], leads=True), facts)
    second.join()
    return errors


def test_processes_that_differ_say_in_what():
    facts = facts_of(EngineConfig(), "weights-1")
    assert both(facts, facts) == [None, None]
    assert both(facts, facts_of(EngineConfig(compilation_cache_dir="/elsewhere"), "weights-1")) == [
        None,
        None,
    ]
    first, second = both(facts, facts_of(EngineConfig(page_size=32), "weights-2"))
    assert str(second) == "engine.page_size, model differ from those of process 0: start all alike"
    assert str(first) == f"process 1: {second}"


def test_steps_come_in_order_until_the_end():
    near, far = Pipe()
    leader, follower = Lockstep([near], leads=True), Lockstep([far], leads=False)
    for seed in range(3):
        leader.send(make_step(seed))
    leader.end()
    leader.end()
    for seed, step in enumerate(follower.steps()):
        assert_same(step, make_step(seed))
    assert seed == 2
    assert not follower.waits_for_engine()


def test_a_lost_or_changed_message_is_noticed():
    near, far = Pipe()
    between_near, between_far = Pipe()
    leader, follower = Lockstep([near], leads=True), Lockstep([between_far], leads=False)
    leader.send(make_step(0))
    leader.send(make_step(1))
    far.recv_bytes()
    between_near.send_bytes(far.recv_bytes())
    with pytest.raises(RetryLater, match="lost its step"):
        next(follower.steps())


def test_a_process_that_is_gone_is_noticed():
    near, far = Pipe()
    follower, leader = Lockstep([far], leads=False), Lockstep([near], leads=True)
    near.close()
    with pytest.raises(RetryLater, match="process 0 of this engine is gone"):
        next(follower.steps())
    with pytest.raises(RetryLater, match="start all of them again"):
        leader.send(make_step())
