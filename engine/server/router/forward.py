"""One request through a router: read, sent to an upstream, to another if that fails, and its answer passed
on."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import httpx

from engine.server.api_key import ApiKey
from engine.server.refusals import Message, Receive, Refusal, Scope, Send, refuse
from engine.server.router.pool import UpstreamPool
from engine.server.router.upstream import Upstream
from engine.server.router.usage import UsageEventFilter, UsageReader, with_usage_asked

FORWARDED_PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/embeddings",
    "/tokenize",
    "/detokenize",
)
"""Nothing else reaches an upstream, its admin routes least of all."""
STORING_PATHS = ("/v1/responses",)
"""What is sent there may leave something behind, so it is not sent twice."""
REQUEST_HEADERS = (b"accept", b"content-type", b"user-agent", b"x-request-id", b"traceparent", b"tracestate")
"""What an upstream gets to see of a client's headers: no key, no cookie, nothing of the connection."""
ANSWER_HEADERS = (
    "content-type",
    "content-length",
    "cache-control",
    "retry-after",
    "x-request-id",
    "openai-processing-ms",
)
BUSY_STATUSES = (429, 503)
RETRIED_STATUSES = (429, 502, 503, 504)
NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)

RecordUsage = Callable[[str, int, int], None]

_log = logging.getLogger(__name__)


class ClientGone(Exception):
    """The client closed its connection."""


class BadBody(Exception):
    """A body that no upstream could take; `refusal` says why."""

    def __init__(self, message: str, code: str, status: int = 400):
        super().__init__(message)
        self.refusal = Refusal(status, message, "invalid_request_error", code)


@dataclass(frozen=True, slots=True)
class Routed:
    """A request as it is forwarded."""

    path: str
    model: str
    body: Mapping[str, Any]
    raw: bytes
    headers: dict[str, str]
    key: ApiKey | None
    drops_usage: bool  # the usage in its stream was not asked for by the client

    @property
    def may_be_repeated(self) -> bool:
        """Whether sending it twice is as good as once."""
        return self.path not in STORING_PATHS and self.body.get("store") is not True


