# pyright: reportArgumentType=false, reportCallIssue=false
"""`python -m jobs.serve`: what it accepts, and a real one, asked by the line that it prints."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from engine.checkpoints import DEFAULT_MODEL
from engine.errors import ConfigError
from jobs.api_keys import KEY_VARIABLE, open_keys
from jobs.serve import curl_line, main, read_arguments

SMALL = [
    "engine.max_model_len=512",
    "engine.max_num_seqs=4",
    "engine.max_num_batched_tokens=64",
    "engine.min_token_pad=64",
    "engine.kv_cache_bytes=67108864",
    "serve.port=0",
    "server.drain_seconds=1",
]


def test_the_embedded_model_is_served_on_the_loopback_with_keys_by_default():
    serving = read_arguments([])
    assert serving is not None
    assert serving.sources == {DEFAULT_MODEL: DEFAULT_MODEL}
    assert (serving.serve.host, serving.serve.port) == ("127.0.0.1", 8000)
    assert serving.server.require_api_key


def test_options_are_those_of_a_job_and_of_the_server():
    serving = read_arguments(
        ["conf=gpu", "engine.max_num_seqs=8", "serve.models={a: /x, b: /y}", "server.max_n=2"]
    )
    assert serving is not None
    assert (serving.engine.platform, serving.engine.max_num_seqs) == ("gpu", 8)
    assert (serving.sources, serving.server.max_n) == ({"a": "/x", "b": "/y"}, 2)
    named = read_arguments(["model.source=/models/small/"])
    assert named is not None
    assert named.sources == {"small": "/models/small/"}


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("serve.prot=1", "did you mean 'serve.port'"),
        ("serve.port=70000", "must be from 0 to 65535"),
        ("serve.models={}", "at least one model"),
        ("server.max_nn=1", "did you mean 'server.max_n'"),
        ("input.path=x", "unknown configuration key 'input.path'"),
        ("engine.max_num_seq=1", "engine.max_num_seqs"),
        ("engine.page_size=24", "power of two"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(argument: str, says: str):
    with pytest.raises(ConfigError, match=re.escape(says)):
        read_arguments([argument])


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]):
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    for option in ("serve.port=8000", "server.max_logprobs=20", "server.require_api_key=True"):
        assert option in said


def test_a_port_that_is_taken_is_told_before_a_model_is_loaded(capsys: pytest.CaptureFixture[str]):
    from engine.server.serving import bound_socket
    from engine.server.settings import ServerSettings

    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    try:
        with bound_socket("127.0.0.1", 0, ServerSettings()) as taken:
            taken.listen()
            assert main([f"serve.port={taken.getsockname()[1]}", "model.source=/not/there"]) == 2
        assert "cannot listen" in capsys.readouterr().err
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])


@contextmanager
def served() -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    """A server as a process, and what it said: `url`, `key`, `curl`."""
    command = [sys.executable, "-m", "jobs.serve", *SMALL, "serve.traces=true"]
    environment = {**os.environ, "OTEL_TRACES_EXPORTER": "console"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, bufsize=1, env=environment)
    assert process.stdout is not None
    said: dict[str, str] = {}
    try:
        for line in process.stdout:
            if found := re.search(r" on (http\S+)/v1$", line):
                said["url"] = found[1]
            elif found := re.match(r"API key .*: (\S+)$", line):
                said["key"] = found[1]
            elif line.startswith("Try it: "):
                said["curl"] = line.removeprefix("Try it: ").strip()
                break
        assert "curl" in said, "it ended before it was ready"
        yield process, said
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def stop(process: subprocess.Popen[str]) -> int:
    process.send_signal(signal.SIGTERM)
    return process.wait(timeout=30)


def as_request(curl: str) -> tuple[str, dict[str, str], bytes]:
    """URL, headers and body of a curl line, for machines without curl."""
    words = shlex.split(curl)
    headers = dict(words[i + 1].split(": ", 1) for i, word in enumerate(words) if word == "-H")
    return words[2], headers, words[words.index("-d") + 1].encode()


def test_the_embedded_model_answers_the_line_that_is_printed():
    with served() as (process, said):
        url, headers, body = as_request(said["curl"])
        assert httpx.get(f"{said['url']}/v1/models").status_code == 401
        with httpx.stream("POST", url, headers=headers, content=body, timeout=60) as answer:
            events = [line for line in answer.iter_lines() if line]
        assert answer.status_code == 200
        assert events[-1] == "data: [DONE]"
        chunks = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events[:-1]]
        text = "".join(chunk["delta"].get("content", "") for chunk in chunks)
        assert chunks[-1]["finish_reason"] == "stop"
        whole = httpx.post(
            url, headers=headers, json={**json.loads(body), "stream": False}, timeout=60
        ).json()
        assert text == whole["choices"][0]["message"]["content"] != ""
        owner = {"Authorization": f"Bearer {said['key']}"}
        assert "tidemill_" in httpx.get(f"{said['url']}/metrics", headers=owner).text
        assert stop(process) == 143
        # What the server says from there on are its spans, one a request that was answered.
        assert process.stdout is not None
        assert process.stdout.read().count('"gen_ai.operation.name": "chat"') == 2


def test_a_key_may_come_from_the_environment_or_be_made(monkeypatch: pytest.MonkeyPatch):
    keys, secret = open_keys(None, required=True, command="x")
    assert secret is not None
    assert keys.find(secret) is not None
    assert open_keys(None, required=False, command="x")[1] is None
    monkeypatch.setenv(KEY_VARIABLE, "sk-mine")
    keys, secret = open_keys(None, required=True, command="x")
    assert secret is None
    assert keys.find("sk-mine") is not None


def test_the_line_is_one_that_a_shell_reads_back():
    url, headers, body = as_request(curl_line("http://127.0.0.1:8000", "a b", "sk-1"))
    assert url == "http://127.0.0.1:8000/v1/chat/completions"
    assert headers == {"Authorization": "Bearer sk-1", "Content-Type": "application/json"}
    assert json.loads(body)["model"] == "a b"
