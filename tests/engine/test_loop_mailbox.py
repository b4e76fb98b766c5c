"""Outputs on their way into an event loop: all come, and what else the loop has to do is not kept waiting."""

from __future__ import annotations

import asyncio
import threading

from engine.loop_mailbox import Mailbox, waker_of_running_loop
from engine.outputs import CompletionOutput, RequestMetrics, RequestOutput

NUM_MAILBOXES = 100


def output(text: str) -> RequestOutput:
    sample = CompletionOutput(index=0, token_ids=(), finish_reason=None, text=text)
    metrics = RequestMetrics(0.0, None, None, None)
    return RequestOutput("r", None, (1,), (sample,), False, metrics, delta_text=text)


def filled_from_a_thread(mailboxes: list[Mailbox], text: str) -> None:
    filling = threading.Thread(target=lambda: [mailbox.put(output(text)) for mailbox in mailboxes])
    filling.start()
    filling.join()  # the loop stands still meanwhile, as in a busy turn


def test_many_outputs_at_once_leave_room_for_others():
    """Of all the tasks that have something to read, only few run between two turns of another one."""
    read_since_turn, most, num_read = 0, 0, 0

    async def main() -> None:
        nonlocal read_since_turn, most, num_read
        mailboxes = [Mailbox(waker_of_running_loop()) for _ in range(NUM_MAILBOXES)]

        async def read(mailbox: Mailbox) -> None:
            nonlocal read_since_turn, most, num_read
            await mailbox.get()
            read_since_turn, num_read = read_since_turn + 1, num_read + 1
            most = max(most, read_since_turn)

        async def turn_up() -> None:
            nonlocal read_since_turn
            while num_read < NUM_MAILBOXES:
                read_since_turn = 0
                await asyncio.sleep(0)

        reading = [asyncio.ensure_future(read(mailbox)) for mailbox in mailboxes]
        await asyncio.sleep(0)
        filled_from_a_thread(mailboxes, "x")
        await asyncio.wait_for(asyncio.gather(turn_up(), *reading), 30)

    asyncio.run(main())
    assert num_read == NUM_MAILBOXES
    assert 1 <= most <= NUM_MAILBOXES // 10


def test_outputs_that_come_while_others_wait_their_turn_are_not_lost():
    """Two portions of texts each, the second while the first one's tasks are still being woken."""
    read: list[str] = []

    async def main() -> None:
        mailboxes = [Mailbox(waker_of_running_loop()) for _ in range(NUM_MAILBOXES)]

        async def collect(mailbox: Mailbox) -> None:
            text = ""
            while text != "xy":
                text += (await mailbox.get()).delta_text
            read.append(text)

        reading = [asyncio.ensure_future(collect(mailbox)) for mailbox in mailboxes]
        await asyncio.sleep(0)
        filled_from_a_thread(mailboxes, "x")
        await asyncio.sleep(0)
        filled_from_a_thread(mailboxes, "y")
        await asyncio.wait_for(asyncio.gather(*reading), 30)

    asyncio.run(main())
    assert read == ["xy"] * NUM_MAILBOXES