class Forwarder:
    """Forwards the requests of a pool's clients. `record_usage(key id, prompt tokens, completion tokens)`."""

    def __init__(self, pool: UpstreamPool, record_usage: RecordUsage | None = None):
        self._pool = pool
        self._record_usage = record_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI app. When the client goes, what was asked of an upstream is closed there too."""
        try:
            routed = self._routed(scope, await _read(receive))
        except ClientGone:
            return
        except BadBody as error:
            await refuse(scope, send, error.refusal)
            return
        work = asyncio.create_task(self._answer(routed, scope, send))
        gone = asyncio.create_task(_client_goes(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.wait({work, gone})
        if not work.cancelled():
            work.result()

    def _routed(self, scope: Scope, raw: bytes) -> Routed:
        body = _parsed(raw)
        path, model = scope["path"], body.get("model")
        if not isinstance(model, str):
            raise BadBody("model: give the name of a model, as /v1/models lists them.", "missing_model")
        serving = self._pool.serving(model)
        if not serving:
            raise BadBody(f"The model {model[:100]!r} does not exist.", "model_not_found", 404)
        if body.get("previous_response_id") is not None and len(serving) > 1:
            raise BadBody(
                "previous_response_id: the model is served in several places, which do not know each other's "
                "answers; send the conversation.",
                "unsupported_value",
            )
        key = scope.get("state", {}).get("key")
        asked = with_usage_asked(path, body) if key is not None and self._record_usage else None
        headers = {
            name.decode(): value.decode("latin-1")
            for name, value in scope["headers"]
            if name in REQUEST_HEADERS
        }
        if asked is not None:
            raw = json.dumps(asked).encode()
        return Routed(path, model, asked or body, raw, headers, key, asked is not None)

    async def _answer(self, routed: Routed, scope: Scope, send: Send) -> None:
        last: Refusal | None = None
        for upstream in self._pool.order(routed.model, routed.body)[: self._pool.settings.max_attempts]:
            if not upstream.available:  # it was, when the order was made
                continue
            with upstream.taking_one():
                outcome = await self._try(upstream, routed, send)
            if outcome is None:
                return
            last, may_go_on = outcome
            if not may_go_on:
                break
        await refuse(scope, send, last or _none_available(routed.model))

    async def _try(self, upstream: Upstream, routed: Routed, send: Send) -> tuple[Refusal, bool] | None:
        """None once an answer was sent; otherwise the error so far, and whether another upstream may be
        tried."""
        try:
            response = await upstream.post(routed.path, routed.headers, _salted(routed, upstream), routed.key)
        except httpx.HTTPError as error:
            upstream.breaker.failed()
            _log.warning("router upstream %s failed: %s", upstream.name, type(error).__name__)
            return _bad_gateway(upstream, error), isinstance(error, NOT_SENT) or routed.may_be_repeated
        except BaseException:
            upstream.breaker.cancelled()
            raise
        try:
            if response.status_code in RETRIED_STATUSES:
                return await self._refused_by(upstream, response, routed)
            return await self._pass_on(upstream, response, routed, send)
        except BaseException:
            upstream.breaker.cancelled()
            raise
        finally:
            await response.aclose()

    async def _refused_by(
        self, upstream: Upstream, response: httpx.Response, routed: Routed
    ) -> tuple[Refusal, bool]:
        if response.status_code == 429:
            upstream.breaker.succeeded()  # busy is not broken
        else:
            upstream.breaker.failed()
        headers = {"retry-after": response.headers.get("retry-after", "1")}
        message = f"The upstream {upstream.name} answered {response.status_code}."
        status = response.status_code if response.status_code in BUSY_STATUSES else 502
        kind = "rate_limit_error" if status == 429 else "server_error"
        refusal = Refusal(
            status, message, kind, "upstream_busy" if status == 429 else "upstream_failed", headers
        )
        return refusal, response.status_code in BUSY_STATUSES or routed.may_be_repeated

    async def _pass_on(
        self, upstream: Upstream, response: httpx.Response, routed: Routed, send: Send
    ) -> tuple[Refusal, bool] | None:
        """Send an answer as it comes. Its head waits for its first bytes: until then another upstream can be
        tried."""
        usage = UsageReader()
        started = False
        try:
            async with aclosing(_chunks(response, routed, usage)) as chunks:
                async for chunk in chunks:
                    if not started:
                        started = True
                        await send(_head(response, routed))
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            if not started:
                await send(_head(response, routed))
        except httpx.HTTPError as error:
            upstream.breaker.failed()
            _log.warning("router upstream %s failed in its answer: %s", upstream.name, type(error).__name__)
            if started:
                return None  # the server closes the connection of an answer without end: its client can tell
            return _bad_gateway(upstream, error), routed.may_be_repeated
        finally:
            self._count(routed, usage)
        upstream.breaker.succeeded()
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return None

    def _count(self, routed: Routed, usage: UsageReader) -> None:
        if self._record_usage is not None and routed.key is not None:
            self._record_usage(routed.key.id, *usage.tokens())


async def _read(receive: Receive) -> bytes:
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


async def _client_goes(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _parsed(raw: bytes) -> dict[str, Any]:
    try:
        body = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError):
        raise BadBody("The body is not JSON in UTF-8.", "invalid_json") from None
    if not isinstance(body, dict):
        raise BadBody("The body must be a JSON object.", "invalid_json")
    return body


def _salted(routed: Routed, upstream: Upstream) -> bytes:
    """The body; where the upstream knows `cache_salt`, with one for the client's key instead of what it
    sent."""
    if not upstream.settings.takes_cache_salt or routed.key is None:
        return routed.raw
    salt = hashlib.sha256(routed.key.id.encode()).hexdigest()
    return json.dumps({**routed.body, "cache_salt": salt}).encode()


async def _chunks(response: httpx.Response, routed: Routed, usage: UsageReader) -> AsyncGenerator[bytes]:
    is_events = response.headers.get("content-type", "").startswith("text/event-stream")
    events = UsageEventFilter() if routed.drops_usage and is_events else None
    async for chunk in response.aiter_raw():
        usage.feed(chunk)
        if events is None:
            yield chunk
        else:
            for event in events.feed(chunk):
                yield event
    if events is not None and events.rest():
        yield events.rest()


def _head(response: httpx.Response, routed: Routed) -> Message:
    names = [name for name in ANSWER_HEADERS if not (name == "content-length" and routed.drops_usage)]
    headers = [
        (name.encode(), response.headers[name].encode("latin-1"))
        for name in names
        if name in response.headers
    ]
    return {"type": "http.response.start", "status": response.status_code, "headers": headers}


def _bad_gateway(upstream: Upstream, error: httpx.HTTPError) -> Refusal:
    if isinstance(error, httpx.TimeoutException):
        message = f"The upstream {upstream.name} did not answer in time."
        return Refusal(504, message, "server_error", "upstream_timeout")
    return Refusal(502, f"The upstream {upstream.name} did not answer.", "server_error", "upstream_failed")


def _none_available(model: str) -> Refusal:
    message = f"No upstream with the model {model[:100]!r} can take a request now."
    return Refusal(503, message, "server_error", "no_upstream", {"retry-after": "1"})
