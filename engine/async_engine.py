"""An engine behind a thread that steps it: submission from any thread or asyncio task, streams, time-outs.

    any thread, asyncio     submit · generate · stream · abort · pause
    step thread             engine.step(), and between two steps what was asked for   (engine/step_thread.py)
    text thread             tokens to text, outputs to their receivers                (engine/text_thread.py)

Prompts are made tokens in the caller's thread (of an asyncio task: in a thread beside the event loop), texts
in the text thread; the step thread only schedules and dispatches.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing
from typing import Any, TypeVar

from engine.checkpoints import prompt_tokens
from engine.doorkeeper import Doorkeeper
from engine.engine import Engine
from engine.errors import RequestError
from engine.inputs import Chat, TokenIds, is_token_ids
from engine.loop_mailbox import Mailbox, waker_of_running_loop
from engine.open_request import OpenRequest
from engine.outputs import EngineStats, RequestOutput
from engine.sampling_params import SamplingParams
from engine.step_thread import StepThread
from engine.text_thread import TextThread

T = TypeVar("T")
Prompt = str | TokenIds | Chat

_NUM_TOKENISERS = 2
"""Threads that make prompts of asyncio tasks tokens."""


class AsyncEngine:
    """An `Engine` for many callers at once. From `start` on nobody else may use the engine but through
    `run_on_step_thread`; its read-only facts (config, tokenizer, model_config) are open to all.

    Each request that is taken comes to one end: an output that is `finished`, an exception, or nothing where
    its caller left (a cancelled task, a closed stream). Whichever it is, its pages are free afterwards.

    max_waiting: unfinished requests, running ones included, past which `Overloaded` is raised, but for a
        tenant that has less than its share of them (engine/doorkeeper.py); None: no bound.
    """

    def __init__(self, engine: Engine, *, max_waiting: int | None = None):
        self.engine = engine
        self._lock = threading.Lock()
        self._all_ended = threading.Condition(self._lock)
        self._open: dict[str, OpenRequest] = {}
        self._num_ids = 0
        self._is_started = self._is_closed = False
        self._doorkeeper = Doorkeeper(max_waiting)
        self._text = TextThread(self._drop)
        interval = engine.config.stream_interval_ms / 1000
        self._steps = StepThread(engine, self._text, self._release, interval)
        self._tokenisers = ThreadPoolExecutor(_NUM_TOKENISERS, "tidemill-tokenise")

    # -- from start to end -------------------------------------------------------------------------

    def start(self) -> None:
        """Start the threads, if they have not been; the first request does so too."""
        with self._lock:
            if self._is_started or self._is_closed:
                return
            self._is_started = True
            self._text.start()
            self._steps.start()

    def close(self, drain_seconds: float = 0.0) -> None:
        """Take no more requests, wait up to `drain_seconds` for those that are unfinished, end the rest with
        finish reason "abort", and end the threads. The engine stays open, and is the caller's again."""
        with self._lock:
            self._is_closed = True
            if self._is_started:
                self._all_ended.wait_for(lambda: not self._open, drain_seconds)
        self._steps.call(lambda: self._steps.finish_all("abort"))
        self._steps.end()
        self._text.end()
        self._tokenisers.shutdown(wait=False)

    def __enter__(self) -> AsyncEngine:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def healthy(self) -> bool:
        """Requests are taken: it is neither closed nor has its device failed."""
        return not self._is_closed and self._steps.error is None

    @property
    def num_unfinished(self) -> int:
        return len(self._open)

    # -- requests ----------------------------------------------------------------------------------

    def submit(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        tenant: str | None = None,
        cache_salt: str | None = None,
        timeout_s: float | None = None,
        stream: bool = False,
        wait: bool = True,
        on_output: Callable[[RequestOutput], None],
        on_error: Callable[[Exception], None] | None = None,
    ) -> str:
        """Queue a request; thread-safe. Waits until the step thread has taken it, a step at most, unless told
        not to; asyncio tasks call `generate` or `stream`, which let the event loop run meanwhile.

        Args:
            request_id: unique among the unfinished; by default one is made.
            priority: lower runs sooner, under the priority policy.
            tenant: on whose behalf (an API key's id): tenants get equal shares of what waits.
            cache_salt: share cached pages only with prompts of the same salt.
            timeout_s: seconds from now on after which it ends as it stands, with finish reason "timeout".
            stream: `on_output` is called whenever text has grown, at most once an interval
                (`engine.stream_interval_ms`), and not only with the last output.
            wait: False: return at once; what the step thread refuses it for goes to `on_error`, called there.
            on_output: called in the text thread, for one request after the other: it must not wait.
            on_error: called there instead of a last output, with what went wrong on the device.

        Returns:
            The request's id.

        Raises:
            RequestError: it cannot run.
            Overloaded: `max_waiting` are unfinished.
            EngineClosed: no requests are taken any more.
        """
        request = self._reserve(request_id, tenant, prompt, timeout_s, stream, on_output, on_error or _ignore)
        try:
            token_ids = self._tokens(request.request_id, prompt)
            adding = self._add(request, token_ids, sampling, priority, cache_salt)
            if wait:
                adding.result()
        except BaseException:
            self._drop(request)
            raise
        if not wait:
            adding.add_done_callback(lambda ended: self._tell_refusal(request, ended.exception()))
        return request.request_id

    async def generate(
        self, prompt: Prompt, sampling: SamplingParams | None = None, **options: Any
    ) -> RequestOutput:
        """Complete one prompt; `options` are those of `submit`, but for the receivers. Cancelling the task
        aborts the request and frees its pages."""
        async with aclosing(self._outputs(prompt, sampling, stream=False, **options)) as outputs:
            return await anext(outputs)

    def stream(
        self, prompt: Prompt, sampling: SamplingParams | None = None, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """Complete one prompt and yield an output whenever a text has grown, the last one `finished`;
        `options` as for `generate`. What cannot run is refused when the first output is asked for.

        `outputs[i].text` is sample i's text so far, of which nothing is taken back; `delta_text` what sample
        0's grew by, and joined its text. Closing the generator, or cancelling its task, aborts the request.
        """
        return self._outputs(prompt, sampling, stream=True, **options)

    def abort(self, request_id: str) -> None:
        """End a request as it stands, with finish reason "abort", and free its pages. Nothing happens where
        it is not unfinished."""
        with self._lock:
            request = self._open.get(request_id)
        if request is not None:
            request.is_aborted = True  # it may not have come to the step thread yet
            self._steps.call(lambda: self._steps.finish(request, "abort"))

    # -- the engine as a whole ---------------------------------------------------------------------

    def pause(self) -> None:
        """Free all pages that requests hold and compute nothing until `resume`; requests keep what they have
        drawn, new ones wait. Time limits run on. Waits for the step in progress."""
        self.run_on_step_thread(self._steps.pause).result()

    def resume(self) -> None:
        """Go on after `pause`: outputs come out as if there had been none."""
        self.run_on_step_thread(self.engine.resume).result()

    def stats(self) -> EngineStats:
        """As `Engine.stats`, between two steps: it waits for one at most."""
        if not self._is_started or self._is_closed:
            return self.engine.stats()
        return self.run_on_step_thread(self.engine.stats).result()

    def run_on_step_thread(self, call: Callable[[], T]) -> Future[T]:
        """Have something done between two steps, in the thread that steps the engine. EngineClosed is in the
        future where that has ended. What is called must not wait for a future of this engine."""
        self.start()
        return self._steps.call(call)

    # -- inside ------------------------------------------------------------------------------------

    async def _outputs(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None,
        *,
        stream: bool,
        request_id: str | None = None,
        priority: int = 0,
        tenant: str | None = None,
        cache_salt: str | None = None,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        mailbox = Mailbox(waker_of_running_loop())
        request = self._reserve(request_id, tenant, prompt, timeout_s, stream, mailbox.put, mailbox.fail)
        try:
            if isinstance(prompt, str) or not is_token_ids(prompt):
                loop = asyncio.get_running_loop()
                try:
                    coming = loop.run_in_executor(self._tokenisers, self._tokens, request.request_id, prompt)
                except RuntimeError as error:  # they have been shut down since
                    raise self._steps.closed_error() from error
                token_ids = await coming
            else:
                token_ids = self._tokens(request.request_id, prompt)
            adding = self._add(request, token_ids, sampling, priority, cache_salt)
            await asyncio.wrap_future(adding)
            finished = False
            while not finished:
                output = await mailbox.get()
                finished = output.finished
                yield output
        finally:  # whoever leaves early wants nothing any more
            self._drop(request)

    def _reserve(
        self,
        request_id: str | None,
        tenant: str | None,
        prompt: Prompt,
        timeout_s: float | None,
        stream: bool,
        on_output: Callable[[RequestOutput], None],
        on_error: Callable[[Exception], None],
    ) -> OpenRequest:
        """Take a place among the unfinished, before anything is computed for the request."""
        if timeout_s is not None and not timeout_s > 0:
            raise RequestError("bad_timeout", f"timeout_s is {timeout_s}: give seconds above 0, or None")
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self.start()
        with self._lock:
            if self._is_closed or self._steps.error is not None:
                raise self._steps.closed_error()
            if request_id is None:
                request_id = f"request-{self._num_ids}"
                self._num_ids += 1
            if request_id in self._open:
                raise RequestError("duplicate_request_id", f"request {request_id!r} is unfinished already")
            self._doorkeeper.enter(tenant)
            text = prompt if isinstance(prompt, str) else None
            request = OpenRequest(request_id, on_output, on_error, stream, tenant, text, deadline)
            self._open[request_id] = request
        return request

    def _tokens(self, request_id: str, prompt: Prompt) -> tuple[int, ...]:
        if not isinstance(prompt, str) and is_token_ids(prompt):
            return prompt_tokens(self.engine.tokenizer, request_id, prompt, None)
        return prompt_tokens(self.engine.tokenizer, request_id, None, prompt)  # type: ignore[arg-type]

    def _add(
        self,
        request: OpenRequest,
        token_ids: tuple[int, ...],
        sampling: SamplingParams | None,
        priority: int,
        cache_salt: str | None,
    ) -> Future[None]:
        def add() -> None:
            if not request.is_dropped:
                self._steps.add(
                    request,
                    prompt_token_ids=token_ids,
                    sampling=sampling,
                    priority=priority,
                    tenant=request.tenant,
                    cache_salt=cache_salt,
                )

        return self._steps.call(add)

    def _tell_refusal(self, request: OpenRequest, error: BaseException | None) -> None:
        if error is not None:
            self._drop(request)
            request.on_error(error if isinstance(error, Exception) else self._steps.closed_error())

    def _drop(self, request: OpenRequest) -> None:
        """Nobody waits for this request any more: whatever has become of it, nothing is left of it."""
        request.is_dropped = True
        with self._lock:
            is_open = self._open.get(request.request_id) is request
        if is_open:
            ended = self._steps.call(lambda: self._steps.drop(request))
            ended.add_done_callback(lambda _: self._release(request))

    def _release(self, request: OpenRequest) -> None:
        """The request has left the engine: its place is free."""
        with self._all_ended:
            if self._open.get(request.request_id) is request:
                del self._open[request.request_id]
                self._doorkeeper.leave(request.tenant, time.monotonic())
                self._all_ended.notify_all()


def _ignore(_: Exception) -> None:
    """For who does not want to be told."""
