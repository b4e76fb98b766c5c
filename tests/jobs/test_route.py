"""`python -m jobs.route`: what it takes, what it refuses, and a process that routes until it is told to
end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from engine.errors import ConfigError
from jobs.route import main, read_arguments
from tests.server.small_upstream import COMPLETE, SmallUpstream
from tests.server.uvicorn_thread import serving

REPOSITORY = Path(__file__).resolve().parent.parent.parent


def test_servers_are_given_by_url_or_in_full(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TIDEMILL_UPSTREAM_KEY", raising=False)
    routing = read_arguments(["http://a:1", "https://b/v1", "router.load_factor=2", "route.port=9000"])
    assert [each.name for each in routing.router.upstreams] == ["a:1", "b"]
    assert [each.base_url for each in routing.router.upstreams] == ["http://a:1", "https://b"]
    assert (routing.router.load_factor, routing.route.port) == (2.0, 9000)
    full = 'router.upstreams=[{name: a, url: "http://a:1", models: [m], max_in_flight: 4}]'
    (upstream,) = read_arguments([full]).router.upstreams
    assert (upstream.models, upstream.max_in_flight, upstream.api_key_env) == (("m",), 4, None)
    monkeypatch.setenv("TIDEMILL_UPSTREAM_KEY", "k")
    assert read_arguments(["http://a:1"]).router.upstreams[0].key() == "k"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["route.port=1"], "router.upstreams is missing"),
        (["http://a", "router.load_factr=2"], "did you mean 'router.load_factor'"),
        (["http://a", "http://a"], "same name"),
        (["http://"], "name a host"),
        (["http://u:p@a"], "user or password"),
        (["http://a", "route.port=70000"], "0 to 65535"),
        (["http://a", "model=x"], "'model=x' is neither"),
        (["http://a", "router.upstreams=[]"], "not both"),
        (["http://a", "server.max_body_bytes=0"], "max_body_bytes"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(arguments: list[str], says: str):
    with pytest.raises(ConfigError, match=re.escape(says)):
        read_arguments(arguments)


def test_an_error_is_one_line(capsys: pytest.CaptureFixture[str]):
    assert main(["http://a", "nonsense"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_process_routes_with_the_key_it_prints_and_ends_when_told(tmp_path: Path):
    upstream = SmallUpstream(key="of-the-upstream")
    with serving(upstream) as url:
        keys = tmp_path / "keys.json"
        command = [sys.executable, "-m", "jobs.route", url, "route.port=0", f"route.keys_path={keys}"]
        environment = {
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "TIDEMILL_UPSTREAM_KEY": "of-the-upstream",
        }
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stdout is not None
            where = re.search(r"http://\S+(?=/v1)", process.stdout.readline())
            secret = re.search(r"sk-tm-\S+", process.stdout.readline())
            assert where is not None
            assert secret is not None
            body = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
            with httpx.Client(base_url=where.group()) as client:
                assert client.post("/v1/chat/completions", json=body).status_code == 401
                client.headers["authorization"] = f"Bearer {secret.group()}"
                answer = client.post("/v1/chat/completions", json=body)
                assert answer.content == COMPLETE
                usage = client.get("/v1/admin/keys/stats").json()["data"][0]
            process.send_signal(signal.SIGTERM)
            assert process.wait(15) == 143
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (3, 4)
    assert '"prompt_tokens": 3' in keys.read_text()
    assert "key.create" in (tmp_path / "keys.json.audit.jsonl").read_text()
