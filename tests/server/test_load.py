"""Many clients at once, a third of them leaving: nothing leaks, nobody's answer is short, health stays quick.

Runs with TIDEMILL_CHAOS=1, for TIDEMILL_LOAD_SECONDS (300) with TIDEMILL_LOAD_CLIENTS (200). The server is a
process of its own, so that the clients' work is not measured as its.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.tiny_model import make_tiny_checkpoint

pytestmark = pytest.mark.skipif(
    "TIDEMILL_CHAOS" not in os.environ, reason="minutes of load: TIDEMILL_CHAOS=1"
)
SECONDS = float(os.environ.get("TIDEMILL_LOAD_SECONDS", "300"))
NUM_CLIENTS = int(os.environ.get("TIDEMILL_LOAD_CLIENTS", "200"))
MAX_GROWTH_BYTES = 16 << 20
MAX_HEALTH_SECONDS = 0.1
OPTIONS = [
    "engine.max_num_seqs=64",
    "engine.max_num_batched_tokens=256",
    "engine.min_token_pad=256",
    "engine.kv_cache_bytes=33554432",
    "serve.port=0",
    "server.require_api_key=false",
    "server.drain_seconds=1",
    # All clients come from one address.
    f"server.max_concurrent_per_key={NUM_CLIENTS + 8}",
]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[int, str]]:
    """The process id of a server of the tiny model, and its URL."""
    folder = make_tiny_checkpoint(tmp_path / "tiny", tie_word_embeddings=False)
    command = [sys.executable, "-m", "jobs.serve", f"model.source={folder}", *OPTIONS]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = next(match for line in process.stdout if (match := re.search(r" on (http\S+)/v1$", line)))
        yield process.pid, found[1]
    finally:
        process.terminate()
        process.wait(timeout=30)
        if process.stdout is not None:
            process.stdout.close()


@dataclass
class Watched:
    health_seconds: list[float] = field(default_factory=list)
    memory_bytes: list[tuple[float, int]] = field(default_factory=list)
    """(seconds since the beginning, resident bytes)."""


def test_clients_that_come_and_go_leave_nothing_behind(served: tuple[int, str]):
    pid, url = served
    command = [sys.executable, "-m", "tests.server.load_clients", url, str(SECONDS), str(NUM_CLIENTS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as clients:
        watched = _watch(pid, url)
        counts = json.loads(clients.communicate(timeout=120)[0])
    health = np.quantile(watched.health_seconds, [0.5, 0.99, 1.0]) * 1e3
    last_half = [size for at, size in watched.memory_bytes if at > SECONDS / 2]
    quarter = len(last_half) // 4
    growth = int(np.median(last_half[-quarter:]) - np.median(last_half[:quarter]))
    facts = _facts(url)
    print(
        f"\n{NUM_CLIENTS} clients, {SECONDS:.0f} s: {counts['finished']} answers finished, "
        f"{counts['left']} left, {counts['refused']} refused; /health in ms: median {health[0]:.1f}, "
        f"p99 {health[1]:.1f}, most {health[2]:.1f} of {len(watched.health_seconds)}; memory "
        f"{last_half[-1] / 2**20:.0f} MiB, grown by {growth / 2**20:.2f} MiB over the last half; "
        f"afterwards {facts}"
    )
    assert not counts["wrong"], counts["wrong"][:3]
    assert counts["finished"] > NUM_CLIENTS
    assert 0.2 < counts["left"] / (counts["left"] + counts["finished"]) < 0.4
    assert facts == {"running": 0.0, "waiting": 0.0, "held": 0.0}
    assert growth < MAX_GROWTH_BYTES
    assert health[1] < MAX_HEALTH_SECONDS * 1e3


def _watch(pid: int, url: str) -> Watched:
    """Ask for the server's health, a connection each time, and look at its memory."""
    watched, started = Watched(), time.monotonic()
    while (elapsed := time.monotonic() - started) < SECONDS:
        asked = time.perf_counter()
        # Not httpx: a client for each call makes a TLS context, which would be measured as the server's.
        with urllib.request.urlopen(f"{url}/health", timeout=30) as answer:
            assert answer.status == 200
        watched.health_seconds.append(time.perf_counter() - asked)
        resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        watched.memory_bytes.append((elapsed, resident))
        time.sleep(0.1)
    return watched


def _facts(url: str) -> dict[str, float]:
    """What the engine still has, by its own metrics."""
    time.sleep(1)
    text = httpx.get(f"{url}/metrics", timeout=30).text
    found = {}
    for name, pattern in (
        ("running", r"^tidemill_running_requests\S* (\S+)$"),
        ("waiting", r"^tidemill_waiting_requests\S* (\S+)$"),
        ("held", r"^tidemill_cache_pages_used\S* (\S+)$"),
    ):
        values = re.findall(pattern, text, re.MULTILINE)
        assert values, f"no metric {name}"
        found[name] = sum(map(float, values))
    return found
