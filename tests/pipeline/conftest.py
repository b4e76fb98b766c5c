"""Stores that start when the first test asks for them and end with the last one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pipeline.store_proxy import StoreProxy, proxied
from tests.pipeline.store_servers import KEY, SECRET, StoreServer, fake_gcs, rclone_s3, seaweedfs


def s3_environment(url: str) -> dict[str, str]:
    """What makes AWS's tools, in this process and its children, talk to a server and to nothing else."""
    return {
        "AWS_ENDPOINT_URL_S3": url,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServer]:
    server = seaweedfs(tmp_path_factory.mktemp("seaweedfs"))
    try:
        server.start()
        make_bucket(server.url)
        yield server
    finally:
        server.kill()


@pytest.fixture
def s3_bucket(s3_server: StoreServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a bucket that this test's environment opens."""
    for name, value in s3_environment(s3_server.url).items():
        monkeypatch.setenv(name, value)
    return "s3://bucket"


@pytest.fixture
def proxy(s3_bucket: str, s3_server: StoreServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[StoreProxy]:
    """Between the test and the store."""
    with proxied(s3_server.url) as made:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", made.url)
        monkeypatch.setattr("pipeline.commits._FIRST_PAUSE_S", 0.001)
        yield made


def make_bucket(url: str) -> None:
    import s3fs

    s3fs.S3FileSystem(key=KEY, secret=SECRET, endpoint_url=url, skip_instance_cache=True).mkdir("bucket")


@pytest.fixture
def bad_s3_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = rclone_s3(tmp_path / "rclone")
    try:
        server.start()
        for name, value in s3_environment(server.url).items():
            monkeypatch.setenv(name, value)
        yield "s3://bucket"
    finally:
        server.kill()


@pytest.fixture(scope="session")
def gcs_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServer]:
    server = fake_gcs(tmp_path_factory.mktemp("fake-gcs"))
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture
def gcs_bucket(gcs_server: StoreServer, monkeypatch: pytest.MonkeyPatch) -> str:
    from fsspec.config import conf

    monkeypatch.setitem(conf, "gs", {"token": "anon", "endpoint_url": gcs_server.url})
    return "gs://bucket"
