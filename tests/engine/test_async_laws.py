"""Laws of the engine behind a thread, under anything that several threads do to it at once.

A script of submissions, aborts, time limits, pauses and resumptions is drawn, cut in parts, and each part is
played by a thread of its own. Whatever the order in which they come:

- every request has exactly one end, an output that is finished
- its tokens are the first ones of what the engine alone gives, all of them unless it was ended
- what a stream showed, joined, is its last text, and nothing shown was taken back
- in the end no page is held and nothing is unfinished
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.async_engine import AsyncEngine
from engine.outputs import RequestOutput
from engine.sampling_params import SamplingParams
from tests.engine.costless import costless_engine, drawn_token

NUM_THREADS = 3
MAX_TOKENS = 30


@dataclass(frozen=True)
class Submission:
    """One step of a script: a request, and what else happens to it."""

    prompt_len: int
    first: int
    num_samples: int
    stream: bool
    stop: bool
    timeout_s: float | None
    aborts: bool
    pauses: bool
    tenant: str | None
    priority: int


submissions = st.builds(
    Submission,
    prompt_len=st.integers(1, 40),
    first=st.integers(5, 60),
    num_samples=st.integers(1, 2),
    stream=st.booleans(),
    stop=st.booleans(),
    timeout_s=st.sampled_from([None, None, 0.001, 0.02]),
    aborts=st.sampled_from([False, False, True]),
    pauses=st.sampled_from([False, False, False, True]),
    tenant=st.sampled_from([None, "a", "b"]),
    priority=st.integers(0, 2),
)


@dataclass
class Receiver:
    """What one request was given."""

    submission: Submission
    prompt: list[int]
    outputs: list[RequestOutput] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def take(self, output: RequestOutput) -> None:
        self.outputs.append(output)
        if output.finished:
            self.ended.set()

    def check(self) -> None:
        last = self.outputs[-1]
        assert [output.finished for output in self.outputs].count(True) == 1
        assert last.finished
        assert len(last.outputs) == self.submission.num_samples
        for sample in last.outputs:
            tokens = list(self.prompt)
            for token in sample.token_ids:
                assert token == drawn_token(tokens)
                tokens.append(token)
            if sample.finish_reason == "length":
                assert len(sample.token_ids) == MAX_TOKENS
            else:
                allowed = {"stop"} if self.submission.stop else set()
                allowed |= {"timeout"} if self.submission.timeout_s else set()
                allowed |= {"abort"} if self.submission.aborts else set()
                assert sample.finish_reason in allowed
        if self.submission.stream:
            assert "".join(output.delta_text for output in self.outputs) == last.outputs[0].text
            for output in self.outputs:
                for shown, final in zip(output.outputs, last.outputs, strict=True):
                    assert final.text.startswith(shown.text)
        else:
            assert len(self.outputs) == 1


@pytest.fixture(scope="module")
def front() -> Iterator[AsyncEngine]:
    engine, _ = costless_engine(num_pages=24, scheduling_policy="priority", priority_aging_steps=20)
    with AsyncEngine(engine) as front:
        yield front


def held_pages(front: AsyncEngine) -> tuple[bool, int]:
    """Whether it is paused, and the pages that are held."""
    return front.engine.is_paused, front.engine.stats().pages_held


def play(front: AsyncEngine, script: list[Submission], receivers: list[Receiver]) -> None:
    for submission in script:
        prompt = [submission.first + index % 3 for index in range(submission.prompt_len)]
        receiver = Receiver(submission, prompt)
        receivers.append(receiver)
        sampling = SamplingParams(
            temperature=0,
            max_tokens=MAX_TOKENS,
            ignore_eos=True,
            n=submission.num_samples,
            stop=("e",) if submission.stop else (),
        )
        request_id = front.submit(
            prompt,
            sampling,
            stream=submission.stream,
            timeout_s=submission.timeout_s,
            tenant=submission.tenant,
            priority=submission.priority,
            on_output=receiver.take,
        )
        if submission.pauses:
            front.pause()
            state = front.run_on_step_thread(partial(held_pages, front)).result()
            assert state == (True, 0) or not state[0]  # another thread may have resumed
        if submission.aborts:
            front.abort(request_id)
        if submission.pauses:
            front.resume()


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(scripts=st.lists(st.lists(submissions, max_size=6), min_size=NUM_THREADS, max_size=NUM_THREADS))
def test_every_request_has_one_true_end_and_no_page_is_left(
    front: AsyncEngine, scripts: list[list[Submission]]
):
    receivers: list[list[Receiver]] = [[] for _ in scripts]
    errors: list[BaseException] = []

    def run(script: list[Submission], mine: list[Receiver]) -> None:
        try:
            play(front, script, mine)
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=run, args=pair) for pair in zip(scripts, receivers, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for receiver in [receiver for each in receivers for receiver in each]:
        assert receiver.ended.wait(20)
        receiver.check()
    give_up = time.monotonic() + 5
    while front.num_unfinished and time.monotonic() < give_up:
        time.sleep(0.001)
    stats = front.stats()
    assert (stats.pages_held, stats.running, stats.waiting, front.num_unfinished) == (0, 0, 0, 0)
    front.run_on_step_thread(front.engine.check_integrity).result()
