"""`POST /v1/responses`, and what was stored of it."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from engine.outputs import CompletionOutput, RequestOutput
from engine.parsers import Event
from engine.server import generation
from engine.server.chat import STREAM_ANSWER
from engine.server.errors import ERROR_ANSWERS, ApiError, api_error, bad_request
from engine.server.event_stream import EventStream
from engine.server.generation import Begun, Caller, Generation, new_id, unless_gone
from engine.server.json_body import StrictRoute
from engine.server.logprobs import ChatToken, chat_logprobs, shown_logprobs
from engine.server.message_parts import inside_reasoning, needs_special_tokens, part_reader
from engine.server.prompts import chat_prompt, told_call
from engine.server.response_store import ResponseStore, StoredResponse
from engine.server.responses_answer import (
    DeletedResponse,
    FunctionCall,
    IncompleteDetails,
    OutputItem,
    OutputMessage,
    Reasoning,
    ResponseAnswer,
    ResponseError,
    ResponseUsage,
    begun_answer,
    wants_logprobs,
)
from engine.server.responses_body import ResponseBody, SchemaFormat
from engine.server.responses_input import add_call, conversation_of
from engine.server.responses_writer import ResponseWriter, Told
from engine.server.sampling import check_stream_options, priority_of, sampling_of
from engine.server.served import ServedModel, ServedModels
from engine.server.settings import ServerSettings
from engine.server.structure import Wanted, structured_output, wanted_format
from engine.server.tool_choice import ToolChoice, make_tool_choice


def response_routes(models: ServedModels, settings: ServerSettings) -> APIRouter:
    routes = APIRouter(route_class=StrictRoute, tags=["responses"], responses=ERROR_ANSWERS)
    store = ResponseStore(settings.max_stored_responses, settings.max_stored_bytes)

    @routes.post("/v1/responses", response_model=ResponseAnswer, responses=STREAM_ANSWER)
    async def create_response(body: ResponseBody, request: Request) -> Response:
        """Answer an input, whole or as a stream of server-sent events."""
        check_stream_options(body)
        call = await _call(models.find(body.model), body, settings, store, Caller.of(request))
        if not body.stream:
            outputs = await unless_gone(request, call.generation.run())
            for _ in call.advance(outputs[0]):
                pass  # nobody listens to the events on the way
            return JSONResponse(call.answer.model_dump())
        begun = await unless_gone(request, Begun.of(call.generation.stream()))
        return EventStream(_events(call, begun), begun)

    @routes.get("/v1/responses/{response_id}")
    async def retrieve_response(response_id: str, request: Request) -> ResponseAnswer:
        """A response that was stored, to who asked for it."""
        return _stored(store, response_id, Caller.of(request), "response_id").answer

    @routes.delete("/v1/responses/{response_id}")
    async def delete_response(response_id: str, request: Request) -> DeletedResponse:
        """Forget a response; those that came after it keep what they know of it."""
        _stored(store, response_id, Caller.of(request), "response_id")
        store.remove(response_id, Caller.of(request).tenant)
        return DeletedResponse(id=response_id)

    return routes


def _stored(store: ResponseStore, response_id: str, caller: Caller, param: str) -> StoredResponse:
    found = store.get(response_id, caller.tenant)
    if found is None:
        message = f"No response with id {response_id[:100]!r} is stored: it was not, or is forgotten by now"
        raise ApiError(404, message, param=param, code="response_not_found", type="invalid_request_error")
    return found


async def _call(
    model: ServedModel, body: ResponseBody, settings: ServerSettings, store: ResponseStore, caller: Caller
) -> _Call:
    """Raises ApiError or RequestError (400, 404) for a body that cannot run; nothing is queued yet."""
    if (body.n or 1) != 1:
        raise bad_request("a response is one answer: n must be 1", "n")
    if body.store and store.is_off:
        raise bad_request("this server stores no responses: give store=false", "store")
    choice = body.tool_choice
    tools = make_tool_choice(
        body.tools or (),
        choice if isinstance(choice, str) else None,
        None if choice is None or isinstance(choice, str) else choice.name,
        body.parallel_tool_calls,
        settings,
    )
    conversation: list[Mapping[str, Any]] = []
    if body.previous_response_id is not None:
        before = _stored(store, body.previous_response_id, caller, "previous_response_id")
        conversation += before.conversation
    conversation += conversation_of(body.input)
    system = [] if body.instructions is None else [{"role": "system", "content": body.instructions}]
    if body.skip_special_tokens is None and needs_special_tokens(model, tools):
        body.skip_special_tokens = False
    sampling = sampling_of(
        body,
        settings,
        max_tokens=body.max_output_tokens or settings.max_tokens or model.max_model_len,
        n=1,
        logprobs=(body.top_logprobs or 0) if wants_logprobs(body) else None,
        structured=structured_output(body, settings, form=_format(body), tools=tools),
    )
    prompt = await chat_prompt(
        model,
        [*system, *conversation],
        settings,
        tools=tools.offered,
        reasoning_effort=body.reasoning.effort if body.reasoning else None,
        param="input",
    )
    policy = model.engine.engine.config.scheduling_policy
    made = Generation(
        request_id=new_id("resp"),
        model=model,
        prompts=[prompt],
        sampling=sampling,
        caller=caller,
        priority=priority_of(body, settings, policy),
        timeout_s=settings.request_timeout_s,
    )
    stores = body.store is not False and not store.is_off
    answer = begun_answer(body, made.request_id, model.name, int(time.time()), stores)
    return _Call(made, tools, answer, conversation, store)


def _format(body: ResponseBody) -> Wanted | None:
    form = body.text.format if body.text else None
    schema = form.schema_ if isinstance(form, SchemaFormat) else None
    return wanted_format(form.type, schema, "text.format") if form else None


@dataclass
class _Call:
    """A response in the making: `advance` it with each output of its generation."""

    generation: Generation
    tools: ToolChoice
    answer: ResponseAnswer
    conversation: list[Mapping[str, Any]]
    store: ResponseStore

    def __post_init__(self) -> None:
        prompt = self.generation.prompts[0]
        self._reader = part_reader(self._model, self.tools, inside_reasoning(self._model, prompt))
        self._writer = ResponseWriter()
        self._num_characters = 0
        self._num_logprobs = 0

    @property
    def _model(self) -> ServedModel:
        return self.generation.model

    def advance(self, output: RequestOutput) -> Iterator[Told]:
        """The events of what is new in an output; the last one completes, and stores, the answer."""
        sample = output.outputs[0]
        text = sample.text
        events = self._reader.push(text[self._num_characters :]) if len(text) > self._num_characters else []
        self._num_characters = len(text)
        if output.finished:
            events += self._reader.finish()
        yield from self._written(events, sample)
        if output.finished:
            is_whole = sample.finish_reason == "stop"
            yield from self._writer.finish("completed" if is_whole else "incomplete")
            self._complete(output, is_whole)
            yield {"type": f"response.{self.answer.status}", "response": self.answer.model_dump()}

    def fail(self, error: ApiError) -> Told:
        """The event of a response that ends with an error."""
        self.answer.status = "failed"
        self.answer.output = self._writer.items
        self.answer.error = ResponseError(code=error.code or error.type, message=str(error.detail))
        return {"type": "response.failed", "response": self.answer.model_dump()}

    def _written(self, events: list[Event], sample: CompletionOutput) -> Iterator[Told]:
        logprobs: list[ChatToken] = []
        if events and self.generation.sampling.logprobs is not None:
            entries = shown_logprobs(sample, self.generation.sampling, self._num_logprobs)
            self._num_logprobs += len(entries)
            logprobs = chat_logprobs(self._model.tokenizer, entries).content
        return self._writer.write(events, logprobs)

    def _complete(self, output: RequestOutput, is_whole: bool) -> None:
        answer, items = self.answer, self._writer.items
        answer.status = "completed" if is_whole else "incomplete"
        if not is_whole:
            answer.incomplete_details = IncompleteDetails(reason="max_output_tokens")
        answer.output = items
        thoughts = "".join(item.content[0].text for item in items if isinstance(item, Reasoning))
        encode = self._model.tokenizer.backend_tokenizer.encode
        num_reasoning = len(encode(thoughts, add_special_tokens=False).ids) if thoughts else 0
        answer.usage = ResponseUsage.of(generation.Usage.of([output]), num_reasoning)
        if answer.store:
            conversation = [*self.conversation, *_as_messages(items)]
            owner = self.generation.caller.tenant
            self.store.put(StoredResponse(answer.model_copy(deep=True), conversation, owner))


def _as_messages(items: Sequence[OutputItem]) -> list[dict[str, Any]]:
    """Output items as an assistant's messages, for the turn after them; templates leave reasoning out."""
    messages: list[dict[str, Any]] = []
    for item in items:
        if isinstance(item, OutputMessage):
            messages.append({"role": "assistant", "content": item.content[0].text})
        elif isinstance(item, FunctionCall):
            add_call(messages, told_call(item.name, item.arguments, item.call_id))
    return messages


async def _events(call: _Call, outputs: Begun[tuple[int, RequestOutput]]) -> AsyncIterator[bytes]:
    number = 0
    begun = call.answer.model_dump()
    try:
        for kind in ("created", "in_progress"):
            yield _event({"type": f"response.{kind}", "response": begun}, number)
            number += 1
        async for _, output in outputs:
            for told in call.advance(output):
                yield _event(told, number)
                number += 1
    except Exception as error:  # the status is sent: the error is the last event
        yield _event(call.fail(api_error(error)), number)


def _event(told: Told, number: int) -> bytes:
    data = json.dumps(told | {"sequence_number": number}, ensure_ascii=False, separators=(",", ":"))
    return f"event: {told['type']}\ndata: {data}\n\n".encode()
