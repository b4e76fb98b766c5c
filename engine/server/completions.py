"""`POST /v1/completions`."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from engine.outputs import CompletionOutput, RequestOutput
from engine.server import generation
from engine.server.answers import Completion, CompletionChoice, FinishReason, Usage
from engine.server.chat import STREAM_ANSWER
from engine.server.completion_body import CompletionBody
from engine.server.errors import ERROR_ANSWERS, api_error, bad_request
from engine.server.event_stream import DONE, EventStream, data_event, error_event
from engine.server.generation import Begun, Caller, Generation, new_id, unless_gone
from engine.server.json_body import StrictRoute
from engine.server.logprobs import CompletionLogprobMaker, CompletionLogprobs, shown_logprobs
from engine.server.prompts import text_prompt
from engine.server.sampling import check_stream_options, priority_of, sampling_of
from engine.server.served import ServedModel, ServedModels
from engine.server.settings import ServerSettings
from engine.server.structure import structured_output

DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""


def completion_routes(models: ServedModels, settings: ServerSettings) -> APIRouter:
    routes = APIRouter(route_class=StrictRoute, tags=["completions"])

    @routes.post("/v1/completions", response_model=Completion, responses=STREAM_ANSWER | ERROR_ANSWERS)
    async def create_completion(body: CompletionBody, request: Request) -> Response:
        """Complete one prompt or several, whole or as a stream of server-sent events."""
        includes_usage = check_stream_options(body)
        call = await completion_call(models.find(body.model), body, settings, Caller.of(request))
        if not body.stream:
            outputs = await unless_gone(request, call.generation.run())
            return JSONResponse(call.answer(outputs).model_dump(exclude_unset=True))
        begun = await unless_gone(request, Begun.of(call.generation.stream()))
        return EventStream(_events(call, begun, includes_usage), begun)

    return routes


@dataclass(frozen=True, slots=True)
class CompletionCall:
    """Prompts to be completed, and how the answer is written."""

    generation: Generation
    num_returned: int
    """Completions of a prompt that are answered: the best of those drawn."""
    echo: bool
    only_scores: bool
    """No token was asked for: the one that is drawn, since a step draws one, is not shown."""
    wants_logprobs: bool
    created: int = field(default_factory=lambda: int(time.time()))

    def answer(self, outputs: Sequence[RequestOutput]) -> Completion:
        answer = self.piece()
        answer.choices = [
            self._choice(output, sample, prompt_index * self.num_returned + rank)
            for prompt_index, output in enumerate(outputs)
            for rank, sample in enumerate(self._best(output.outputs))
        ]
        answer.usage = self.usage(outputs)
        return answer

    def piece(self) -> Completion:
        """An answer without choices."""
        return Completion(
            id=self.generation.request_id,
            object="text_completion",
            created=self.created,
            model=self.generation.model.name,
            choices=[],
        )

    def usage(self, outputs: Sequence[RequestOutput]) -> Usage:
        usage = Usage.of(generation.Usage.of(outputs))
        if self.only_scores:
            usage.completion_tokens, usage.total_tokens = 0, usage.prompt_tokens
        return usage

    def _best(self, samples: Sequence[CompletionOutput]) -> Sequence[CompletionOutput]:
        """Those of the highest mean log-probability of a token."""
        if len(samples) == self.num_returned:
            return samples
        ranked = sorted(samples, key=_mean_logprob, reverse=True)
        return ranked[: self.num_returned]

    def _choice(self, output: RequestOutput, sample: CompletionOutput, index: int) -> CompletionChoice:
        streamed = StreamedCompletion(self, index)
        return next(streamed.choices(output, sample))


async def completion_call(
    model: ServedModel, body: CompletionBody, settings: ServerSettings, caller: Caller
) -> CompletionCall:
    """Raises ApiError or RequestError (400) for a body that cannot run; nothing is queued yet."""
    if body.suffix is not None:
        raise bad_request("suffix is not supported: the models complete texts from their end", "suffix")
    num_returned = body.n or 1
    num_drawn = body.best_of or num_returned
    if num_drawn < num_returned:
        raise bad_request(f"best_of ({num_drawn}) must be at least n ({num_returned})", "best_of")
    if num_drawn > num_returned and body.stream:
        raise bad_request("best_of cannot be streamed: the best is known at the end", "best_of")
    only_scores = body.max_tokens == 0
    if only_scores and not body.echo:
        raise bad_request("max_tokens is 0: give at least 1, or echo", "max_tokens")
    wants_logprobs = body.logprobs is not None
    sampling = sampling_of(
        body,
        settings,
        max_tokens=DEFAULT_MAX_TOKENS if body.max_tokens is None else max(body.max_tokens, 1),
        n=num_drawn,
        logprobs=body.logprobs if wants_logprobs or num_drawn == num_returned else 0,
        structured=structured_output(body, settings),
    )
    if body.echo and wants_logprobs:
        sampling = sampling.replace(prompt_logprobs=body.logprobs)
    return CompletionCall(
        Generation(
            request_id=new_id("cmpl"),
            model=model,
            prompts=await _prompts(model, body, settings),
            sampling=sampling,
            caller=caller,
            priority=priority_of(body, settings, model.engine.engine.config.scheduling_policy),
            timeout_s=settings.request_timeout_s,
        ),
        num_returned=num_returned,
        echo=bool(body.echo),
        only_scores=only_scores,
        wants_logprobs=wants_logprobs,
    )


async def _prompts(model: ServedModel, body: CompletionBody, settings: ServerSettings) -> list[list[int]]:
    prompt = body.prompt
    given: list[str | list[int]]
    if isinstance(prompt, str):
        given = [prompt]
    elif isinstance(prompt[0], int):
        given = [[token for token in prompt if isinstance(token, int)]]
    else:
        given = [each for each in prompt if not isinstance(each, int)]
    if len(given) > settings.max_prompts:
        raise bad_request(f"{len(given)} prompts: at most {settings.max_prompts} are taken", "prompt")
    prompts: list[list[int]] = []
    for each in given:
        if isinstance(each, list) and max(each) >= model.vocab_size:
            message = f"token id {max(each)} is not in the vocabulary of {model.vocab_size}"
            raise bad_request(message, "prompt", "bad_token_id")
        ids = await text_prompt(model, each) if isinstance(each, str) else each
        if not ids:
            raise bad_request("a prompt has no tokens: it needs at least one", "prompt", "empty_prompt")
        prompts.append(ids)
    return prompts


def _mean_logprob(sample: CompletionOutput) -> float:
    return (sample.cumulative_logprob or 0.0) / max(len(sample.token_ids), 1)


class StreamedCompletion:
    """One completion as it grows: what of it has been answered."""

    def __init__(self, call: CompletionCall, index: int):
        self._call = call
        self._index = index
        self._logprobs = CompletionLogprobMaker(call.generation.model.tokenizer)
        self._has_begun = False
        self._is_finished = False
        self._num_characters = 0
        self._num_logprobs = 0

    def choices(self, output: RequestOutput, sample: CompletionOutput) -> Iterator[CompletionChoice]:
        """What is new since the last look, in at most one piece."""
        call, is_last = self._call, sample.finish_reason is not None
        if self._is_finished:
            return
        text, logprobs = "", CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        if call.echo and not self._has_begun:
            text, logprobs = self._echoed(output)
        self._has_begun, self._is_finished = True, is_last
        if not call.only_scores:
            text += sample.text[self._num_characters :]
            self._num_characters = len(sample.text)
            if call.wants_logprobs:
                new = shown_logprobs(sample, call.generation.sampling, self._num_logprobs)
                self._num_logprobs += len(new)
                logprobs = _joined(logprobs, self._logprobs.push(new))
        if text or is_last:
            yield CompletionChoice(
                index=self._index,
                text=text,
                logprobs=logprobs if call.wants_logprobs else None,
                finish_reason=_finish_reason(sample, call.only_scores) if is_last else None,
                stop_reason=sample.stop_reason,
            )

    def _echoed(self, output: RequestOutput) -> tuple[str, CompletionLogprobs]:
        tokenizer = self._call.generation.model.tokenizer
        ids = output.prompt_token_ids
        text = tokenizer.decode(ids, skip_special_tokens=True)
        entries = output.prompt_logprobs or ()
        return text, self._logprobs.push(entries, ids)


def _finish_reason(sample: CompletionOutput, only_scores: bool) -> FinishReason:
    return "stop" if sample.finish_reason == "stop" and not only_scores else "length"


def _joined(first: CompletionLogprobs, second: CompletionLogprobs) -> CompletionLogprobs:
    return CompletionLogprobs(
        tokens=first.tokens + second.tokens,
        token_logprobs=first.token_logprobs + second.token_logprobs,
        top_logprobs=first.top_logprobs + second.top_logprobs,
        text_offset=first.text_offset + second.text_offset,
    )


async def _events(
    call: CompletionCall, outputs: Begun[tuple[int, RequestOutput]], includes_usage: bool
) -> AsyncIterator[bytes]:
    num_samples = call.num_returned
    streamed = [
        StreamedCompletion(call, index) for index in range(len(call.generation.prompts) * num_samples)
    ]
    latest: dict[int, RequestOutput] = {}
    try:
        async for prompt_index, output in outputs:
            latest[prompt_index] = output
            for sample in output.outputs:
                for choice in streamed[prompt_index * num_samples + sample.index].choices(output, sample):
                    piece = call.piece()
                    piece.choices = [choice]
                    if includes_usage:
                        piece.usage = None
                    yield data_event(piece)
        if includes_usage:
            last = call.piece()
            last.usage = call.usage(list(latest.values()))
            yield data_event(last)
    except Exception as error:  # the status is sent: the error is the last event
        yield error_event(api_error(error))
    yield DONE
