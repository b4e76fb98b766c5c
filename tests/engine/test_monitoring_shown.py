"""The endpoint, the dashboard's data and the console show what was counted, or say why they cannot."""

from __future__ import annotations

import io
import json
import re
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing

import pytest

from engine.engine import Engine
from engine.errors import ConfigError, MissingExtraError
from engine.monitoring import PUBLIC_PATHS, Metrics, dashboard_routes, start_monitoring
from engine.monitoring.console import ConsoleMonitor, lines, overview
from engine.monitoring.dashboard import DATA_PATH, PAGE_PATH, page
from engine.monitoring.http_server import MonitoringServer, Page
from engine.sampling_params import SamplingParams
from tests.engine.engines import tiny_engine, tokens_of

GREEDY = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def get(url: str) -> tuple[int, str, str]:
    """Status, content type and text."""
    try:
        with opener.open(url, timeout=10) as answer:
            return answer.status, answer.headers["Content-Type"], answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers["Content-Type"], ""


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = tiny_engine()
    yield made
    made.stop_monitoring()
    assert not made.observers


@pytest.fixture
def metrics(engine: Engine) -> Iterator[Metrics]:
    made = Metrics()
    made.watch(engine)
    yield made
    made.unwatch(engine)


def test_an_engine_serves_its_metrics_until_it_is_told_to_stop(engine: Engine):
    monitoring = engine.start_monitoring(prometheus_port=0, dashboard_port=0)
    engine.generate(["er", "on", "is"], GREEDY)
    url = monitoring.urls["prometheus"]
    status, kind, text = get(url)
    assert (status, kind) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert 'tidemill_requests_total{engine="model",status="completed"} 3.0' in text
    assert "# HELP tidemill_tokens_generated_total Tokens drawn for requests that had not ended.\n" in text
    assert "# TYPE tidemill_time_to_first_token_seconds histogram\n" in text
    assert get(url.replace("/metrics", "/else"))[0] == 404
    assert get(monitoring.urls["dashboard"])[:2] == (200, "text/html; charset=utf-8")
    assert get(url.replace("/metrics", "/dashboard"))[0] == 404, "each port serves what was asked of it"
    with pytest.raises(ConfigError, match="monitored already"):
        engine.start_monitoring(prometheus_port=0)

    engine.stop_monitoring()
    with pytest.raises(urllib.error.URLError):
        get(url)
    assert not engine.observers
    engine.start_monitoring(prometheus_port=None)
    engine.stop_monitoring()


def test_monitoring_changes_no_token(engine: Engine):
    sampling = SamplingParams(temperature=0.9, seed=4, n=2, max_tokens=12, stop=("er",))
    prompts = ["the answer", "an ion on the region", "is"]
    before = engine.generate(prompts, sampling)
    with start_monitoring(engine, prometheus_port=0, dashboard_port=0) as monitoring:
        during = engine.generate(prompts, sampling)
        assert get(monitoring.urls["prometheus"])[0] == 200
    assert tokens_of(during) == tokens_of(before)
    assert [[each.text for each in output.outputs] for output in during] == [
        [each.text for each in output.outputs] for output in before
    ]


def test_one_port_can_serve_both(engine: Engine):
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    monitoring = engine.start_monitoring(prometheus_port=port, dashboard_port=port)
    assert monitoring.urls == {
        "prometheus": f"http://127.0.0.1:{port}/metrics",
        "dashboard": f"http://127.0.0.1:{port}/dashboard",
    }
    assert [get(url)[0] for url in monitoring.urls.values()] == [200, 200]


def test_a_port_in_use_is_refused_and_nothing_is_left_behind(engine: Engine):
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError) as refused:
            engine.start_monitoring(prometheus_port=0, dashboard_port=port)
    assert str(refused.value) == (
        f"dashboard_port={port}: cannot listen on 127.0.0.1:{port} (Address already in use): choose another "
        "port, or 0 for any free one"
    )
    assert not engine.observers
    for bad in (70_000, True, "80"):
        with pytest.raises(ConfigError, match=r"prometheus_port=.*: give a port from 0"):
            engine.start_monitoring(prometheus_port=bad)


def test_two_engines_share_one_endpoint(engine: Engine):
    other = tiny_engine(num_pages=40)
    metrics = Metrics()
    metrics.watch(other, "other")
    try:
        with start_monitoring(engine, prometheus_port=0, metrics=metrics) as monitoring:
            text = get(monitoring.urls["prometheus"])[2]
        assert {"model", "other"} <= set(re.findall(r'steps_total\{engine="(\w+)"\}', text))
        assert [watch.name for watch in metrics.watches] == ["other"]
    finally:
        metrics.unwatch(other)


