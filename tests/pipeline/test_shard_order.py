"""Workers begin at different shards, and together ask for all of them."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ConfigError
from pipeline.claims import read_claims
from pipeline.exit_codes import ExitCode
from pipeline.process_identity import ProcessIdentity
from pipeline.shard_order import WorkerSettings, order_of
from pipeline.storage import open_storage
from tests.pipeline.job_helpers import final_bytes, job_settings, run_fake, write_shards


@given(st.sets(st.integers(0, 500)), st.integers(1, 40))
def test_every_worker_asks_for_every_shard_once_and_no_two_begin_alike(found: set[int], count: int):
    shards = sorted(found)
    orders = [order_of(shards, WorkerSettings(index=index, count=count)) for index in range(count)]
    for order in orders:
        assert sorted(order) == shards
    if len(shards) >= count:
        assert len({order[0] for order in orders}) == count
        # What each takes before it comes to another's part covers everything: nobody is waited for.
        parts = [
            order[: len(shards) * (i + 1) // count - len(shards) * i // count]
            for i, order in enumerate(orders)
        ]
        assert [shard for part in parts for shard in part] == shards


def test_one_worker_goes_in_order():
    assert order_of([3, 5, 9], WorkerSettings()) == [3, 5, 9]


def test_what_is_left_of_the_others_is_taken_from_its_end():
    assert order_of(range(9), WorkerSettings(index=1, count=3)) == [3, 4, 5, 8, 7, 6, 2, 1, 0]


@pytest.mark.parametrize(("index", "count"), [(0, 0), (-1, 2), (2, 2)])
def test_an_index_beyond_the_count_is_refused(index: int, count: int):
    with pytest.raises(ConfigError, match=r"worker\.(index|count)"):
        WorkerSettings(index=index, count=count)


def test_a_shard_that_another_worker_finished_is_not_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Two workers, each with its half: a lease a shard, whoever comes to it later."""
    monkeypatch.setattr("pipeline.sharing.HELD_POLL_SECONDS", 0.05)
    folder = write_shards(tmp_path / "in", num_shards=6, rows_per_shard=6)
    owner = ProcessIdentity.of_this_process()
    codes: list[ExitCode] = []

    def work(index: int) -> None:
        settings = job_settings(folder, tmp_path / "out", worker={"index": index, "count": 2})
        codes.append(run_fake(settings, owner=owner))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [ExitCode.DONE] * 2
    storage = open_storage(str(tmp_path / "out"))
    (fingerprint,) = storage.list("_state")
    epochs = {shard: read_claims(storage, f"_state/{fingerprint}", shard).epochs for shard in range(6)}
    assert epochs == {shard: {1: True} for shard in range(6)}


def test_a_finished_shard_whose_file_is_gone_is_made_again(tmp_path: Path):
    folder = write_shards(tmp_path / "in", num_shards=3)
    assert run_fake(job_settings(folder, tmp_path / "out")) is ExitCode.DONE
    wanted = final_bytes(tmp_path / "out")
    (tmp_path / "out" / "data" / "part-00001-of-00003.parquet").unlink()
    assert run_fake(job_settings(folder, tmp_path / "out")) is ExitCode.DONE
    assert final_bytes(tmp_path / "out") == wanted
