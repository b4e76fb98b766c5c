"""`POST /v1/chat/completions`."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from engine.outputs import CompletionOutput, RequestOutput
from engine.parsers import ContentDelta, ReasoningDelta, ToolCallStart
from engine.server import generation
from engine.server.answers import (
    AnswerMessage,
    AnswerToolCall,
    CalledFunction,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    FinishReason,
    FunctionDelta,
    ToolCallDelta,
    Usage,
)
from engine.server.chat_body import ChatBody
from engine.server.errors import ERROR_ANSWERS, api_error, bad_request
from engine.server.event_stream import DONE, EventStream, data_event, error_event
from engine.server.generation import Begun, Caller, Generation, new_id, unless_gone
from engine.server.json_body import StrictRoute
from engine.server.logprobs import chat_logprobs, shown_logprobs
from engine.server.message_parts import (
    PartReader,
    inside_reasoning,
    needs_special_tokens,
    part_reader,
    read_message,
)
from engine.server.prompts import chat_prompt, template_messages
from engine.server.sampling import check_stream_options, priority_of, sampling_of
from engine.server.served import ServedModel, ServedModels
from engine.server.settings import ServerSettings
from engine.server.structure import chat_form, structured_output
from engine.server.tool_choice import ToolChoice, tool_choice_of

STREAM_ANSWER: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}
}
"""For the OpenAPI document: the other form that a 200 has."""


def chat_routes(models: ServedModels, settings: ServerSettings) -> APIRouter:
    routes = APIRouter(route_class=StrictRoute, tags=["chat"])

    @routes.post(
        "/v1/chat/completions", response_model=ChatCompletion, responses=STREAM_ANSWER | ERROR_ANSWERS
    )
    async def create_chat_completion(body: ChatBody, request: Request) -> Response:
        """Complete a chat, whole or as a stream of server-sent events."""
        includes_usage = check_stream_options(body)
        call = await chat_call(models.find(body.model), body, settings, Caller.of(request))
        if not body.stream:
            outputs = await unless_gone(request, call.generation.run())
            answer = call.answer(outputs[0])
            return JSONResponse(answer.model_dump(exclude_unset=True))
        begun = await unless_gone(request, Begun.of(call.generation.stream()))
        return EventStream(_events(call, begun, includes_usage), begun)

    return routes


@dataclass(frozen=True, slots=True)
class ChatCall:
    """A chat to be completed, and how its answer is written."""

    generation: Generation
    tools: ToolChoice
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def model(self) -> ServedModel:
        return self.generation.model

    @property
    def inside_reasoning(self) -> bool | None:
        return inside_reasoning(self.model, self.generation.prompts[0])

    @property
    def wants_logprobs(self) -> bool:
        return self.generation.sampling.logprobs is not None

    def answer(self, output: RequestOutput) -> ChatCompletion:
        return ChatCompletion(
            id=self.generation.request_id,
            object="chat.completion",
            created=self.created,
            model=self.model.name,
            choices=[self._choice(sample) for sample in output.outputs],
            usage=Usage.of(generation.Usage.of([output])),
        )

    def _choice(self, sample: CompletionOutput) -> ChatChoice:
        parts = read_message(self.model, self.tools, sample.text, self.inside_reasoning)
        message = AnswerMessage(role="assistant", content=parts.content, refusal=None)
        if parts.tool_calls and not parts.content:
            message.content = None
        if parts.reasoning:
            message.reasoning_content = parts.reasoning
        calls = [CalledFunction(name=call.name, arguments=call.arguments) for call in parts.tool_calls]
        if calls and self.tools.is_legacy:
            message.function_call = calls[0]
        elif calls:
            message.tool_calls = [
                AnswerToolCall(id=new_id("call"), type="function", function=call) for call in calls
            ]
        logprobs = None
        if self.wants_logprobs:
            logprobs = chat_logprobs(self.model.tokenizer, shown_logprobs(sample, self.generation.sampling))
        return ChatChoice(
            index=sample.index,
            message=message,
            logprobs=logprobs,
            finish_reason=finish_reason(sample, self.tools, bool(calls)),
            stop_reason=sample.stop_reason,
        )


async def chat_call(model: ServedModel, body: ChatBody, settings: ServerSettings, caller: Caller) -> ChatCall:
    """Raises ApiError or RequestError (400) for a body that cannot run; nothing is queued yet."""
    tools = tool_choice_of(body, settings)
    priority = priority_of(body, settings, model.engine.engine.config.scheduling_policy)
    structured = structured_output(body, settings, form=chat_form(body.response_format), tools=tools)
    if body.top_logprobs is not None and not body.logprobs:
        raise bad_request("top_logprobs needs logprobs to be true", "top_logprobs")
    if body.skip_special_tokens is None and needs_special_tokens(model, tools):
        body.skip_special_tokens = False
    asked = body.max_completion_tokens or body.max_tokens
    if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != asked:
        raise bad_request("max_tokens is the old name of max_completion_tokens: give one", "max_tokens")
    sampling = sampling_of(
        body,
        settings,
        max_tokens=asked or settings.max_tokens or model.max_model_len,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        structured=structured,
    )
    prompt = await chat_prompt(
        model,
        template_messages(body.messages),
        settings,
        tools=tools.offered,
        fields=body,
        reasoning_effort=body.reasoning_effort,
    )
    return ChatCall(
        Generation(
            request_id=new_id("chatcmpl"),
            model=model,
            prompts=[prompt],
            sampling=sampling,
            caller=caller,
            priority=priority,
            timeout_s=settings.request_timeout_s,
        ),
        tools,
    )


def finish_reason(sample: CompletionOutput, tools: ToolChoice, has_calls: bool) -> FinishReason:
    """As OpenAI has it: an answer that had to be one named call ends with "stop"."""
    if sample.finish_reason != "stop":
        return "length"
    if not has_calls or tools.mode == "named":
        return "stop"
    return "function_call" if tools.is_legacy else "tool_calls"


async def _events(
    call: ChatCall, outputs: Begun[tuple[int, RequestOutput]], includes_usage: bool
) -> AsyncIterator[bytes]:
    samples = [_StreamedSample(call, index) for index in range(call.generation.sampling.n)]
    output = None
    try:
        for sample in samples:
            yield _chunk(call, sample.first(), includes_usage)
        async for _, output in outputs:
            for sample, grown in zip(samples, output.outputs, strict=True):
                for choice in sample.choices(grown):
                    yield _chunk(call, choice, includes_usage)
        if includes_usage and output is not None:
            last = _bare_chunk(call)
            last.usage = Usage.of(generation.Usage.of([output]))
            yield data_event(last)
    except Exception as error:  # the status is sent: the error is the last event
        yield error_event(api_error(error))
    yield DONE


def _bare_chunk(call: ChatCall) -> ChatChunk:
    return ChatChunk(
        id=call.generation.request_id,
        object="chat.completion.chunk",
        created=call.created,
        model=call.model.name,
        choices=[],
    )


def _chunk(call: ChatCall, choice: ChatChunkChoice, includes_usage: bool) -> bytes:
    chunk = _bare_chunk(call)
    chunk.choices = [choice]
    if includes_usage:
        chunk.usage = None
    return data_event(chunk)


class _StreamedSample:
    """One completion of a streamed chat: what of it has been sent."""

    def __init__(self, call: ChatCall, index: int):
        self._call = call
        self._index = index
        self._reader: PartReader = part_reader(call.model, call.tools, call.inside_reasoning)
        self._num_characters = 0
        self._num_logprobs = 0
        self._has_calls = False
        self._is_finished = False

    def first(self) -> ChatChunkChoice:
        return self._choice(ChatDelta(role="assistant", content=""))

    def choices(self, sample: CompletionOutput) -> list[ChatChunkChoice]:
        """What is new since the last look, a choice for each part of the message that grew."""
        if self._is_finished:
            return []
        text = sample.text
        events = self._reader.push(text[self._num_characters :]) if len(text) > self._num_characters else []
        self._num_characters = len(text)
        if sample.finish_reason is not None:
            self._is_finished = True
            events += self._reader.finish()
        made = [self._choice(delta) for delta in map(self._delta, events) if delta is not None]
        if sample.finish_reason is not None:
            last = self._choice(ChatDelta())
            last.finish_reason = finish_reason(sample, self._call.tools, self._has_calls)
            last.stop_reason = sample.stop_reason
            made.append(last)
        if made and self._call.wants_logprobs:
            entries = shown_logprobs(sample, self._call.generation.sampling, self._num_logprobs)
            self._num_logprobs += len(entries)
            made[0].logprobs = chat_logprobs(self._call.model.tokenizer, entries)
        return made

    def _choice(self, delta: ChatDelta) -> ChatChunkChoice:
        return ChatChunkChoice(index=self._index, delta=delta, logprobs=None, finish_reason=None)

    def _delta(self, event: Any) -> ChatDelta | None:
        if isinstance(event, ContentDelta):
            return ChatDelta(content=event.text)
        if isinstance(event, ReasoningDelta):
            return ChatDelta(reasoning_content=event.text)
        self._has_calls = True
        begins = isinstance(event, ToolCallStart)
        function = (
            FunctionDelta(name=event.name, arguments="") if begins else FunctionDelta(arguments=event.text)
        )
        if self._call.tools.is_legacy:  # which has one call
            return ChatDelta(function_call=function) if event.index == 0 else None
        call = ToolCallDelta(index=event.index, function=function)
        if begins:
            call.id, call.type = new_id("call"), "function"
        return ChatDelta(tool_calls=[call])
