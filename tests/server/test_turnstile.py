"""New requests begin one after the other, in their order, and what asks for nothing passes them."""

from __future__ import annotations

import asyncio
from typing import Any

from engine.server.turnstile import Turnstile

NUM_REQUESTS = 50


class Seen:
    """An app that notes who begins, and how many began since another task of the loop had its turn."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.since_turn = self.most = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.begun.append(scope["path"])
        self.since_turn += 1
        self.most = max(self.most, self.since_turn)


def scope(method: str, path: object) -> dict[str, Any]:
    return {"type": "http", "method": method, "path": str(path)}


async def _nothing(*_: object) -> Any:
    raise AssertionError("nothing is received or sent")


async def turns(seen: Seen) -> None:
    while True:
        seen.since_turn = 0
        await asyncio.sleep(0)


def test_requests_that_come_at_once_begin_in_order_and_leave_turns_to_others():
    async def main() -> Seen:
        seen = Seen()
        app = Turnstile(seen)
        turning = asyncio.ensure_future(turns(seen))
        calls = [app(scope("POST", index), _nothing, _nothing) for index in range(NUM_REQUESTS)]
        await asyncio.wait_for(asyncio.gather(*calls), 30)
        turning.cancel()
        return seen

    seen = asyncio.run(main())
    assert seen.begun == [str(index) for index in range(NUM_REQUESTS)]
    assert seen.most <= 2


def test_a_question_for_health_passes_those_that_wait():
    async def main() -> list[str]:
        seen = Seen()
        app = Turnstile(seen)
        calls = [app(scope("POST", index), _nothing, _nothing) for index in range(NUM_REQUESTS)]
        await asyncio.wait_for(asyncio.gather(*calls, app(scope("GET", "health"), _nothing, _nothing)), 30)
        return seen.begun

    begun = asyncio.run(main())
    assert begun.index("health") <= 2
    assert len(begun) == NUM_REQUESTS + 1


def test_who_gives_up_waiting_keeps_nobody_waiting():
    async def main() -> list[str]:
        seen = Seen()
        app = Turnstile(seen)
        tasks = [
            asyncio.ensure_future(app(scope("POST", index), _nothing, _nothing))
            for index in range(NUM_REQUESTS)
        ]
        await asyncio.sleep(0)
        for task in tasks[10:40]:
            task.cancel()
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 30)
        return seen.begun

    assert asyncio.run(main()) == [str(index) for index in (*range(10), *range(40, NUM_REQUESTS))]


def test_a_request_after_a_pause_does_not_wait():
    async def main() -> list[str]:
        seen = Seen()
        app = Turnstile(seen)
        for index in range(3):
            await app(scope("POST", index), _nothing, _nothing)
            await asyncio.sleep(0.01)
        return seen.begun

    assert asyncio.run(main()) == ["0", "1", "2"]