def test_a_slow_client_holds_nobody_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("engine.monitoring.http_server._Handler.timeout", 0.2)
    server = MonitoringServer("127.0.0.1", 0, option="port")
    server.routes["/"] = lambda query: Page("text/plain", query.encode())
    try:
        with socket.create_connection(("127.0.0.1", server.port)) as slow:
            slow.sendall(b"GET / HT")
            assert get(server.url("/?a=1")) == (200, "text/plain", "a=1")
            slow.settimeout(5)
            assert slow.recv(1) == b"", "it is left after its time"
    finally:
        server.close()


def points_of(metrics: Metrics, query: str = "") -> dict[str, list[float | None]]:
    from engine.monitoring.dashboard import data

    (found,) = json.loads(data(metrics, query).body)["engines"]
    return found["columns"]


def test_the_dashboard_asks_for_new_points_only(engine: Engine, metrics: Metrics):
    history = metrics.remember()
    engine.generate("er", GREEDY)
    for _ in range(3):
        time.sleep(0.002)
        history.look()
    columns = points_of(metrics)
    assert columns["number"] == list(range(len(columns["number"])))
    assert len(columns["number"]) >= 3
    assert {len(values) for values in columns.values()} == {len(columns["number"])}
    assert points_of(metrics, f"after.model={columns['number'][-1]}")["number"] == []
    assert points_of(metrics, "after.model=1")["number"][0] == 2
    for odd in ("after.model=x", "after.model=-5", "after.model=" + "9" * 40, "after.model", "%ff&&&"):
        assert points_of(metrics, odd)["number"][0] == 0


def test_the_page_loads_nothing_from_elsewhere_and_carries_no_data():
    shown = page()
    html = shown.body.decode()
    assert not re.findall(r"(?:src|href)=[\"'](?!data:)", html)
    assert set(re.findall(r"https?://[^\"'\s)]+", html)) == {
        "http://www.w3.org/2000/svg"
    }  # a name, not a place
    assert "innerHTML" not in html, "names of models are text"
    policy = shown.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert len(re.findall(r"'sha256-[\w+/]{43}='", policy)) == 2
    assert frozenset({PAGE_PATH}) == PUBLIC_PATHS
    assert DATA_PATH not in PUBLIC_PATHS


def test_a_server_mounts_the_dashboard(engine: Engine, metrics: Metrics):
    fastapi = pytest.importorskip("fastapi")
    pytest.importorskip("httpx")
    from fastapi.testclient import TestClient

    app = fastapi.FastAPI()
    dashboard_routes(app, metrics)
    with TestClient(app) as client:
        answer = client.get("/dashboard")
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        assert answer.headers["content-security-policy"] == page().headers["Content-Security-Policy"]
        assert client.get("/dashboard/data?after.model=0").json()["engines"][0]["name"] == "model"
        assert client.post("/dashboard").status_code == 405
        assert "/dashboard" not in client.get("/openapi.json").json()["paths"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_console_shows_the_numbers_as_text(engine: Engine, metrics: Metrics):
    from rich.console import Console

    metrics.remember()
    engine.generate([f"the answer in the region is {each}" for each in ("er", "on")], GREEDY)
    time.sleep(0.002)
    metrics.remember().look()
    stream = io.StringIO()
    Console(file=stream, width=90).print(overview(metrics))
    shown = stream.getvalue()
    rows = dict(re.findall(r"│ (.+?) +│ +(.+?) │", shown))
    stats = engine.totals()
    assert rows["active requests"] == "0"
    assert rows["finished requests"] == "2"
    assert rows["pages in use"] == f"0 of {engine.num_pages} (0%)"
    assert rows["of prompt tokens cached"] == f"{stats.num_cached_tokens / stats.num_prompt_tokens:.1%}"
    assert float(rows["requests/s"].replace(",", "")) > 0
    assert re.fullmatch(r"[\d,]+ / [\d,]+ ms", rows["to first token"])
    assert re.search(r"memory: \d+\.\d\d GiB", shown)
    (line, memory) = lines(metrics)
    assert line.startswith("model: ")
    assert "2 finished requests" in line
    assert memory.startswith("memory: ")


def test_the_console_is_live_on_a_terminal_and_lines_elsewhere(engine: Engine, metrics: Metrics):
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        ConsoleMonitor(metrics, stream, line_seconds=60).close()
    assert "\x1b[" in terminal.getvalue()
    assert "Tidemill" in terminal.getvalue()
    assert file.getvalue().startswith("model: ")
    assert "\x1b" not in file.getvalue()


def test_the_console_names_the_extra_that_it_needs(metrics: Metrics, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'tidemill\[monitoring\]'"):
        ConsoleMonitor(metrics, Terminal())
    ConsoleMonitor(metrics, io.StringIO()).close()  # lines need nothing
