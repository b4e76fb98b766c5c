"""Many clients at once, a third of them leaving: nothing leaks, nobody's answer is short, health stays quick.

Runs with TIDEMILL_CHAOS=1, for TIDEMILL_LOAD_SECONDS (300) with TIDEMILL_LOAD_CLIENTS (200). The server is a
process of its own, so that the clients' work is not measured as its.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.tiny_model import make_tiny_checkpoint

pytestmark = pytest.mark.skipif("TIDEMILL_CHAOS" not in os.environ, reason="minutes of load: TIDEMILL_CHAOS=1")
SECONDS = float(os.environ.get("TIDEMILL_LOAD_SECONDS", "300"))
NUM_CLIENTS = int(os.environ.get("TIDEMILL_LOAD_CLIENTS", "200"))
SHARE_THAT_LEAVES = 0.3
NUM_TOKENS = 48
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


@dataclass
class Counts:
    finished: int = 0
    left: int = 0
    refused: int = 0
    wrong: list[str] = field(default_factory=list)
    health_seconds: list[float] = field(default_factory=list)
    memory_bytes: list[tuple[float, int]] = field(default_factory=list)


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


def test_clients_that_come_and_go_leave_nothing_behind(served: tuple[int, str]):
    pid, url = served
    counts = asyncio.run(_load(pid, url))
    health = np.quantile(counts.health_seconds, [0.5, 0.99, 1.0]) * 1e3
    last_half = [size for at, size in counts.memory_bytes if at > SECONDS / 2]
    quarter = len(last_half) // 4
    growth = int(np.median(last_half[-quarter:]) - np.median(last_half[:quarter]))
    facts = asyncio.run(_facts(url))
    print(
        f"\n{NUM_CLIENTS} clients, {SECONDS:.0f} s: {counts.finished} answers finished, {counts.left} left, "
        f"{counts.refused} refused; /health in ms: median {health[0]:.1f}, p99 {health[1]:.1f}, most "
        f"{health[2]:.1f} of {len(counts.health_seconds)}; memory {last_half[-1] / 2**20:.0f} MiB, grown by "
        f"{growth / 2**20:.2f} MiB over the last half; afterwards {facts}"
    )
    assert not counts.wrong, counts.wrong[:3]
    assert counts.finished > NUM_CLIENTS
    assert 0.2 < counts.left / (counts.left + counts.finished) < 0.4
    assert facts == {"running": 0.0, "waiting": 0.0, "held": 0.0}
    assert growth < MAX_GROWTH_BYTES
    assert health[1] < MAX_HEALTH_SECONDS * 1e3


async def _load(pid: int, url: str) -> Counts:
    counts = Counts()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=NUM_CLIENTS)
    started = time.monotonic()
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=120) as client:
        clients = [_client(client, random.Random(index), started, counts) for index in range(NUM_CLIENTS)]
        await asyncio.gather(_watch(pid, url, started, counts), *clients)
    return counts


async def _client(client: httpx.AsyncClient, rng: random.Random, started: float, counts: Counts) -> None:
    """Ask for one stream after the other; of some, read only the beginning."""
    while time.monotonic() - started < SECONDS:
        leaves_after = rng.randrange(1, 6) if rng.random() < SHARE_THAT_LEAVES else None
        text = "".join(rng.choices("abcdefgh ", k=rng.randrange(20, 200)))
        body = {
            "messages": [{"role": "user", "content": text}],
            "max_tokens": NUM_TOKENS,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            if answer.status_code == 429:
                counts.refused += 1
                await asyncio.sleep(float(answer.headers["Retry-After"]))
                continue
            events: list[str] = []
            async for line in answer.aiter_lines():
                if line:
                    events.append(line)
                if leaves_after is not None and len(events) >= leaves_after:
                    break
        if leaves_after is not None:
            counts.left += 1
        else:
            counts.finished += 1
            if (wrong := _what_is_wrong(answer.status_code, events)) is not None:
                counts.wrong.append(wrong)


def _what_is_wrong(status: int, events: list[str]) -> str | None:
    """Of a whole answer; None for nothing."""
    if status != 200 or len(events) < 4 or events[-1] != "data: [DONE]":
        return f"{status}: {events[-2:]}"
    values: list[dict[str, Any]] = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    usage = values[-1].get("usage") or {}
    if usage.get("completion_tokens") != NUM_TOKENS or values[-2]["choices"][0]["finish_reason"] != "length":
        return f"{values[-2:]}"
    return None


async def _watch(pid: int, url: str, started: float, counts: Counts) -> None:
    """Ask for the server's health, on a connection of its own, and look at its memory."""
    async with httpx.AsyncClient(base_url=url, timeout=30) as client:
        while (elapsed := time.monotonic() - started) < SECONDS:
            asked = time.perf_counter()
            answer = await client.get("/health")
            counts.health_seconds.append(time.perf_counter() - asked)
            assert answer.status_code == 200
            resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            counts.memory_bytes.append((elapsed, resident))
            await asyncio.sleep(0.1)


async def _facts(url: str) -> dict[str, float]:
    """What the engine still has, by its own metrics."""
    await asyncio.sleep(1)
    async with httpx.AsyncClient(base_url=url, timeout=30) as client:
        text = (await client.get("/metrics")).text
    found = {}
    for name, pattern in (
        ("running", r"^tidemill_running_requests\S* (\S+)$"),
        ("waiting", r"^tidemill_waiting_requests\S* (\S+)$"),
        ("held", r'^tidemill_cache_pages_used\S* (\S+)$'),
    ):
        values = re.findall(pattern, text, re.MULTILINE)
        assert values, f"no metric {name}"
        found[name] = sum(map(float, values))
    return found
