"""The engine behind a thread: leaving early, time limits, bounds, pauses, failures, its end."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from engine.async_engine import AsyncEngine
from engine.doorkeeper import Doorkeeper
from engine.errors import ConfigError, EngineClosed, Overloaded, RequestError
from engine.outputs import RequestOutput
from engine.sampling_params import SamplingParams
from tests.engine.costless import Gate, assert_nothing_is_left, costless_engine, stream_all
from tests.engine.engines import tiny_engine, tokens_of

LONG = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
SHORT = LONG.replace(max_tokens=6)
PROMPTS = ["the answer", "is", [5, 6, 7], [{"role": "user", "content": "the"}]]


# -- leaving early ---------------------------------------------------------------------------------------


def test_a_cancelled_task_frees_its_pages(gate: Gate, gated: AsyncEngine):
    async def leave() -> None:
        task = asyncio.create_task(gated.generate([5] * 40, LONG))
        gate.let(4)
        while not gated.num_unfinished:
            await asyncio.sleep(0)
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.let(4)
        while gated.num_unfinished:
            await asyncio.sleep(0.005)

    asyncio.run(leave())
    assert_nothing_is_left(gated)


def test_a_closed_stream_frees_its_pages_and_others_go_on(front: AsyncEngine):
    async def leave() -> RequestOutput:
        other = asyncio.create_task(front.generate([9] * 20, LONG))
        stream = front.stream([5] * 40, LONG.replace(max_tokens=80))
        await anext(stream)
        await stream.aclose()
        return await other

    assert len(asyncio.run(leave()).outputs[0].token_ids) == 100


def test_two_hundred_streams_of_which_a_third_leave():
    """The load of a server: every finished answer is complete, and no page is held in the end."""
    engine, _ = costless_engine(num_pages=40, max_num_seqs=16, stream_interval_ms=2)
    sampling = LONG.replace(max_tokens=40)

    async def client(front: AsyncEngine, index: int) -> bool:
        stream = front.stream([10 + index % 50] * (5 + index % 30), sampling, tenant=f"key-{index % 7}")
        shown, output = 0, None
        async for latest in stream:
            output = latest
            shown += 1
            if index % 10 < 3 and (shown == 1 + index % 4 or output.finished):
                await stream.aclose()
                return False
        assert output is not None
        assert output.finished
        assert len(output.outputs[0].token_ids) == 40
        assert output.outputs[0].text == engine.tokenizer.decode(output.outputs[0].token_ids)
        return True

    async def load(front: AsyncEngine) -> list[bool]:
        return await asyncio.gather(*(client(front, index) for index in range(200)))

    with AsyncEngine(engine) as front:
        finished = asyncio.run(load(front))
        assert finished.count(True) == 140
        assert_nothing_is_left(front)


def test_an_aborted_request_ends_as_it_stands(gate: Gate, gated: AsyncEngine):
    ended: list[RequestOutput] = []
    done = threading.Event()

    def take(output: RequestOutput) -> None:
        ended.append(output)
        done.set()

    name = gated.submit([5, 6], LONG, request_id="mine", on_output=take)
    gate.let(5)
    while gated.engine.stats().num_steps < 4:
        time.sleep(0.002)
    gated.abort(name)
    gated.abort("nobody")
    gate.open()
    assert done.wait(10)
    assert ended[0].outputs[0].finish_reason == "abort"
    assert 0 < len(ended[0].outputs[0].token_ids) < 100
    assert len(ended) == 1
    assert_nothing_is_left(gated)


# -- limits ----------------------------------------------------------------------------------------------


def test_time_limits_end_running_and_waiting_requests_as_they_stand(gate: Gate, gated: AsyncEngine):
    async def ask() -> list[RequestOutput]:
        running = [gated.generate([5 + index], LONG, timeout_s=0.3) for index in range(8)]
        tasks = [asyncio.create_task(each) for each in running]
        while gated.num_unfinished < 8:
            await asyncio.sleep(0.001)
        waiting = asyncio.create_task(gated.generate([77], LONG, timeout_s=0.2))
        gate.let(6)
        await asyncio.sleep(0.4)
        gate.let(6)
        return await asyncio.gather(*tasks, waiting)

    *running, waiting = asyncio.run(ask())
    for output in (*running, waiting):
        assert output.finished
        assert output.outputs[0].finish_reason == "timeout"
    assert waiting.outputs[0].token_ids == ()
    assert all(0 < len(output.outputs[0].token_ids) < 100 for output in running)
    gate.open()
    assert_nothing_is_left(gated)


def test_a_time_limit_needs_no_steps(gated: AsyncEngine):
    gated.pause()
    output = asyncio.run(gated.generate([5], LONG, timeout_s=0.05))
    assert output.outputs[0].finish_reason == "timeout"
    with pytest.raises(RequestError, match="timeout_s is 0"):
        asyncio.run(gated.generate([5], LONG, timeout_s=0))


def test_more_than_may_be_unfinished_is_refused_with_when_to_come_again():
    engine, _ = costless_engine()
    with AsyncEngine(engine, max_waiting=3) as front:
        front.pause()
        names = [front.submit([5 + index], SHORT, on_output=print) for index in range(3)]
        with pytest.raises(Overloaded, match="max_waiting") as refused:
            front.submit([9], SHORT, on_output=print)
        assert 1 <= refused.value.retry_after_s <= 60
        front.abort(names[0])
        front.run_on_step_thread(int).result()
        front.submit([9], SHORT, on_output=print)
        with pytest.raises(Overloaded):
            asyncio.run(front.generate([10], SHORT))
        front.resume()
        while front.num_unfinished:
            time.sleep(0.002)
        assert asyncio.run(front.generate([9], SHORT)).finished


def test_one_tenant_cannot_shut_the_others_out():
    doorkeeper = Doorkeeper(6)
    for _ in range(6):
        doorkeeper.enter("a")
    with pytest.raises(Overloaded):
        doorkeeper.enter("a")
    for _ in range(3):  # half of six
        doorkeeper.enter("b")
    with pytest.raises(Overloaded):
        doorkeeper.enter("b")
    doorkeeper.enter("c")
    for _ in range(4):
        doorkeeper.leave("a", 0.0)
    with pytest.raises(Overloaded):  # b has its share, and there are six
        doorkeeper.enter("b")
    for now in (3.0, 6.0):
        doorkeeper.leave("b", now)
    for _ in range(2):
        doorkeeper.enter("c")
    for _ in range(10):
        with pytest.raises(Overloaded) as refused:
            doorkeeper.enter("c")
    assert refused.value.retry_after_s == 30  # the tenth, at an end every three seconds


def test_what_cannot_run_is_refused_at_once_and_leaves_nothing(front: AsyncEngine):
    with pytest.raises(RequestError, match="128"):
        front.submit([5] * 128, SHORT, on_output=print)
    with pytest.raises(RequestError, match="99999"):
        asyncio.run(front.generate([99999], SHORT))
    with pytest.raises(RequestError):
        asyncio.run(stream_all(front, [], SHORT))
    assert front.healthy


def test_an_id_is_taken_once(gated: AsyncEngine):
    gated.submit([5], LONG, request_id="twice", on_output=print)
    with pytest.raises(RequestError, match="unfinished already"):
        gated.submit([5], LONG, request_id="twice", on_output=print)


# -- the engine as a whole -------------------------------------------------------------------------------


def test_a_pause_frees_all_pages_and_changes_no_output(monkeypatch: pytest.MonkeyPatch):
    engine = tiny_engine()
    sampling = LONG.replace(max_tokens=60)
    alone = engine.generate([[5, 6, 7], [8, 9]], sampling)
    step = engine.step

    def slow_step() -> list[RequestOutput]:
        time.sleep(0.02)  # so that the pause comes before they have finished
        return step()

    monkeypatch.setattr(engine, "step", slow_step)

    async def ask(front: AsyncEngine) -> list[RequestOutput]:
        streams = [front.stream(prompt, sampling) for prompt in ([5, 6, 7], [8, 9])]
        for stream in streams:
            await anext(stream)
        await asyncio.to_thread(front.pause)
        stats = front.stats()
        assert (stats.pages_held, stats.running, stats.waiting) == (0, 0, 2)
        steps = stats.num_steps
        late = asyncio.create_task(front.generate([3], SHORT))
        await asyncio.sleep(0.05)
        assert front.stats().num_steps == steps
        assert front.stats().waiting == 3
        await asyncio.to_thread(front.resume)
        await late
        return [[output async for output in stream][-1] for stream in streams]

    with AsyncEngine(engine) as front:
        assert tokens_of(asyncio.run(ask(front))) == tokens_of(alone)
        assert front.stats().preemptions >= 2
        assert_nothing_is_left(front)


def test_a_paused_engine_refuses_to_be_waited_for():
    engine, _ = costless_engine()
    engine.add_request("a", [5], sampling=SHORT)
    engine.step()
    engine.pause()
    assert engine.is_paused
    assert engine.step() == []
    assert engine.stats().pages_held == 0
    with pytest.raises(ConfigError, match="resume"):
        engine.generate([[5]], SHORT)
    with pytest.raises(ConfigError, match="resume"):
        next(engine.stream([5], SHORT))
    engine.resume()
    (output,) = [output for _ in iter(lambda: engine.has_unfinished, False) for output in engine.step()]
    assert len(output.outputs[0].token_ids) == 6


def test_calls_run_between_steps_in_the_step_thread(front: AsyncEngine):
    names = [front.run_on_step_thread(threading.current_thread).result().name for _ in range(2)]
    assert names == ["tidemill-step"] * 2
    with pytest.raises(ZeroDivisionError):
        front.run_on_step_thread(lambda: 1 // 0).result()
    assert front.healthy


def test_a_device_error_reaches_all_who_wait():
    def fail() -> None:
        if failing.is_set():
            raise RuntimeError("the device is gone")

    failing = threading.Event()
    engine, _ = costless_engine(before_results=fail)
    told: list[Exception] = []

    async def ask(front: AsyncEngine) -> list[Any]:
        waiting = [front.generate([5 + index], LONG) for index in range(12)]
        streams = [stream_all(front, [50 + index], LONG) for index in range(4)]
        tasks = [asyncio.create_task(each) for each in (*waiting, *streams)]
        while front.num_unfinished < 17:
            await asyncio.sleep(0.001)
        failing.set()
        return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 30)

    with AsyncEngine(engine) as front:
        front.pause()  # so that all are there when it fails
        front.submit([4], LONG, on_output=print, on_error=told.append)
        resume = threading.Timer(0.1, front.resume)
        resume.start()
        results = asyncio.run(ask(front))
        assert [str(each) for each in results] == ["the device is gone"] * 16
        assert not front.healthy
        with pytest.raises(EngineClosed, match="the device is gone"):
            front.submit([5], SHORT, on_output=print)
        with pytest.raises(EngineClosed, match="the device is gone"):
            front.run_on_step_thread(lambda: None).result()
        resume.join()
    assert [str(each) for each in told] == ["the device is gone"]


def test_closing_drains_what_it_has_time_for_and_ends_the_rest():
    engine, _ = costless_engine()
    ended: list[RequestOutput] = []
    front = AsyncEngine(engine)
    for index in range(20):
        front.submit([5 + index], SHORT, on_output=ended.append)
    front.close(drain_seconds=30)
    assert [output.outputs[0].finish_reason for output in ended] == ["length"] * 20
    with pytest.raises(EngineClosed, match="closed"):
        front.submit([5], SHORT, on_output=print)
    front.close()
    assert engine.stats().pages_held == 0

    gate = Gate()
    engine, _ = costless_engine(before_results=gate)
    front, ended = AsyncEngine(engine), []
    front.pause()
    for index in range(12):
        front.submit([5 + index], LONG, on_output=ended.append)
    front.resume()
    gate.let(3)
    threading.Timer(0.2, gate.open).start()
    front.close(drain_seconds=0.05)
    assert [output.outputs[0].finish_reason for output in ended] == ["abort"] * 12
    assert engine.stats().pages_held == 0


def test_one_that_was_never_started_is_closed_too():
    engine, _ = costless_engine()
    front = AsyncEngine(engine)
    assert front.stats().num_steps == 0
    front.close()
    assert not front.healthy
    with pytest.raises(EngineClosed):
        front.submit([5], SHORT, on_output=print)
    with pytest.raises(EngineClosed):
        front.run_on_step_thread(lambda: None).result()


def test_a_receiver_that_fails_ends_its_own_request_only(
    front: AsyncEngine, caplog: pytest.LogCaptureFixture
):
    def fail(output: RequestOutput) -> None:
        raise ValueError("no room")

    front.submit([5] * 20, LONG, request_id="bad", stream=True, on_output=fail)
    assert asyncio.run(front.generate([6], LONG)).finished
    while front.num_unfinished:
        time.sleep(0.002)
    assert "'bad'" in caplog.text
    assert "no room" in caplog.text


def test_many_threads_submit_at_once(front: AsyncEngine):
    """Texts too: prompts are made tokens in the callers' threads."""
    texts = [f"the answer {index} is" for index in range(40)]
    expected = front.run_on_step_thread(lambda: front.engine.generate(texts, SHORT)).result()
    results: dict[str, RequestOutput] = {}
    done = threading.Semaphore(0)

    def take(output: RequestOutput) -> None:
        results[output.request_id] = output
        done.release()

    with ThreadPoolExecutor(8) as pool:
        submit = lambda pair: front.submit(pair[1], SHORT, request_id=f"{pair[0]}", on_output=take)  # noqa: E731
        list(pool.map(submit, enumerate(texts * 5)))
    for _ in range(200):
        assert done.acquire(timeout=20)
    for index in range(200):
        output = results[f"{index}"]
        assert output.prompt == texts[index % 40]
        assert output.outputs[0].token_ids == expected[index % 40].outputs[0].token_ids


def test_a_duplicate_may_leave_or_run_out_of_time(gate: Gate, gated: AsyncEngine):
    async def ask() -> list[RequestOutput]:
        leader = asyncio.create_task(gated.generate([5, 6], LONG, request_id="leader"))
        while not gated.num_unfinished:
            await asyncio.sleep(0.001)
        hasty = asyncio.create_task(gated.generate([5, 6], LONG, timeout_s=0.1))
        patient = asyncio.create_task(gated.generate([5, 6], LONG))
        gate.let(5)
        await asyncio.sleep(0.2)
        gate.let(2)
        late = await hasty
        leader.cancel()
        gate.open()
        return [late, await patient]

    late, patient = asyncio.run(ask())
    assert late.outputs[0].finish_reason == "timeout"
    assert late.outputs[0].token_ids == patient.outputs[0].token_ids[: len(late.outputs[0].token_ids)]
    assert len(patient.outputs[0].token_ids) == 100
    assert_nothing_is_left(gated)
