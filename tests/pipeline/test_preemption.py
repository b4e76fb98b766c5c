"""A notice that the machine will be taken away drains the job, whoever gives it."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ConfigError
from pipeline.exit_codes import ExitCode
from pipeline.preemption import NoticeWatch, PreemptionSettings, notice_of
from pipeline.signals import StopRequest
from tests.pipeline.fake_engine import FakeEngine
from tests.pipeline.job_helpers import final_bytes, job_settings, run_fake, write_shards

SPOT_ACTION = {"action": "terminate", "time": "2026-11-28T10:00:00Z"}


class Metadata:
    """A metadata server, as its cloud documents it; `ends` makes it say that the machine will end."""

    def __init__(self) -> None:
        self.ends = False
        self.event = "NONE"
        self.tokens = ["token-1"]
        self.requests: list[str] = []

    def gce(self, method: str, path: str, headers: Any) -> tuple[int, str, dict[str, str]]:
        if headers.get("Metadata-Flavor") != "Google":
            return 403, "", {}
        prefix = "/computeMetadata/v1/instance/"
        answers = {"preempted": "TRUE" if self.ends else "FALSE", "maintenance-event": self.event}
        answer = (
            answers.get(path.removeprefix(prefix)) if path.startswith(prefix) and method == "GET" else None
        )
        return (404, "", {}) if answer is None else (200, answer, {"Metadata-Flavor": "Google"})

    def ec2(self, method: str, path: str, headers: Any) -> tuple[int, str, dict[str, str]]:
        if (method, path) == ("PUT", "/latest/api/token"):
            has_ttl = 1 <= int(headers.get("X-aws-ec2-metadata-token-ttl-seconds", "0")) <= 21600
            return (200, self.tokens[-1], {}) if has_ttl else (400, "", {})
        if headers.get("X-aws-ec2-metadata-token") != self.tokens[-1]:
            return 401, "", {}
        if (method, path) == ("GET", "/latest/meta-data/spot/instance-action") and self.ends:
            return 200, json.dumps(SPOT_ACTION), {}
        return 404, "", {}


@contextmanager
def serving(answer: Callable[[str, str, Any], tuple[int, str, dict[str, str]]]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def _do(self) -> None:
            status, body, headers = answer(self.command, self.path, self.headers)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        do_GET = do_PUT = _do

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_gce_tells_of_preemption_and_of_maintenance_that_ends_the_machine() -> None:
    metadata = Metadata()
    with serving(metadata.gce) as url:
        notice = notice_of(PreemptionSettings(notice="gce", metadata_url=url))
        assert notice is not None
        assert notice() is None
        metadata.event = "MIGRATE_ON_HOST_MAINTENANCE"
        assert notice() is None, "a machine that migrates goes on"
        metadata.event = "TERMINATE_ON_HOST_MAINTENANCE"
        assert "TERMINATE_ON_HOST_MAINTENANCE" in str(notice())
        metadata.ends = True
        assert notice() == "a preemption notice of GCE"


def test_what_is_no_metadata_server_of_gce_gives_no_notice() -> None:
    with serving(lambda *_: (200, "TRUE", {})) as url:
        notice = notice_of(PreemptionSettings(notice="gce", metadata_url=url))
        assert notice is not None
        with pytest.raises(OSError, match="no metadata server of GCE"):
            notice()


def test_ec2_tells_of_the_end_of_a_spot_machine_and_its_token_is_renewed() -> None:
    metadata = Metadata()
    with serving(metadata.ec2) as url:
        notice = notice_of(PreemptionSettings(notice="ec2", metadata_url=url))
        assert notice is not None
        assert notice() is None
        metadata.tokens.append("token-2")
        metadata.ends = True
        with pytest.raises(OSError, match="401"):
            notice()
        assert notice() == "a spot notice of EC2 (terminate at 2026-11-28T10:00:00Z)"


def test_a_server_that_does_not_answer_is_asked_again_and_complained_of_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked: list[int] = []

    def notice() -> str | None:
        asked.append(1)
        if len(asked) < 5:
            raise OSError("no route to host")
        return "the end"

    stop = StopRequest(10.0)
    stop.begin_work()
    with caplog.at_level(logging.WARNING), NoticeWatch(notice, stop, poll_seconds=0.01):
        deadline = time.monotonic() + 10
        while not stop.is_asked and time.monotonic() < deadline:
            time.sleep(0.01)
    assert stop.cause == "the end"
    assert [record.message for record in caplog.records] == [
        "no notice of preemption can be read, trying on: no route to host"
    ]


@pytest.mark.parametrize("kind", ["file", "gce", "ec2"])
def test_a_notice_drains_the_job_which_resumes_to_the_same_bytes(kind: str, tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "in", num_shards=2, rows_per_shard=30)
    assert run_fake(job_settings(shards, tmp_path / "undisturbed")) is ExitCode.DONE
    metadata, flag = Metadata(), tmp_path / "preempted"

    class Ending(FakeEngine):
        def step(self) -> list[Any]:
            if self._num_steps == 6:
                metadata.ends = True
                flag.touch()
            time.sleep(0.02)
            return super().step()

    with serving(metadata.ec2 if kind == "ec2" else metadata.gce) as url:
        where = {"preemption__file": str(flag)} if kind == "file" else {"preemption__metadata_url": url}
        settings = job_settings(
            shards, tmp_path / "out", preemption__notice=kind, preemption__poll_seconds=0.02, **where
        )
        assert run_fake(settings, lambda *_: Ending(max_num_seqs=4)) is ExitCode.DRAINED
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert run_fake(job_settings(shards, tmp_path / "out")) is ExitCode.DONE
    assert final_bytes(tmp_path / "out") == final_bytes(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"notice": "file"}, "preemption.file=<path>"),
        ({"file": "/there"}, "preemption.notice=file"),
        ({"notice": "gce", "poll_seconds": 0.0}, "poll_seconds=0"),
        ({"notice": "ec2", "metadata_url": "file:///etc/passwd"}, "give an http:// URL"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PreemptionSettings(**values)
