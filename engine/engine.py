"""The engine: requests in, completions out. A step is three lines: schedule, dispatch, update.

The host never makes the device wait: step n + 1 is planned and dispatched while step n runs, and only
then step n is taken back. The tokens that n draws stay on the device for n + 1 to read.

    host     plan n+1 | dispatch n+1 | collect n | update n | plan n+2 | ...
    device   ... n ................................| n+1 ...................
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any, cast

from engine.checkpoints import LoadedModel, prompt_tokens
from engine.config import EngineConfig
from engine.drawn import DrawnTokens, begin_with
from engine.duplicates import Duplicates, Follower, duplicate_key
from engine.errors import ConfigError, RequestError
from engine.inputs import Chat, Prompts, TokenIds, as_list, checked_tokens, is_token_ids, sampling_of_each
from engine.outputs import EngineStats, RequestOutput
from engine.replicas import make_scheduler
from engine.request import Request, request_key
from engine.request_group import RequestGroup, bad_word_token_ids
from engine.sampling_params import SamplingParams
from engine.scheduler_settings import SchedulerSettings
from engine.start import load_for, make_runner

if TYPE_CHECKING:
    from engine.in_flight import InFlight
    from engine.lockstep import Lockstep
    from engine.runner import StepRunner


class Engine:
    """Continuous batching over paged keys and values. One thread: `generate`, or `add_request` and `step`.

    runner: what runs the steps (default: a `StepRunner` of the model, on the platform of the config).
    Raises ConfigError where options, model and machine do not go together.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        config: EngineConfig | None = None,
        *,
        takes_weights: bool = False,
        runner: StepRunner | None = None,
        lockstep: Lockstep | None = None,
    ):
        """`takes_weights`: nobody else needs `loaded.model`, whose arrays are then deleted as the engine
        packs them, so that no two copies of the weights are held.

        lockstep: this process's connections to those that run this engine too; made where the config has a
            coordinator's address and none are given.
        """
        self.config = config or EngineConfig()
        self.model_config = loaded.config
        self.tokenizer = loaded.tokenizer
        self.max_model_len = self.config.model_len(loaded.config.max_position_embeddings)
        self._lockstep = lockstep
        # A runner that was given takes the plan of one scheduler.
        num_replicas = None
        if runner is None:
            runner, self._lockstep = make_runner(
                loaded, self.config, self.max_model_len, takes_weights=takes_weights, lockstep=lockstep
            )
            num_replicas = runner.num_replicas
        self._runner = runner
        self._in_flight: InFlight | None = None
        self._eos_token_ids = frozenset(loaded.config.eos_token_ids)
        settings = SchedulerSettings.of(self.config, self.max_model_len, runner.num_pages)
        self._num_replicas = num_replicas or 1
        self._scheduler: Any = make_scheduler(settings, num_replicas)
        self._groups: dict[str, RequestGroup] = {}
        self._duplicates = Duplicates()
        self._ready: list[RequestOutput] = []
        self._num_ids = 0
        # Samples whose text is wanted token by token.
        self._growing: set[Request] = set()
        self._num_steps = 0
        self._num_prompt_tokens = 0
        self._collected_at = 0.0
        self._step_seconds: list[float] = []
        self._occupancy: list[int] = []

    @classmethod
    def from_pretrained(cls, source: str, *, revision: str | None = None, **options: Any) -> Engine:
        """Load a model (a name, path, URL or hub id: `engine.checkpoints.load`) and make an engine for it.

        `options` are the fields of `EngineConfig`.
        """
        config = EngineConfig(**options)
        return cls(load_for(config, source, revision), config, takes_weights=True)

    # -- whole calls -------------------------------------------------------------------------------

    def generate(
        self, prompts: Prompts, sampling: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Complete prompts and return them in input order.

        Args:
            prompts: a string, a chat (a list of messages with `role` and `content`) or token ids, or a list
                of one of these.
            sampling: one for all, or one a prompt.

        Raises:
            RequestError: a prompt cannot run (then none has), naming it.
        """
        each = as_list(prompts)
        samplings = sampling_of_each(sampling, len(each))
        ids: list[str] = []
        try:
            for prompt, params in zip(each, samplings, strict=True):
                ids.append(self._add(prompt, params))
        except RequestError as error:
            for request_id in ids:
                self.abort_request(request_id)
            raise RequestError(error.reason, f"prompt {len(ids)}: {error}") from error
        wanted = set(ids)
        done: dict[str, RequestOutput] = {}
        try:
            while len(done) < len(ids):
                for output in self.step():
                    if output.request_id in wanted:
                        done[output.request_id] = output
                    else:
                        self._ready.append(output)
        finally:  # an interrupted call leaves nothing running behind it
            for request_id in wanted - done.keys():
                self.abort_request(request_id)
        return [done[request_id] for request_id in ids]

    def stream(
        self, prompt: str | TokenIds | Chat, sampling: SamplingParams | None = None
    ) -> Generator[RequestOutput, None, None]:
        """Complete one prompt and yield an output whenever its text grows.

        `delta_text` never splits a character nor shows a part of a stop string; joined, the deltas are the
        final text. Closing the iterator aborts the request.
        """
        params = sampling or SamplingParams()
        if params.n != 1:
            raise RequestError("bad_sampling", f"sampling.n is {params.n}: a stream has one completion")
        request_id = self._add(as_list(prompt)[0], params, stream=True)
        try:
            finished = False
            while not finished:
                outputs = self.step()
                # Before the yield: the caller may never come back.
                self._ready += [output for output in outputs if output.request_id != request_id]
                for output in outputs:
                    if output.request_id == request_id:
                        finished = output.finished
                        yield output
        finally:
            self.abort_request(request_id)

    # -- a request at a time -----------------------------------------------------------------------

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: TokenIds | None = None,
        prompt: str | Chat | None = None,
        sampling: SamplingParams | None = None,
        *,
        priority: int = 0,
        identity: str | None = None,
        cache_salt: str | None = None,
        template: str | None = None,
        expected_output_len: int | None = None,
        drawn: Sequence[DrawnTokens] | None = None,
        stream: bool = False,
    ) -> None:
        """Queue a prompt, as token ids or as text or a chat.

        One that must come out as an unfinished one does (the same tokens, salt and sampling, and greedy or
        with a seed) is given that one's result, unless it is streamed.

        Args:
            request_id: unique among the unfinished.
            priority: lower runs sooner, under the priority policy.
            identity: what the random draws descend from, with the run's seed (default: `request_id`).
            cache_salt: share cached pages only with prompts of the same salt.
            template: whose outputs are like this one's, for guesses (`speculation`); default: those of
                prompts with the same first page. It changes no output.
            expected_output_len: tokens it will probably generate, at least 1: so much memory is kept for it
                once it runs (default: one page more than its prompt's). More running requests than fit would
                take each other's pages. It changes no output.
            drawn: tokens of each sample to go on from (`drawn_tokens` of an earlier engine).
            stream: `step` gives an output whenever the text grows, not only the last one.

        Raises:
            RequestError: it cannot run; nothing was queued.
        """
        if not self.leads:
            raise ConfigError("only process 0 takes requests: call Engine.follow() in the others")
        params = sampling or SamplingParams()
        if request_id in self._groups or request_id in self._duplicates:
            raise RequestError("duplicate_request_id", f"request {request_id!r} is unfinished already")
        params.check_vocab(self.model_config.vocab_size)
        token_ids = prompt_tokens(self.tokenizer, request_id, prompt_token_ids, prompt)
        tokens = checked_tokens(request_id, token_ids, self.model_config.vocab_size)
        if expected_output_len is not None and expected_output_len < 1:
            raise ValueError(f"expected_output_len is {expected_output_len}: give at least 1, or None")
        text, now = prompt if isinstance(prompt, str) else None, time.monotonic()
        key = None if stream else duplicate_key(tokens, cache_salt, params)
        if key is not None and self._duplicates.follow(key, Follower(request_id, text, now), priority):
            return
        bad_words = bad_word_token_ids(self.tokenizer, params.bad_words)
        # The samples share their prompt; its log-probabilities are computed once, with the first.
        others = params if params.prompt_logprobs is None else params.replace(prompt_logprobs=None)
        requests = [
            Request(
                request_id=request_id,
                prompt_token_ids=token_ids,
                packed_prompt=tokens,
                sampling=others if index else params,
                key=request_key(self.config.seed, identity or request_id, index, params.seed),
                max_total_len=max(
                    len(token_ids) + 1, min(len(token_ids) + params.max_tokens, self.max_model_len)
                ),
                sample_index=index,
                priority=priority,
                eos_token_ids=self._eos_token_ids,
                bad_words_token_ids=bad_words,
                cache_salt=cache_salt,
                template=template,
                expected_len=None if expected_output_len is None else len(token_ids) + expected_output_len,
            )
            for index in range(params.n)
        ]
        if drawn is not None:
            begin_with(requests, drawn, self.model_config.vocab_size)
        for request in requests:  # the first is refused if any is: they differ in their index alone
            self._scheduler.add(request, now)
        group = self._groups[request_id] = RequestGroup(requests, text, self.tokenizer, stream)
        if group.grows:
            self._growing.update(requests)
        self._num_prompt_tokens += len(token_ids) * params.n
        if key is not None:
            self._duplicates.lead(key, request_id, priority)

    def step(self) -> list[RequestOutput]:
        """Start the next step and take back the one before it.

        Returns the requests that finished (and the streamed ones that grew). What a step computes comes
        with the next call, unless `async_scheduling` is off.
        """
        outputs, self._ready = self._ready, []
        before = self._in_flight
        if before is not None and (before.must_end_first or self._scheduler.needs_tokens):
            outputs += self._take_back(before)
            before = None
        plan = self._scheduler.schedule(time.monotonic())
        self._in_flight = self._runner.dispatch(plan, before) if plan.num_rows else None
        if before is not None:
            outputs += self._take_back(before)
        if self._in_flight is not None:
            self._scheduler.advance(self._in_flight.plan)
        # A step of rows that have all ended meanwhile is waited for too: whoever sees that nothing is
        # unfinished need not look again.
        if self._in_flight is not None and not (self.config.async_scheduling and self._groups):
            outputs += self._take_back(self._in_flight)
            self._in_flight = None
        return outputs

    def abort_request(self, request_id: str) -> bool:
        """Drop a request and free its pages; no output comes of it. False when it is not unfinished."""
        if request_id in self._duplicates:
            self._duplicates.leave(request_id)
            return True
        group = self._groups.pop(request_id, None)
        if group is None:
            return False
        heir = self._duplicates.abdicate(request_id)
        if heir is not None:
            group.hand_over(heir.request_id, heir.prompt, heir.arrival_time)
            self._groups[heir.request_id] = group
            self._scheduler.rename(request_id, heir.request_id)
            return True
        self._growing.difference_update(self._scheduler.abort(request_id, time.monotonic()))
        return True

    def drawn_tokens(self, request_id: str) -> tuple[DrawnTokens, ...] | None:
        """What an engine to come can go on from, a sample each (`add_request`); None for a request that is
        not unfinished, or is given another one's result."""
        group = self._groups.get(request_id)
        return None if group is None else tuple(map(DrawnTokens.of, group.output("").outputs))

    def pin_prefix(self, token_ids: TokenIds, cache_salt: str | None = None) -> None:
        """Say that prompts to come begin with these tokens: their full pages, once computed, are evicted only
        after all that are not pinned. Pins add up; each is undone by one `release_prefix`."""
        if self._scheduler.cache is not None:
            self._scheduler.cache.pin(token_ids, cache_salt)

    def release_prefix(self, token_ids: TokenIds, cache_salt: str | None = None) -> None:
        """Undo one `pin_prefix` of the same tokens. Raises ValueError when they are not pinned."""
        if self._scheduler.cache is not None:
            self._scheduler.cache.release(token_ids, cache_salt)

    @property
    def has_unfinished(self) -> bool:
        return bool(self._groups or self._ready)

    @property
    def num_unfinished(self) -> int:
        return len(self._groups) + self._duplicates.num_following

    @property
    def num_pages(self) -> int:
        """KV pages the engine has, of all replicas together."""
        return self._runner.num_pages * self._num_replicas

    def stats(self) -> EngineStats:
        """Totals, and each step's seconds and sequences since the last call."""
        scheduler, runner = self._scheduler.stats(), self._runner
        steps, self._step_seconds = tuple(self._step_seconds), []
        occupancy, self._occupancy = tuple(self._occupancy), []
        return EngineStats(
            num_steps=self._num_steps,
            step_seconds=steps,
            batch_occupancy=occupancy,
            num_prompt_tokens=self._num_prompt_tokens,
            num_cached_tokens=scheduler.num_prefix_hits,
            num_computed_tokens=runner.num_computed_tokens,
            num_padded_tokens=runner.num_padded_tokens,
            num_generated_tokens=scheduler.num_generated_tokens,
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            pages_free=scheduler.num_free_pages,
            pages_cached=scheduler.num_cached_pages,
            pages_held=scheduler.num_held_pages,
            preemptions=scheduler.num_preemptions,
            evictions=scheduler.num_evictions,
            compile_seconds=runner.compile_seconds,
            num_compiled=runner.num_compiled,
            num_loaded=runner.num_loaded,
            device=runner.device_name,
            num_duplicates=self._duplicates.num_duplicates,
            num_drafted_tokens=scheduler.num_drafted_tokens,
            num_accepted_tokens=scheduler.num_accepted_tokens,
            num_replicas=self._num_replicas,
        )

    @property
    def leads(self) -> bool:
        """This process takes requests; another one of a lockstep calls `follow`."""
        return self._lockstep is None or self._lockstep.leads

    def follow(self) -> None:
        """Run the steps that process 0 plans, until it closes its engine. RetryLater when it is lost."""
        if self._lockstep is None or self._lockstep.leads:
            raise ConfigError("this process leads: it takes requests, and follows no other")
        self._runner.follow(self._lockstep)

    def close(self) -> None:
        """Let the processes that follow this engine go on; nothing is to be done where there are none."""
        if self._lockstep is not None:
            self._lockstep.end()

    def check_integrity(self) -> None:
        """Raises AssertionError when pages or requests do not add up."""
        self._scheduler.check_integrity()

    # -- inside ------------------------------------------------------------------------------------

    def _take_back(self, step: InFlight) -> list[RequestOutput]:
        """Wait for a step, record its results, and give the outputs that are complete (or grew) with it."""
        results = self._runner.collect(step)
        now = time.monotonic()
        finished = self._scheduler.update(step.plan, results, now)
        self._num_steps += 1
        self._step_seconds.append(now - max(step.dispatched_at, self._collected_at))
        self._collected_at = now
        self._occupancy.append(step.plan.num_rows)
        if self._growing:
            ended = set(finished)
            finished = [r for r in step.plan.drawing if r in ended or r in self._growing]
        outputs: list[RequestOutput] = []
        for request in finished:
            output = self._grow(request, now)
            if output is not None:
                outputs.append(output)
                if output.finished:
                    outputs += self._duplicates.finish(output)
        return outputs

    def _grow(self, request: Request, now: float) -> RequestOutput | None:
        """Take a sample's new token, or its whole text at its end; an output if its group has one to give."""
        group = self._groups.get(request.request_id)
        if group is None:
            raise AssertionError(f"a step was run for request {request.request_id!r}, which nobody asked for")
        delta = ""
        if group.grows:
            delta = group.push(request)
            stopped_by = group.stopped_by(request)
            if stopped_by is not None and not request.is_finished:
                self._scheduler.finish(request, "stop", stopped_by, now)
        if request.is_finished:
            self._growing.discard(request)
            delta += group.close(request)
        if group.is_finished:
            del self._groups[request.request_id]
            return group.output(delta)
        return group.output(delta) if group.stream and delta else None

    def _add(self, prompt: str | TokenIds | Chat, params: SamplingParams, stream: bool = False) -> str:
        """Queue a prompt of `generate` or `stream` under an id of the engine's own."""
        request_id = f"request-{self._num_ids}"
        self._num_ids += 1
        if is_token_ids(prompt):
            self.add_request(request_id, prompt, sampling=params, stream=stream)
        else:
            text_or_chat = cast("str | Chat", prompt)
            self.add_request(request_id, prompt=text_or_chat, sampling=params, stream=stream)
        return request_id
