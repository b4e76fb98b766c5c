"""The local disk as storage, beyond what every storage holds (test_storage_laws.py): synced, exclusive
between processes, and plain about what it cannot do.
"""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from engine.errors import ConfigError, OutputError, RetryLater
from pipeline.commits import publish_record, retrying
from pipeline.local_storage import TEMPORARY_PREFIX, LocalStorage
from pipeline.process_identity import ProcessIdentity
from pipeline.storage import Outcome, PassingFault, open_storage
from tests.pipeline.small_run import gone_process, spool_file

NUM_RACERS = 8


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "out")


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.name.startswith(TEMPORARY_PREFIX)]


def test_nothing_is_left_beside_what_was_created(storage: LocalStorage, tmp_path: Path):
    assert storage.create("a/b/c.json", b"first") is Outcome.WON
    assert storage.create("a/b/c.json", b"second") is Outcome.LOST
    assert storage.create_from_file("a/b/c.json", spool_file(tmp_path, b"third")) is Outcome.LOST
    storage.overwrite_heartbeat("a/b/beat", b"second")
    storage.overwrite_heartbeat("a/b/beat", b"3")
    assert storage.read("a/b/beat") == b"3     ", "in place: what is longer stays as blanks"
    assert not leftovers(tmp_path)


def test_a_file_is_created_from_the_spool_on_the_same_disk_and_from_another(
    storage: LocalStorage, tmp_path: Path
):
    spools = [spool_file(tmp_path, b"x" * 1000)]
    if Path("/dev/shm").is_dir() and os.stat("/dev/shm").st_dev != os.stat(tmp_path).st_dev:
        elsewhere = Path("/dev/shm") / f"tidemill-test-{os.getpid()}"
        elsewhere.write_bytes(b"y" * 1000)
        spools.append(elsewhere)
    for index, spool in enumerate(spools):
        assert storage.create_from_file(f"chunks/{index}", spool) is Outcome.WON
        assert storage.read(f"chunks/{index}") == spool.read_bytes()
        spool.unlink()
        assert storage.size(f"chunks/{index}") == 1000
    assert not leftovers(tmp_path)


def test_looking_creates_nothing(storage: LocalStorage, tmp_path: Path):
    assert storage.read("no") is None
    assert storage.list("no/folder") == []
    storage.discard("no")
    assert not (tmp_path / "out").exists()


def test_of_threads_racing_for_a_name_one_wins(tmp_path: Path):
    for round_number in range(30):
        start = threading.Barrier(NUM_RACERS)
        outcomes: list[tuple[Outcome, bytes]] = []

        def race(number: int, start=start, outcomes=outcomes, name: str = f"r/{round_number}") -> None:
            racer = LocalStorage(tmp_path / "out")
            mine = f"racer {number}".encode() * 100
            start.wait()
            outcomes.append((racer.create(name, mine), mine))

        threads = [threading.Thread(target=race, args=(number,)) for number in range(NUM_RACERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        winners = [content for outcome, content in outcomes if outcome is Outcome.WON]
        assert len(outcomes) == NUM_RACERS
        assert len(winners) == 1
        assert LocalStorage(tmp_path / "out").read(f"r/{round_number}") == winners[0]


RACER = """
import sys, time
from pathlib import Path
from pipeline.local_storage import LocalStorage
storage, me = LocalStorage(Path(sys.argv[1])), sys.argv[2]
while time.time() < float(sys.argv[3]):
    pass
for number in range(40):
    if storage.create(f"r/{number}", me.encode()).name == "WON":
        print(number)
"""


def test_of_processes_racing_for_names_one_wins_each(tmp_path: Path, repository: Path):
    start = str(time.time() + 1.5)
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(tmp_path / "out"), f"racer {number}", start],
            cwd=repository,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(NUM_RACERS)
    ]
    wins: dict[int, list[str]] = {}
    for number, racer in enumerate(racers):
        out, _ = racer.communicate(timeout=60)
        assert racer.returncode == 0
        for name in out.split():
            wins.setdefault(int(name), []).append(f"racer {number}")
    storage = LocalStorage(tmp_path / "out")
    assert sorted(wins) == list(range(40))
    for name, winners in wins.items():
        assert len(winners) == 1
        assert storage.read(f"r/{name}") == winners[0].encode()
    assert not leftovers(tmp_path)


def test_leftovers_are_ignored_and_those_of_the_dead_removed(tmp_path: Path):
    folder = tmp_path / "out" / "a"
    folder.mkdir(parents=True)
    dead = folder / f"{TEMPORARY_PREFIX}{gone_process().tag}-1"
    alive = folder / f"{TEMPORARY_PREFIX}{ProcessIdentity.of_this_process().tag}-1"
    foreign = folder / f"{TEMPORARY_PREFIX}otherboot.1.2.3-1"
    old = folder / f"{TEMPORARY_PREFIX}otherboot.1.2.3-2"
    for path in (dead, alive, foreign, old):
        path.write_bytes(b"half")
    long_ago = time.time() - 100_000
    os.utime(old, (long_ago, long_ago))
    storage = LocalStorage(tmp_path / "out")
    assert storage.list("a") == []
    storage.create("a/b", b"whole")
    assert storage.list("a") == ["b"]
    assert sorted(path for path in folder.iterdir() if path.name != "b") == sorted([alive, foreign])


