"""Buckets: the probe, faults on the way, credentials, and how many requests are sent."""

from __future__ import annotations

import logging
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ConfigError, MissingExtraError, OutputError, RetryLater
from pipeline.commits import publish_file, publish_record, retrying, sha256_file
from pipeline.storage import Outcome, Storage, open_storage
from tests.pipeline.conftest import make_bucket, s3_environment
from tests.pipeline.store_proxy import (
    CUT,
    DOWN,
    LOST,
    LOST_IN_ERROR,
    THROTTLED,
    TOO_MANY,
    Asked,
    Fault,
    StoreProxy,
)
from tests.pipeline.store_servers import KEY, SECRET, seaweedfs


@pytest.fixture
def folder() -> str:
    return uuid.uuid4().hex


def uploads(bucket: str) -> list[str]:
    """Keys of the bucket's uploads in parts that nobody completed or aborted."""
    import s3fs

    fs: Any = s3fs.S3FileSystem(skip_instance_cache=True)
    found = fs.call_s3("list_multipart_uploads", Bucket=bucket)
    return [each["Key"] for each in found.get("Uploads", ())]


def test_a_store_that_keeps_its_word_passes_the_probe_and_nothing_is_left(s3_bucket: str, folder: str):
    storage = open_storage(f"{s3_bucket}/{folder}")
    storage.check()
    first = storage.take_requests()
    assert sum(first.values()) >= 8
    storage.check()
    assert not storage.take_requests(), "once is enough"
    assert storage.list("") == []
    assert uploads("bucket") == []


def test_a_store_that_ignores_conditions_is_refused_unless_told_to(
    bad_s3_bucket: str, folder: str, caplog: pytest.LogCaptureFixture
):
    url = f"{bad_s3_bucket}/{folder}"
    with pytest.raises(OutputError, match=r"ignores conditional requests.*output\.unsafe_single_writer=true"):
        open_storage(url).check()
    trusted = open_storage(url, unsafe_single_writer=True)
    with caplog.at_level(logging.WARNING):
        trusted.check()
    assert "nothing protects it from a second writer" in caplog.text
    assert trusted.create("a", b"first") is Outcome.WON
    assert trusted.create("a", b"second") is Outcome.LOST
    assert trusted.subfolder("sub").create("a", b"first") is Outcome.WON
    assert trusted.subfolder("sub").create("a", b"second") is Outcome.LOST
    assert trusted.read("a") == trusted.read("sub/a") == b"first"


def test_conditions_that_hold_for_small_objects_only_are_refused_too(gcs_bucket: str, folder: str):
    """fake-gcs-server ignores the condition of an upload in parts."""
    storage = open_storage(f"{gcs_bucket}/{folder}")
    with pytest.raises(OutputError, match="overwrites an object that is created in parts twice"):
        storage.check()
    assert storage.list("") == []
    open_storage(f"{gcs_bucket}/{folder}", unsafe_single_writer=True).check()


