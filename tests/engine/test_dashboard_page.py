"""The dashboard in a browser: it draws what the engine does, asks for a key where one is needed, complains of
nothing."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from engine.engine import Engine
from engine.monitoring import Metrics, Monitoring
from engine.monitoring.dashboard import routes
from engine.sampling_params import SamplingParams
from tests.engine.chromium import Chromium, find_chromium
from tests.engine.engines import tiny_engine

pytestmark = pytest.mark.skipif(
    find_chromium() is None, reason="no Chromium is installed: apt-get install chromium-headless-shell"
)
SAMPLING = SamplingParams(temperature=0.8, max_tokens=40, ignore_eos=True)
KEY = "sk-in-memory-only"
# TIDEMILL_PICTURES=folder keeps the pictures, to be looked at.
PICTURES = os.environ.get("TIDEMILL_PICTURES")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    program = find_chromium()
    assert program is not None, "skipped otherwise"
    with Chromium(program, tmp_path_factory.mktemp("chromium")) as made:
        yield made


@pytest.fixture
def busy() -> Iterator[tuple[Engine, Metrics]]:
    """An engine with work behind it and more waiting, looked at a few times."""
    engine, metrics = tiny_engine(), Metrics()
    metrics.watch(engine, "a <b>bold</b> engine")
    history = metrics.remember()
    for number in range(12):
        engine.add_request(f"{number}", prompt=f"the answer in the region is {number}", sampling=SAMPLING)
    for number in range(30):
        engine.step()
        if number % 5 == 0:
            time.sleep(0.02)
            history.look()
    yield engine, metrics
    for number in range(12):
        engine.abort_request(f"{number}")
    while engine.has_unfinished:
        engine.step()
    metrics.unwatch(engine)


def tile(label: str) -> str:
    tiles = "[...document.querySelectorAll('.tile')]"
    return f"{tiles}.find(each => each.firstChild.textContent === '{label}').lastChild.textContent"


def chart(title: str) -> str:
    return f"document.querySelector('svg.chart[aria-label^=\"{title}\"]')"


def keep(page: object, name: str) -> None:
    if PICTURES:
        page.picture(Path(PICTURES) / f"{name}.png")  # type: ignore[attr-defined]


def test_the_page_draws_what_the_engine_does(browser: Chromium, busy: tuple[Engine, Metrics]):
    engine, metrics = busy
    with Monitoring(metrics) as monitoring:
        monitoring.serve(host="127.0.0.1", prometheus_port=None, dashboard_port=0, options="")
        page = browser.open(monitoring.urls["dashboard"])
        page.wait_for("document.getElementById('status').textContent === 'live'")
        page.wait_for(f"{chart('Sequences')}.querySelectorAll('path.line').length === 2")
        stats = engine.totals()
        assert page.evaluate("document.querySelector('h2').textContent") == "a <b>bold</b> engine"
        assert page.evaluate("document.querySelector('h2').children.length") == 0
        assert page.evaluate(tile("Active requests")) == f"{engine.num_unfinished} {stats.waiting} waiting"
        share = 100 * stats.pages_held / engine.num_pages
        shown = page.evaluate(tile("KV pages in use")).partition("%")
        assert float(shown[0]) == pytest.approx(share, rel=0.01)
        assert shown[2] == f" of {engine.num_pages}"
        assert page.evaluate(tile("Memory")).endswith(" GiB")
        label = page.evaluate(f"{chart('Sequences')}.getAttribute('aria-label')")
        assert label == f"Sequences: running {stats.running}, waiting {stats.waiting}"
        assert page.evaluate("document.querySelectorAll('figure').length") == 8

        # The same numbers as a table, for who cannot see the charts.
        page.evaluate("document.querySelector('summary').click()")
        page.wait_for("document.querySelectorAll('tbody tr').length >= 5")
        heads = page.evaluate("[...document.querySelectorAll('th')].map(e => e.textContent)")
        row = page.evaluate("[...document.querySelector('tbody tr').children].map(e => e.textContent)")
        assert dict(zip(heads, row, strict=True))["Sequences: running"] == str(stats.running)
        page.evaluate("document.querySelector('summary').click()")

        keep(page, "light")
        light = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.prefer(dark=True)
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
        keep(page, "dark")
        page.send(
            "Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=1, mobile=True
        )
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, "a phone scrolls down only"
        keep(page, "phone")

        assert page.complaints == []
        hosts = {request["url"].split("/")[2] for request in page.requests if request["url"][:4] == "http"}
        assert hosts == {monitoring.urls["dashboard"].split("/")[2]}
    page.wait_for("document.getElementById('status').dataset.state === 'lost'")


class Guarded(BaseHTTPRequestHandler):
    """A server with a key, as the API server guards its routes: all but the page."""

    metrics: Metrics

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        if path != "/dashboard" and self.headers["Authorization"] != f"Bearer {KEY}":
            self.send_response(401)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        page = routes(self.metrics)[path](query)
        self.send_response(200)
        for name, value in {"Content-Type": page.content_type, **page.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(page.body)))
        self.end_headers()
        self.wfile.write(page.body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is printed."""


@pytest.fixture
def guarded(busy: tuple[Engine, Metrics]) -> Iterator[str]:
    handler = type("Handler", (Guarded,), {"metrics": busy[1]})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/dashboard"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_key_is_asked_for_and_kept_in_memory_only(browser: Chromium, guarded: str):
    page = browser.open(guarded)
    page.wait_for("!document.getElementById('ask').hidden")
    assert page.evaluate("document.activeElement.id") == "key"
    keep(page, "key")

    def enter(key: str) -> None:
        page.evaluate(f"document.getElementById('key').value = {key!r}")
        page.evaluate("document.querySelector('#ask button').click()")

    assert page.evaluate("document.getElementById('refused').hidden")
    enter("wrong")
    page.wait_for("!document.getElementById('refused').hidden")
    num_asked = len(page.requests)
    time.sleep(1.3)
    assert len(page.requests) == num_asked, "without a key it does not go on asking"
    enter(KEY)
    page.wait_for("document.getElementById('ask').hidden && document.querySelectorAll('figure').length === 8")
    stored = page.evaluate(
        "JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href, "
        "document.getElementById('key').value])"
    )
    assert KEY not in stored
    assert KEY not in page.evaluate("document.documentElement.outerHTML")
    assert not [request for request in page.requests if KEY in request["url"]]
    assert [request for request in page.requests if KEY in request["headers"].get("Authorization", "")]
    assert set(page.complaints) <= {
        "Failed to load resource: the server responded with a status of 401 (Unauthorized)"
    }
