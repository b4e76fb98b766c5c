"""Clients of a server under load, as a program: `python -m tests.server.load_clients URL SECONDS CLIENTS`.

Prints what came of them as one line of JSON.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx

SHARE_THAT_LEAVES = 0.3
NUM_TOKENS = 48
# One a call: a connection that is kept may be closed by the server at the moment when the next call goes out.
CONNECTIONS = httpx.Limits(max_connections=None, max_keepalive_connections=0)


@dataclass
class Counts:
    finished: int = 0
    left: int = 0
    refused: int = 0
    wrong: list[str] = field(default_factory=list)


async def load(url: str, seconds: float, num_clients: int) -> Counts:
    counts = Counts()
    ends_at = time.monotonic() + seconds
    async with httpx.AsyncClient(base_url=url, limits=CONNECTIONS, timeout=120) as client:
        clients = [_client(client, random.Random(index), ends_at, counts) for index in range(num_clients)]
        await asyncio.gather(*clients)
    return counts


async def _client(client: httpx.AsyncClient, rng: random.Random, ends_at: float, counts: Counts) -> None:
    """Ask for one stream after the other; of some, read only the beginning."""
    while time.monotonic() < ends_at:
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


if __name__ == "__main__":
    print(json.dumps(asdict(asyncio.run(load(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))))))
