"""Pages, prefix cache and scheduler under any order of operations, against a memory that remembers contents.

The machine adds, steps, aborts and finishes requests and pins prefixes at random over a pool far too small
for them, one step after the other or with one step in flight while the next is planned. Its device is a
memory that stores what was written at each place of each page, and refuses to attend to anything but the
request's own tokens. Checked after every operation:

- free + cached + held = total; a page's count is the number of its holders; no page is writable by two;
  every known page can be found, every evicted one cannot (Scheduler.check_integrity)
- no budget is exceeded; rows are in order; each row begins where its request stands
- a row writes only to pages that it alone holds, and reads back its own tokens, whatever was cached,
  evicted, shared, preempted or aborted before, even when all hashes collide
- prompt log-probabilities and tokens are recorded once each, and equal those of an undisturbed run
- each request has exactly one end; at idle nothing is held
- the first request in order always advances, so every admitted request finishes
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.errors import RequestError
from engine.plan import PlannedRow, StepPlan
from engine.prefix_cache import page_hash
from engine.request import Request, RequestStatus
from engine.scheduler import Scheduler, SchedulerSettings
from tests.engine.host import logprob_at, make_request, next_token, pretend
from tests.engine.remembering_memory import RememberingMemory

MAX_STEPS_TO_DRAIN = 4000
STEMS = [(), (1, 2, 3, 4), (1, 2, 3, 4, 5, 6, 7, 8), (1,) * 8, (1, 2, 3, 4, 1, 2, 3, 4)]


def weak_hash(parent: bytes, tokens: bytes) -> bytes:
    """Collides half of the time."""
    return bytes([sum(tokens) % 2])


class HostMachine(RuleBasedStateMachine):
    hash_page = staticmethod(page_hash)

    @initialize(
        page_size=st.integers(1, 4),
        num_places=st.integers(8, 32),
        max_num_seqs=st.integers(1, 6),
        more_tokens=st.integers(0, 12),
        policy=st.sampled_from(["fcfs", "priority"]),
        caching=st.sampled_from([True, True, False]),
        threshold=st.sampled_from([None, 1, 2, 3]),
        min_shared_tokens=st.sampled_from([1, 1, 2, 8]),
        aging_steps=st.sampled_from([None, 1, 4]),
        overlap=st.booleans(),
    )
    def start(
        self,
        page_size: int,
        num_places: int,
        max_num_seqs: int,
        more_tokens: int,
        policy: str,
        caching: bool,
        threshold: int | None,
        min_shared_tokens: int,
        aging_steps: int | None,
        overlap: bool,
    ):
        self.settings = SchedulerSettings(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + more_tokens,
            # One request may fill the pool, so that a few are far too many for it.
            max_model_len=num_places,
            page_size=page_size,
            num_pages=-(-num_places // page_size),
            policy=policy,
            enable_prefix_caching=caching,
            long_prefill_token_threshold=threshold,
            min_shared_tokens=min_shared_tokens,
            aging_steps=aging_steps,
        )
        self.scheduler = Scheduler(self.settings, type(self).hash_page)
        self.memory = RememberingMemory(self.scheduler)
        self.requests: list[Request] = []
        self.unfinished: list[Request] = []  # as this machine sees it
        self.ends: dict[int, list[str]] = {}
        self.overlap = overlap
        self.planned: StepPlan | None = None
        self.in_flight: StepPlan | None = None  # dispatched, its results not taken back
        self.num_named = 0
        self.pins: list[tuple[tuple[int, ...], str | None]] = []

    # -- operations --------------------------------------------------------------------------------

    @rule(
        # Few stems and few tokens, so that prompts share, branch, repeat and collide.
        stem=st.sampled_from(STEMS),
        tail=st.lists(st.integers(1, 3), max_size=6),
        max_tokens=st.sampled_from([1, 2, 5, 10, 24, 24, 24]),
        min_tokens=st.integers(0, 3),
        num_samples=st.integers(1, 3),
        priority=st.integers(0, 2),
        tenant=st.sampled_from([None, None, "t", "u"]),
        salt=st.sampled_from([None, None, "a"]),
        prompt_logprobs=st.sampled_from([None, None, 0]),
        stop_token=st.sampled_from([None, None, 1005]),
    )
    def add(
        self,
        stem: tuple[int, ...],
        tail: list[int],
        max_tokens: int,
        min_tokens: int,
        num_samples: int,
        priority: int,
        tenant: str | None,
        salt: str | None,
        prompt_logprobs: int | None,
        stop_token: int | None,
    ):
        self.add_samples(
            (*stem, *tail),
            max_tokens,
            min_tokens,
            num_samples,
            priority,
            salt,
            prompt_logprobs,
            stop_token,
            tenant,
        )

    @rule(
        prompts=st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=12), min_size=3, max_size=6),
        priority=st.integers(0, 2),
    )
    def crowd(self, prompts: list[list[int]], priority: int):
        """Requests that will grow until the pool cannot hold them all."""
        for prompt in prompts:
            self.add_samples(prompt, max(1, self.settings.max_model_len - len(prompt)), priority=priority)
        self.steps(12)

    def add_samples(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        min_tokens: int = 0,
        num_samples: int = 1,
        priority: int = 0,
        salt: str | None = None,
        prompt_logprobs: int | None = None,
        stop_token: int | None = None,
        tenant: str | None = None,
    ):
        name, self.num_named = f"r{self.num_named}", self.num_named + 1
        for index in range(num_samples):
            request = make_request(
                name,
                prompt,
                max_tokens,
                sample_index=index,
                max_total_len=min(len(prompt) + max_tokens, self.settings.max_model_len),
                priority=priority,
                tenant=tenant,
                cache_salt=salt,
                sampling={
                    "min_tokens": min(min_tokens, max_tokens),
                    "prompt_logprobs": prompt_logprobs,
                    "stop_token_ids": [] if stop_token is None else range(1000, stop_token),
                },
            )
            num_pages = -(-request.max_total_len // self.settings.page_size)
            if 0 < len(prompt) < self.settings.max_model_len and num_pages <= self.settings.num_pages:
                self.scheduler.add(request)
                self.requests.append(request)
                self.unfinished.append(request)
                self.ends[id(request)] = []
            else:
                num_waiting = self.scheduler.num_waiting
                with pytest.raises(RequestError):
                    self.scheduler.add(request)
                assert self.scheduler.num_waiting == num_waiting

    @rule()
    def schedule(self):
        self.plan()

    @precondition(lambda self: self.planned is not None)
    @rule()
    def update(self):
        self.finish_step()

    @rule(num_steps=st.integers(1, 12))
    def steps(self, num_steps: int):
        for _ in range(num_steps):
            self.plan()
            self.finish_step()

    @precondition(lambda self: self.scheduler.cache is not None)
    @rule(stem=st.sampled_from(STEMS), salt=st.sampled_from([None, None, "a"]))
    def pin(self, stem: tuple[int, ...], salt: str | None):
        assert self.scheduler.cache is not None
        self.scheduler.cache.pin(stem, salt)
        self.pins.append((stem, salt))

    @precondition(lambda self: len(self.pins) > 0)
    @rule(data=st.data())
    def release(self, data: st.DataObject):
        assert self.scheduler.cache is not None
        pinned = data.draw(st.sampled_from(self.pins))
        self.pins.remove(pinned)
        self.scheduler.cache.release(*pinned)

    @precondition(lambda self: len(self.unfinished) > 0)
    @rule(data=st.data())
    def abort(self, data: st.DataObject):
        """At any moment: while waiting, running, between a plan and its update."""
        name = data.draw(st.sampled_from(sorted({request.request_id for request in self.unfinished})))
        expected = [request for request in self.unfinished if request.request_id == name]
        aborted = self.scheduler.abort(name)
        assert aborted == expected
        self.end(aborted)

    @precondition(lambda self: len(self.unfinished) > 0)
    @rule(data=st.data())
    def abort_while_computing(self, data: st.DataObject):
        plan = self.plan()
        if plan.rows:
            request = data.draw(st.sampled_from([row.request for row in plan.rows]))
            self.end(self.scheduler.abort(request.request_id))
        self.everything_adds_up()
        self.finish_step()

    @precondition(lambda self: self.planned is None)
    @rule()
    def preempt_all(self):
        """As a pause does: nobody has a page any more, and all go on from what they had drawn."""
        if self.in_flight is not None:
            self.take_back(self.in_flight)
        self.scheduler.preempt_all()
        assert self.scheduler.stats().num_held_pages == self.scheduler.stats().num_running == 0

    @precondition(lambda self: self.unfinished and self.planned is None)
    @rule(data=st.data())
    def stop(self, data: st.DataObject):
        request = data.draw(st.sampled_from(self.unfinished))
        self.scheduler.finish(request, "stop", "END")
        assert request.stop_reason == "END"
        self.end([request])

    def drain(self):
        """Every admitted request finishes, and then nothing is held."""
        for _ in range(MAX_STEPS_TO_DRAIN):
            if not self.scheduler.has_unfinished:
                break
            self.plan()
            self.finish_step()
        if self.in_flight is not None:  # rows of requests that had ended when their results came
            self.take_back(self.in_flight)
        assert not self.unfinished
        assert self.scheduler.stats().num_held_pages == 0
        assert (
            self.scheduler.stats().num_free_pages + self.scheduler.stats().num_cached_pages
            == self.settings.num_pages
        )

    def teardown(self):
        if hasattr(self, "scheduler"):
            self.drain()
            self.everything_adds_up()
        super().teardown()

    # -- laws --------------------------------------------------------------------------------------

    @invariant()
    def everything_adds_up(self):
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check_integrity()
        stats = self.scheduler.stats()
        total = stats.num_free_pages + stats.num_cached_pages + stats.num_held_pages
        assert total == self.settings.num_pages
        assert stats.num_running <= self.settings.max_num_seqs
        num_leaving = sum(request.status is RequestStatus.LEAVING for request in self.unfinished)
        assert stats.num_running + stats.num_waiting + num_leaving == len(self.unfinished)
        assert 0 <= stats.num_prefix_hits <= stats.num_prefix_queries
        for request in self.requests:
            assert self.ends[id(request)] == ([request.finish_reason] if request.is_finished else [])
            if request.status is not RequestStatus.RUNNING:
                assert request.page_ids == []
            if request.status is RequestStatus.WAITING:
                assert request.num_computed == 0

    def plan(self) -> StepPlan:
        first = min(self.unfinished, key=self.order, default=None)
        was_running = first is not None and first.status is RequestStatus.RUNNING
        plan = self.scheduler.schedule()
        self.planned = plan
        assert plan.num_tokens <= self.settings.max_num_batched_tokens
        assert plan.num_logits <= self.settings.max_num_seqs
        assert len({id(row.request) for row in plan.rows}) == len(plan.rows) <= self.settings.max_num_seqs
        assert all(request not in [row.request for row in plan.rows] for request in plan.preempted)
        lengths = [row.num_tokens for row in plan.rows]
        assert lengths == [*(n for n in lengths if n == 1), *(n for n in lengths if n != 1)]
        for row in plan.rows:
            self.check_row(row)
        if was_running:
            # No livelock: whatever happens to others, the first in order keeps its pages and advances.
            assert first not in plan.preempted
            assert first in [row.request for row in plan.rows]
        # Those that leave, or lost their pages with a token in flight, have nothing to compute now.
        assert plan.rows or all(request.num_pending for request in self.unfinished)
        return plan

    def check_row(self, row: PlannedRow):
        request = row.request
        assert request.status is RequestStatus.RUNNING
        assert row.start == request.num_computed
        assert 1 <= row.num_tokens <= request.remain_len
        assert row.samples == (row.stop == request.total_len)
        assert row.samples or row.stop <= request.num_tokens
        assert len(row.page_ids) == -(-row.stop // self.settings.page_size)
        due = request.num_prompt_logprobs_due
        recorded = request.prompt_len - 1 - due
        wanted = set(range(recorded, recorded + due)) if due else set()
        if row.samples:
            wanted.add(row.stop - 1)
        assert set(range(row.stop - row.num_logits, row.stop)) == wanted & set(range(row.start, row.stop))

    def finish_step(self):
        """Dispatch what was planned, and take back what is due: the step before it, or the step itself."""
        assert self.planned is not None
        plan, self.planned = self.planned, None
        self.memory.run(plan)
        if self.in_flight is not None:
            self.take_back(self.in_flight)
        if self.overlap:
            self.scheduler.advance(plan)
            self.in_flight = plan
        if not self.overlap or any(row.num_prompt_logprobs for row in plan.rows):
            self.take_back(plan)

    def take_back(self, plan: StepPlan):
        self.in_flight = None
        finished = self.scheduler.update(plan, pretend(plan))
        assert set(finished) <= {row.request for row in plan.rows}
        self.end(finished)

    def end(self, requests: list[Request]):
        for request in requests:
            assert request.is_finished
            assert request.finish_reason is not None
            self.ends[id(request)].append(request.finish_reason)
            self.unfinished.remove(request)
            self.check_output(request)

    def check_output(self, request: Request):
        """Whatever it went through, the output is the beginning of the undisturbed one."""
        tokens = list(request.prompt_token_ids)
        for token in request.output_token_ids:
            assert token == next_token(tokens)
            tokens.append(token)
        num_output, sampling = request.num_output_tokens, request.sampling
        assert num_output <= sampling.max_tokens
        assert request.num_tokens <= request.max_total_len
        assert len(request.output_logprobs) == len(request.output_top_logprobs) == num_output
        stops = [
            index
            for index, token in enumerate(request.output_token_ids)
            if token in sampling.stop_token_ids and index + 1 >= sampling.min_tokens
        ]
        if request.finish_reason == "length":
            assert not stops
            assert num_output == sampling.max_tokens or request.num_tokens == request.max_total_len
        elif request.finish_reason == "stop" and request.stop_reason != "END":
            assert stops == [num_output - 1]
            assert request.stop_reason == request.output_token_ids[-1]
        else:
            assert not stops
        if sampling.prompt_logprobs is None:
            assert request.prompt_logprobs == []
        else:
            expected = [logprob_at(request, position) for position in range(1, request.prompt_len)]
            assert request.prompt_logprobs == expected[: len(request.prompt_logprobs)]
            if num_output:
                assert request.prompt_logprobs == expected

    def order(self, request: Request) -> tuple[int, int]:
        return self.settings.rank(request)


class CollidingHostMachine(HostMachine):
    """The same laws when hashes tell next to nothing: only the verification of a hit is left."""

    hash_page = staticmethod(weak_hash)


# As many examples as the profile says.
TestHost = HostMachine.TestCase
TestHost.settings = settings(max_examples=settings().max_examples, stateful_step_count=30)
TestHostWithCollidingHashes = CollidingHostMachine.TestCase
TestHostWithCollidingHashes.settings = settings(TestHost.settings, max_examples=settings().max_examples // 2)