def test_a_create_that_stays_unsure_is_for_later_and_deletes_nothing(tmp_path: Path):
    class Mute(LocalStorage):
        def create(self, path: str, data: bytes) -> Outcome:
            return Outcome.UNKNOWN

    pauses: list[float] = []
    with pytest.raises(RetryLater, match="could not find out whether it was written"):
        publish_record(Mute(tmp_path / "out"), "r", b"mine", sleep=pauses.append)
    assert len(pauses) == 10
    assert pauses[5] > pauses[0], "pauses grow"
    assert max(pauses) <= 8 * 1.5, "up to a cap"
    assert len({round(pause, 4) for pause in pauses}) == 10, "and no two workers come back together"


def test_passing_faults_are_retried_and_others_not():
    calls = Counter[str]()

    def passing() -> str:
        calls["passing"] += 1
        if calls["passing"] < 3:
            raise PassingFault("not yet")
        return "done"

    def hopeless() -> str:
        calls["hopeless"] += 1
        raise OutputError("never")

    assert retrying(passing, sleep=lambda seconds: None) == "done"
    with pytest.raises(OutputError, match="never"):
        retrying(hopeless, sleep=lambda seconds: None)
    assert calls == {"passing": 3, "hopeless": 1}


def test_places_that_cannot_work_are_told_in_one_line(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    for url in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError, match="not a folder") as caught:
            open_storage(str(url)).check()
        assert "\n" not in str(caught.value)
        with pytest.raises(OutputError, match=r"is a file|not a folder"):
            open_storage(str(url)).create("a", b"x")
    for url, text in (("ftp://host/x", "not to ftp://"), ("", "empty"), ("file://host/x", "file:///")):
        with pytest.raises(ConfigError, match=text):
            open_storage(url)
    assert open_storage(f"file://{tmp_path}/a%20b").url == str(tmp_path / "a b")


def test_a_read_only_place_is_told(tmp_path: Path):
    if os.geteuid() == 0:
        place = Path("/proc/tidemill")  # nobody, not even root, can write there
    else:
        place = tmp_path / "locked" / "out"
        place.parent.mkdir(mode=0o500)
    for attempt in (lambda storage: storage.check(), lambda storage: storage.create("a", b"x")):
        with pytest.raises(OutputError, match=rf"{place}.* cannot be used: .*; fix that") as caught:
            attempt(open_storage(str(place)))
        assert "\n" not in str(caught.value)


def test_a_full_disk_is_for_later_and_publishes_nothing(tmp_path: Path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk is not permitted here")
    try:
        storage = LocalStorage(disk / "out")
        assert storage.create("small", b"x") is Outcome.WON
        with pytest.raises(RetryLater, match=rf"the disk of {disk}.* is full: .*needs 1,000,000 bytes"):
            storage.create("large", b"x" * 1_000_000)
        with pytest.raises(RetryLater, match="is full"):
            storage.create_from_file("large", spool_file(tmp_path, b"y" * 1_000_000))
        assert storage.list("") == ["small"]
        assert not leftovers(disk)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_an_identity_knows_when_its_process_is_gone():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    here = ProcessIdentity.of_this_process()
    stat = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
    identity = ProcessIdentity(here.host, here.boot_id, here.pid_namespace, child.pid, stat[19])
    assert not here.is_gone()
    assert not identity.is_gone()
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert identity.is_gone(), "a zombie has ended, though its pid is taken"
    child.communicate()
    assert identity.is_gone()
    reused = ProcessIdentity(here.host, here.boot_id, here.pid_namespace, here.pid, "1")
    assert reused.is_gone(), "a pid given out again is another process"
    for elsewhere in (
        ProcessIdentity(here.host, "another boot", here.pid_namespace, child.pid, "1"),
        ProcessIdentity(here.host, here.boot_id, "another namespace", child.pid, "1"),
        ProcessIdentity(here.host, None, None, child.pid, None),
    ):
        assert not elsewhere.is_gone(), "what cannot be judged from here is not judged"
    assert ProcessIdentity.from_json(identity.to_json()) == identity


def test_bytes_reach_the_disk_before_their_name_and_the_name_before_the_answer(tmp_path, monkeypatch):
    """A power cut may come at any moment: file synced, then linked, then the folder synced."""
    storage = open_storage(str(tmp_path / "out"))
    storage.create("claims/first.json", b"{}")  # makes the folders
    spool = tmp_path / "spool"
    spool.write_bytes(b"rows")
    calls: list[str] = []
    fsync, link = os.fsync, os.link

    def synced(descriptor):
        calls.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def linked(source, target):
        calls.append("link")
        link(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "link", linked)
    assert storage.create("claims/second.json", b"{}") is Outcome.WON
    assert calls == ["file", "link", "folder"]
    calls.clear()
    assert storage.create_from_file("claims/third.json", spool) is Outcome.WON
    assert "file" in calls[: len(calls) - 1 - calls[::-1].index("link")], "synced before its final name"
    assert calls[-1] == "folder"
