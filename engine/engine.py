"""The engine: requests in, completions out. A step is three lines: schedule, dispatch, update.

The host never makes the device wait: step n + 1 is planned and dispatched while step n runs, and only
then step n is taken back. The tokens that n draws stay on the device for n + 1 to read.

    host     plan n+1 | dispatch n+1 | collect n | update n | plan n+2 | ...
    device   ... n ................................| n+1 ...................
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from engine.checkpoints import LoadedModel
from engine.config import EngineConfig
from engine.drawn import DrawnTokens, begin_with
from engine.duplicates import Duplicates, Follower, duplicate_key
from engine.errors import ConfigError, RequestError
from engine.inputs import Chat, TokenIds
from engine.new_requests import NewRequests
from engine.observer import EngineObserver
from engine.options import CacheConfig, Config, SchedulerConfig, read_options
from engine.outputs import EngineStats, RequestOutput
from engine.replicas import make_scheduler
from engine.request import Request
from engine.request_group import RequestGroup
from engine.sampling_params import SamplingParams
from engine.scheduler_settings import SchedulerSettings
from engine.start import make_runner, model_for
from engine.step_times import StepTimes
from engine.structured.grammars import Grammars
from engine.upkeep import Upkeep
from engine.whole_calls import WholeCalls, one_of

if TYPE_CHECKING:
    from engine.in_flight import InFlight
    from engine.lockstep import Lockstep
    from engine.runner import StepRunner


class Engine(WholeCalls, Upkeep):
    """Continuous batching over paged keys and values. One thread: `generate`, or `add_request` and `step`.

    Raises ConfigError where options, model and machine do not go together.
    """

    def __init__(
        self,
        model: LoadedModel | str,
        config: EngineConfig | Config | None = None,
        *,
        tokenizer: Any = None,
        cache_config: CacheConfig | None = None,
        scheduler_config: SchedulerConfig | None = None,
        revision: str | None = None,
        takes_weights: bool = False,
        runner: StepRunner | None = None,
        lockstep: Lockstep | None = None,
        **options: Any,
    ):
        """Every option has a name of its own (`engine.options.OPTION_NAMES`: the fields of `EngineConfig` and
        `RequestOptions`, and what eSurge calls them); configuration objects give several together.

        Args:
            model: loaded, or what `engine.checkpoints.load` finds: a name, path, URL, or a hub id of
                `revision`.
            tokenizer: in the place of the model's own: a fast tokenizer of transformers, or where to find
                one.
            takes_weights: nobody else needs the loaded model, whose arrays are then deleted as the engine
                packs them, so that no two copies of the weights are held.
            runner: what runs the steps (default: a `StepRunner` of the model, on the platform of the config).
            lockstep: this process's connections to those that run this engine too; made where the config has
                a coordinator's address and none are given.
        """
        told = read_options(config, cache_config, scheduler_config, options)
        self.options = told.requests
        loaded, self.config = model_for(model, tokenizer, revision, told, is_whole=config is not None)
        self._lockstep = lockstep
        self._begin(loaded, runner, takes_weights=takes_weights or isinstance(model, str))
        self.observers: list[EngineObserver] = []
        self._num_ids = 0
        self._num_steps = 0
        self._num_prompt_tokens = 0
        self._collected_at = 0.0
        self._step_times = StepTimes()

    def _begin(self, loaded: LoadedModel, runner: StepRunner | None, *, takes_weights: bool) -> None:
        """Be ready to run this model, with no request."""
        max_model_len = self.config.model_len(loaded.config.max_position_embeddings)
        new_requests = NewRequests(loaded, self.config, self.options, max_model_len)
        # A runner that was given takes the plan of one scheduler.
        num_replicas = None
        if runner is None:
            runner, self._lockstep = make_runner(
                loaded, self.config, max_model_len, takes_weights=takes_weights, lockstep=self._lockstep
            )
            num_replicas = runner.num_replicas
        self._runner = runner
        self._in_flight: InFlight | None = None
        self.max_model_len = max_model_len
        self.model_config = loaded.config
        self.tokenizer = loaded.tokenizer
        self.model_name = self.options.esurge_name or loaded.name
        self._new_requests = new_requests
        self.grammars = Grammars(loaded.tokenizer, loaded.config.vocab_size, new_requests.eos_token_ids)
        settings = SchedulerSettings.of(self.config, max_model_len, runner.num_pages)
        self._num_replicas = num_replicas or 1
        self._scheduler: Any = make_scheduler(settings, num_replicas)
        self._groups: dict[str, RequestGroup] = {}
        self._duplicates = Duplicates()
        self._ready: list[RequestOutput] = []
        self._is_paused = False
        # Samples whose text is wanted token by token.
        self._growing: set[Request] = set()
        self._begin_upkeep()

    @classmethod
    def from_pretrained(cls, source: str, *, revision: str | None = None, **options: Any) -> Engine:
        """`Engine(source, ...)`: load a model (a name, path, URL or hub id) and make an engine for it."""
        return cls(source, revision=revision, **options)

    # -- a request at a time -----------------------------------------------------------------------

    def add_request(
        self,
        request_id: str | None = None,
        prompt_token_ids: TokenIds | None = None,
        prompt: str | Chat | None = None,
        sampling: SamplingParams | None = None,
        *,
        sampling_params: SamplingParams | None = None,
        priority: int = 0,
        identity: str | None = None,
        tenant: str | None = None,
        cache_salt: str | None = None,
        template: str | None = None,
        expected_output_len: int | None = None,
        drawn: Sequence[DrawnTokens] | None = None,
        stream: bool | None = None,
        shares_result: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """Queue a prompt, as token ids or as text or a chat; returns its id.

        One that must come out as an unfinished one does (the same tokens, salt and sampling, and greedy or
        with a seed) is given that one's result, unless it is streamed or shall not share.

        Args:
            request_id: unique among the unfinished; None: one is made.
            sampling: how it is sampled; `sampling_params` is the same.
            priority: lower runs sooner, under the priority policy.
            identity: what the random draws descend from, with the run's seed (default: `request_id`).
            tenant: on whose behalf it runs; of requests that wait at one priority, those of each tenant are
                started in turns of equal tokens.
            cache_salt: share cached pages only with prompts of the same salt.
            template: whose outputs are like this one's, for guesses (`speculation`); default: those of
                prompts with the same first page. It changes no output.
            expected_output_len: tokens it will probably generate, at least 1: so much memory is kept for it
                once it runs (default: one page more than its prompt's). More running requests than fit would
                take each other's pages. It changes no output.
            drawn: tokens of each sample to go on from (`drawn_tokens` of an earlier engine).
            stream: `step` gives an output whenever the text grows, not only the last one. None: as
                `sampling.output_kind` says; without one, a request of one sample that is given no id is
                streamed, and one with an id is not.
            shares_result: it may be given the result of another one; False: it runs by itself.
            tools: what a tool parser is to know of the functions that the prompt tells of.

        Raises:
            RequestError: it cannot run; nothing was queued.
        """
        self._check_takes_requests()
        params = one_of(sampling, sampling_params) or SamplingParams()
        if stream is None:
            stream = self._streams(params, request_id)
        if stream and params.num_samples > params.n:
            raise RequestError("bad_sampling", "sampling.best_of chooses at the end: it cannot be streamed")
        if request_id is None:
            request_id = self._new_id()
        elif request_id in self._groups or request_id in self._duplicates:
            raise RequestError("duplicate_request_id", f"request {request_id!r} is unfinished already")
        asked = self._new_requests.read(request_id, prompt_token_ids, prompt, params, tools)
        params, now = asked.sampling, time.monotonic()
        self._see_idleness(now)
        shares = shares_result and asked.may_share and not stream
        key = duplicate_key(asked.tokens, cache_salt, params) if shares else None
        if key is not None and self._duplicates.follow(key, Follower(request_id, asked.text, now), priority):
            self._tell_added(request_id, len(asked.token_ids), params)
            return request_id
        requests = self._new_requests.make(
            asked,
            identity or request_id,
            expected_output_len,
            self.grammars.compiled(params),
            priority=priority,
            cache_salt=cache_salt,
            tenant=tenant,
            template=template,
        )
        if drawn is not None:
            begin_with(requests, drawn, self.model_config.vocab_size)
        for request in requests:  # the first is refused if any is: they differ in their index alone
            self._scheduler.add(request, now)
        group = RequestGroup(requests, asked.text, self.tokenizer, stream, asked.shown)
        self._groups[request_id] = group
        if group.grows:
            self._growing.update(requests)
        self._num_prompt_tokens += len(asked.token_ids) * len(requests)
        if key is not None:
            self._duplicates.lead(key, request_id, priority)
        self._tell_added(request_id, len(asked.token_ids), params)
        return request_id

    def step(self) -> list[RequestOutput]:
        """Start the next step and take back the one before it.

        Returns the requests that finished (and the streamed ones that grew). What a step computes comes
        with the next call, unless `async_scheduling` is off.
        """
        outputs, self._ready = self._ready, []
        if self._is_paused:
            return outputs
        before = self._in_flight
        if before is not None and (before.must_end_first or self._scheduler.needs_tokens):
            outputs += self._take_back(before)
            before = None
        started = time.monotonic()
        plan = self._scheduler.schedule(started)
        if self.observers:
            self._tell_scheduled(time.monotonic() - started)
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
        """Totals, and each step's seconds and sequences since the last call: these are taken, by one reader.

        Others read `totals`, or are told of each step (`observers`).
        """
        return self._stats(*self._step_times.take())

    def totals(self) -> EngineStats:
        """The totals alone: safe to ask for from any thread, and it takes nothing from `stats`."""
        return self._stats((), ())

    def _stats(self, step_seconds: tuple[float, ...], batch_occupancy: tuple[int, ...]) -> EngineStats:
        return EngineStats.of(
            self._scheduler.stats(),
            self._runner,
            num_steps=self._num_steps,
            step_seconds=step_seconds,
            batch_occupancy=batch_occupancy,
            num_prompt_tokens=self._num_prompt_tokens,
            num_duplicates=self._duplicates.num_duplicates,
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
        seconds = now - max(step.dispatched_at, self._collected_at)
        self._collected_at = now
        self._step_times.add(seconds, step.plan.num_rows)
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
        if self.observers:
            self._tell_step(step.plan, seconds, now, outputs)
        if self._notes_steps:
            self._note_step(outputs)
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
            if self._sampler_meter is not None:
                self._sampler_meter.add(request)
            delta += group.close(request)
        if group.is_finished:
            del self._groups[request.request_id]
            return group.output(delta)
        return group.output(delta) if group.shows(delta) else None

    def _streams(self, params: SamplingParams, request_id: str | None) -> bool:
        if params.output_kind is not None:
            return params.output_kind != "final_only"
        return request_id is None and params.num_samples == 1

    def _new_id(self) -> str:
        while True:
            request_id = f"request-{self._num_ids}"
            self._num_ids += 1
            if request_id not in self._groups and request_id not in self._duplicates:
                return request_id
