"""What every storage must hold, whatever it is made of: created once, whole, and read back as written."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.commits import publish_file, publish_record, sha256_file
from pipeline.storage import Outcome, Storage, open_storage
from tests.pipeline.small_run import FaultyStorage, spool_file

NUM_RACERS, NUM_RACES = 3, 3  # SeaweedFS lets the losers of a race wait for a second each

Open = Callable[[], Storage]


@pytest.fixture(params=["disk", "s3", "gcs"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder of each kind that nothing has written to."""
    if request.param == "disk":
        return str(tmp_path / "out")
    return f"{request.getfixturevalue(request.param + '_bucket')}/{uuid.uuid4().hex}/out"


@pytest.fixture
def storage(url: str) -> Storage:
    return open_storage(url)


def test_the_first_create_wins_and_stays(storage: Storage, tmp_path: Path):
    assert storage.create("a/b/c.json", b"first") is Outcome.WON
    assert storage.create("a/b/c.json", b"second") is Outcome.LOST
    assert storage.create_from_file("a/b/c.json", spool_file(tmp_path, b"third")) is Outcome.LOST
    assert storage.read("a/b/c.json") == b"first"
    assert storage.size("a/b/c.json") == 5
    assert storage.list("a/b") == ["c.json"]
    assert storage.create_from_file("a/b/d", spool_file(tmp_path, b"d" * 1000)) is Outcome.WON
    assert storage.create("a/b/d", b"second") is Outcome.LOST
    assert storage.read("a/b/d") == b"d" * 1000


def test_what_is_not_there_is_none_and_empty(storage: Storage, tmp_path: Path):
    assert storage.read("no") is None
    assert storage.size("no") is None
    assert storage.local_file("no", tmp_path / "spool") is None
    assert storage.list("no/folder") == []
    storage.discard("no")
    assert storage.list("") == [], "looking must not create anything"


def test_a_folder_lists_what_is_directly_inside(storage: Storage):
    for path in ("top", "a/one", "a/two", "a/deep/three", "ab/four"):
        assert storage.create(path, b"x") is Outcome.WON
    assert storage.list("") == ["a", "ab", "top"]
    assert storage.list("a") == ["deep", "one", "two"]
    storage.discard("a/one")
    assert storage.list("a") == ["deep", "two"]
    assert storage.subfolder("a").list("deep") == ["three"]
    assert storage.subfolder("a").read("two") == b"x"
    assert storage.subfolder("a").url == f"{storage.url}/a"


def test_an_empty_object_is_never_written(storage: Storage):
    with pytest.raises(ValueError, match="empty"):
        storage.create("a", b"")
    assert storage.size("a") is None


def test_heartbeats_are_replaced_and_may_keep_blanks(storage: Storage):
    for beat in (b"one", b"second", b"3"):
        storage.overwrite_heartbeat("beats/1", beat)
        assert (storage.read("beats/1") or b"").rstrip() == beat


def test_a_local_file_has_the_objects_content(storage: Storage, tmp_path: Path):
    storage.create("some/where/name.parquet", b"content")
    for _ in range(2):
        path = storage.local_file("some/where/name.parquet", tmp_path / "spool")
        assert path is not None
        assert path.read_bytes() == b"content"
        assert path.suffix == ".parquet", "what a file holds is told by its name"


def test_of_threads_racing_for_a_name_one_wins(url: str):
    racers = [open_storage(url) for _ in range(NUM_RACERS)]
    for round_number in range(NUM_RACES):
        name, start = f"r/{round_number}", threading.Barrier(NUM_RACERS)
        outcomes: list[tuple[Outcome, bytes]] = []

        def race(number: int, name: str = name, start=start, outcomes=outcomes) -> None:
            mine = f"racer {number}".encode() * 100
            start.wait()
            outcomes.append((racers[number].create(name, mine), mine))

        threads = [threading.Thread(target=race, args=(number,)) for number in range(NUM_RACERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        winners = [content for outcome, content in outcomes if outcome is Outcome.WON]
        assert len(outcomes) == NUM_RACERS
        assert len(winners) == 1
        assert open_storage(url).read(name) == winners[0]


@pytest.mark.parametrize("mode", ["lost", "unapplied"])
def test_an_unsure_create_is_settled_by_reading_back(
    storage: Storage, tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("pipeline.commits._FIRST_PAUSE_S", 0.0)
    assert publish_record(FaultyStorage(storage, 0, mode), "r", b"mine") == b"mine"
    assert publish_record(FaultyStorage(storage, 0, mode), "r", b"another's") == b"mine"
    spool, other = spool_file(tmp_path, b"content"), spool_file(tmp_path, b"content of another")
    assert publish_file(FaultyStorage(storage, 0, mode), "f", spool, sha256_file(spool), tmp_path)
    assert not publish_file(FaultyStorage(storage, 0, mode), "f", other, sha256_file(other), tmp_path)
    assert storage.read("f") == b"content"
