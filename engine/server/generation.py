"""The engine's requests behind one HTTP call: one a prompt, aborted together when the client goes away."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from engine.errors import EngineClosed, TidemillError
from engine.monitoring.tracing import continue_trace
from engine.outputs import RequestOutput
from engine.sampling_params import SamplingParams
from engine.server.errors import ApiError, ClientGone, log
from engine.server.served import ServedModel

T = TypeVar("T")
_TRACE_HEADERS = ("traceparent", "tracestate")


def new_id(kind: str) -> str:
    """An id of an answer: nobody can guess another one."""
    return f"{kind}-{secrets.token_hex(16)}"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a call: `tenant` is the id of its key, None without one."""

    tenant: str | None
    keys: Any = None
    trace: Mapping[str, str] = field(default_factory=dict)
    """W3C's headers of the caller's trace, where it has one."""

    @classmethod
    def of(cls, request: Request) -> Caller:
        key = getattr(request.state, "key", None)
        trace = {name: request.headers[name] for name in _TRACE_HEADERS if name in request.headers}
        return cls(None if key is None else key.id, getattr(request.app.state, "keys", None), trace)

    def record(self, outputs: Sequence[RequestOutput]) -> None:
        """Count what the key's requests took."""
        if self.tenant is not None and self.keys is not None:
            usage = Usage.of(outputs)
            self.keys.record_usage(self.tenant, usage.prompt_tokens, usage.completion_tokens)


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of an answer; a prompt with several completions counts once."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int

    @classmethod
    def of(cls, outputs: Sequence[RequestOutput]) -> Usage:
        return cls(
            sum(len(output.prompt_token_ids) for output in outputs),
            sum(len(sample.token_ids) for output in outputs for sample in output.outputs),
            sum(output.num_cached_tokens for output in outputs),
        )


@dataclass(frozen=True, slots=True)
class Generation:
    """What the engine is asked for.

    Raises, from `run` and from the first output of `stream`: RequestError, Overloaded, EngineClosed, and
    ApiError (503) where the engine failed, (504) where a request took too long.
    """

    request_id: str
    model: ServedModel
    prompts: Sequence[Sequence[int]]
    sampling: SamplingParams
    caller: Caller
    priority: int
    timeout_s: float

    async def run(self) -> list[RequestOutput]:
        """The finished output of each prompt."""
        await self._compile()
        outputs = await _all([self._generate(index) for index in range(len(self.prompts))])
        self.caller.record(outputs)
        for output in outputs:
            check_ended_well(output)
        return outputs

    async def stream(self) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        """(number of the prompt, its output as it has grown); closing it aborts what is unfinished."""
        latest: dict[int, RequestOutput] = {}
        await self._compile()
        try:
            async with aclosing(self._merged()) as outputs:
                async for index, output in outputs:
                    latest[index] = output
                    check_ended_well(output)
                    yield index, output
        finally:
            self.caller.record(list(latest.values()))

    async def _compile(self) -> None:
        """Have a grammar ready before the thread that steps the engine asks for it: compiling takes long."""
        if self.sampling.structured is not None:
            await run_in_threadpool(self.model.engine.engine.grammars.compiled, self.sampling)

    async def _generate(self, index: int) -> RequestOutput:
        try:
            engine = self.model.engine
            return await engine.generate(self.prompts[index], self.sampling, **self._options(index))
        except Exception as error:
            raise self._explained(error) from error

    async def _stream(self, index: int) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        stream = self.model.engine.stream(self.prompts[index], self.sampling, **self._options(index))
        try:
            async with aclosing(stream):
                async for output in stream:
                    yield index, output
        except Exception as error:
            raise self._explained(error) from error

    def _merged(self) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        streams = [self._stream(index) for index in range(len(self.prompts))]
        return streams[0] if len(streams) == 1 else merged(streams)

    def _options(self, index: int) -> dict[str, Any]:
        request_id = self.request_id if len(self.prompts) == 1 else f"{self.request_id}-{index}"
        operation = "text_completion" if self.request_id.startswith("cmpl") else "chat"
        continue_trace(self.model.engine.engine, request_id, self.caller.trace, operation)
        return {
            "request_id": request_id,
            "priority": self.priority,
            "tenant": self.caller.tenant,
            "cache_salt": self.caller.tenant,
            "timeout_s": self.timeout_s,
        }

    def _explained(self, error: Exception) -> Exception:
        """An error of the device reaches every waiting caller as it is: say what it means to a client."""
        if isinstance(error, (TidemillError, ApiError)) or self.model.engine.healthy:
            return error
        log.error("the engine of %s failed", self.model.name, exc_info=error)
        return EngineClosed(f"the engine of {self.model.name!r} failed: the server has to be started again")


def check_ended_well(output: RequestOutput) -> None:
    """Raises ApiError for a request that did not come to its own end."""
    for sample in output.outputs:
        if sample.finish_reason == "error":  # of what the client asked for
            raise ApiError(400, str(sample.stop_reason), code="structured_output_failed")
    reasons = {sample.finish_reason for sample in output.outputs}
    if "timeout" in reasons:
        raise ApiError(504, "the request took longer than the server lets it", code="request_timeout")
    if "abort" in reasons:
        raise ApiError(503, "the server is ending and aborted the request", code="engine_closed")


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client goes away: then ClientGone is raised."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(client_goes(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        await _cancelled(task, gone)


async def client_goes(receive: Any) -> None:
    """Return when the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


class Begun(Generic[T]):
    """A stream whose first item is there already. Closing it closes the stream, begun to be read or not."""

    def __init__(self, first: T, rest: AsyncGenerator[T, None]):
        self._first: list[T] = [first]
        self._rest = rest

    @classmethod
    async def of(cls, stream: AsyncGenerator[T, None]) -> Begun[T]:
        """Wait for the first item; what refuses a request is raised here, before any status is sent."""
        try:
            return cls(await anext(stream), stream)
        except BaseException:
            await stream.aclose()
            raise

    def __aiter__(self) -> Begun[T]:
        return self

    async def __anext__(self) -> T:
        return self._first.pop() if self._first else await anext(self._rest)

    async def aclose(self) -> None:
        await self._rest.aclose()


async def merged(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """Items of all streams as they come. The first error ends all; closing it closes all."""
    queue: asyncio.Queue[T | _End] = asyncio.Queue()

    async def pump(stream: AsyncGenerator[T, None]) -> None:
        error: Exception | None = None
        try:
            async with aclosing(stream):
                async for item in stream:
                    queue.put_nowait(item)
        except Exception as raised:
            error = raised
        queue.put_nowait(_End(error))

    tasks = [asyncio.ensure_future(pump(stream)) for stream in streams]
    try:
        num_open = len(tasks)
        while num_open:
            item = await queue.get()
            if not isinstance(item, _End):
                yield item
                continue
            if item.error is not None:
                raise item.error
            num_open -= 1
    finally:
        await _cancelled(*tasks)


@dataclass(frozen=True, slots=True)
class _End:
    error: Exception | None


async def _all(works: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All results; the first error cancels the others."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await _cancelled(*tasks)


async def _cancelled(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