def test_a_large_file_is_created_once_and_a_lost_one_leaves_no_parts(
    s3_bucket: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("pipeline.s3_client._PART_BYTES", 5 * 2**20)
    storage = open_storage(f"{s3_bucket}/{folder}")
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_bytes(b"1" * 11_000_000)
    second.write_bytes(b"2" * 11_000_000)
    assert storage.create_from_file("large", first) is Outcome.WON
    assert storage.take_requests() == {"post": 2, "put": 3}, "in three parts"
    assert storage.create_from_file("large", second) is Outcome.LOST
    fetched = storage.local_file("large", tmp_path)
    assert fetched is not None
    assert sha256_file(fetched) == sha256_file(first)
    assert uploads("bucket") == []


@pytest.mark.parametrize(
    ("fault", "num_tries"),
    [
        (THROTTLED, 1),
        (TOO_MANY, 1),
        (DOWN, 1),
        (CUT, 1),
        (LOST, 1),
        (LOST_IN_ERROR, 1),
        (LOST, 2),
    ],
)
def test_faults_worth_it_are_tried_again(
    proxy: StoreProxy,
    s3_bucket: str,
    folder: str,
    fault: Fault,
    num_tries: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """What is written is written once and right, what is read is what was written.

    botocore's own second try finds what the first one made, and takes up to a second.
    """
    monkeypatch.setattr("pipeline.s3_client._TRIES_A_REQUEST", num_tries)
    storage = open_storage(f"{s3_bucket}/{folder}")
    proxy.sometimes(0.4, fault)
    spool = tmp_path / "spool"
    for number in range(6):
        record = f"record {number}".encode()
        assert publish_record(storage, f"r/{number}", record) == record
        assert publish_record(storage, f"r/{number}", b"another's") == record
        spool.write_bytes(b"file" * number + b"!")
        assert publish_file(storage, f"f/{number}", spool, sha256_file(spool), tmp_path / "fetched")
    assert retrying(lambda: storage.list("r")) == list("012345")
    assert proxy.num_faults >= 5


def test_the_probe_is_not_misled_by_faults(
    proxy: StoreProxy, s3_bucket: str, folder: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("pipeline.s3_client._TRIES_A_REQUEST", 1)
    for seed, fault in enumerate((DOWN, LOST, LOST_IN_ERROR)):
        proxy.sometimes(0.2, fault, seed=seed)
        open_storage(f"{s3_bucket}/{folder}").check()
    assert proxy.num_faults >= 3


def test_a_store_that_stays_down_is_for_later_and_says_so(
    proxy: StoreProxy, s3_bucket: str, folder: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("pipeline.s3_client._TRIES_A_REQUEST", 1)
    proxy.sometimes(1.0, DOWN)
    storage = open_storage(f"{s3_bucket}/{folder}")
    with pytest.raises(RetryLater, match="start the same command again") as caught:
        publish_record(storage, "r", b"record", sleep=lambda seconds: None)
    assert "\n" not in str(caught.value)
    assert proxy.num_faults == 2 * 10, "a try is a create and a look at what is there; they are few"


def test_a_denial_is_not_tried_again(proxy: StoreProxy, s3_bucket: str, folder: str):
    proxy.sometimes(1.0, Fault(403, "AccessDenied"))
    with pytest.raises(OutputError, match="injected; check the credentials"):
        open_storage(f"{s3_bucket}/{folder}").check()
    assert proxy.num_faults == 2, "the create and the removal of what it may have left"


def test_a_missing_bucket_is_told(proxy: StoreProxy, s3_bucket: str):
    proxy.sometimes(1.0, Fault(404, "NoSuchBucket"))
    with pytest.raises(OutputError, match="there is no bucket 'bucket'; create it first"):
        open_storage(f"{s3_bucket}/folder").check()


def refuse_old_key(asked: Asked) -> Fault | None:
    return Fault(400, "ExpiredToken") if "Credential=old" in asked.authorization else None


def test_expired_credentials_are_read_again_once_and_then_the_run_stops(
    proxy: StoreProxy, s3_bucket: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    credentials = tmp_path / "credentials"

    def write(key: str) -> None:
        credentials.write_text(f"[default]\naws_access_key_id={key}\naws_secret_access_key={SECRET}\n")

    write("old")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(credentials))
    proxy.decide = refuse_old_key
    storage = open_storage(f"{s3_bucket}/{folder}")
    with pytest.raises(RetryLater, match=r"credentials have expired.*renew them and start the same command"):
        storage.create("a", b"x")
    assert len(proxy.asked) == 2, "once with what it had, once with what it read again"
    write(KEY)  # somebody renews them
    assert storage.create("a", b"x") is Outcome.WON
    assert storage.read("a") == b"x"
    assert proxy.num_faults == 3
    write("old")
    with pytest.raises(RetryLater, match="credentials have expired"):
        open_storage(f"{s3_bucket}/{folder}").size("a")  # a HEAD, whose answer says nothing but 400


def test_no_credentials_at_all_are_told(s3_bucket: str, folder: str, monkeypatch: pytest.MonkeyPatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(OutputError, match="check the credentials"):
        open_storage(f"{s3_bucket}/{folder}").check()


def test_looking_at_a_folder_lists_that_folder_alone(proxy: StoreProxy, s3_bucket: str, folder: str):
    """A listing of the folder above would grow with the run."""
    storage = open_storage(f"{s3_bucket}/{folder}")
    assert storage.list("commits/00007") == []
    assert storage.size("commits/00007/00001.json") is None
    assert storage.read("commits/00007/00001.json") is None
    assert [(asked.method, "list-type" in asked.path) for asked in proxy.asked] == [
        ("GET", True),
        ("HEAD", False),
        ("GET", False),
    ]
    assert f"{folder}%2Fcommits%2F00007%2F" in proxy.asked[0].path
    assert storage.take_requests() == {"list": 1, "head": 1, "get": 1}


def test_requests_are_counted_and_spread(gcs_bucket: str, s3_bucket: str, folder: str):
    for bucket in (gcs_bucket, s3_bucket):
        storage = open_storage(f"{bucket}/{folder}", max_requests_per_second=50)
        storage.read("nothing")  # connected
        storage.take_requests()
        started = time.monotonic()
        threads = [threading.Thread(target=read_five, args=(storage,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.monotonic() - started
        assert storage.take_requests() == {"get": 15}
        assert 14 / 50 <= seconds < 5, "fifteen requests have fourteen intervals"


def read_five(storage: Storage) -> None:
    for number in range(5):
        storage.read(str(number))


def test_a_store_that_is_killed_and_started_again_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    server = seaweedfs(tmp_path / "server")
    for name, value in (("MAX_TRIES", 200), ("_MAX_PAUSE_S", 0.2)):  # as patient, but sooner back
        monkeypatch.setattr(f"pipeline.commits.{name}", value)
    monkeypatch.setattr("pipeline.s3_client._TRIES_A_REQUEST", 1)
    try:
        server.start()
        for name, value in s3_environment(server.url).items():
            monkeypatch.setenv(name, value)
        make_bucket(server.url)
        storage = open_storage("s3://bucket/out")
        assert publish_record(storage, "before", b"1") == b"1"
        server.kill()
        restart = threading.Timer(1.0, server.start)
        restart.start()
        assert publish_record(storage, "during", b"2") == b"2"
        restart.join()
        assert (storage.read("before"), storage.read("during")) == (b"1", b"2")
    finally:
        server.kill()


@pytest.mark.parametrize(
    ("url", "package", "extra"), [("s3://b/x", "s3fs", "s3"), ("gs://b/x", "gcsfs", "gcs")]
)
def test_an_absent_package_names_its_extra(url, package, extra, monkeypatch: pytest.MonkeyPatch):
    for name in ("pipeline.s3_client", "pipeline.gcs_client"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.core", None)
    with pytest.raises(MissingExtraError, match=rf"pip install 'tidemill\[{extra}\]'"):
        open_storage(url)


@pytest.mark.parametrize("url", ["s3://", "s3:///x", "s3://b/a//b", "s3://b::s3://c/x"])
def test_what_names_no_folder_of_a_bucket_is_refused(url: str):
    with pytest.raises(ConfigError, match="names no folder of a bucket"):
        open_storage(url)
