"""Calls of an engine that give whole answers: prompts in, outputs back in their order, or one as a stream."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any, Literal, overload

from engine.checkpoints import render_chat
from engine.errors import ConfigError, RequestError
from engine.inputs import Chat, Prompts, TokenIds, as_list, is_token_ids, sampling_of_each
from engine.outputs import RequestOutput
from engine.request_control import RequestControl
from engine.sampling_params import SamplingParams

Outputs = Generator[RequestOutput, None, None]


class WholeCalls(RequestControl):
    """The part of an `Engine` for callers who wait for answers. Its thread is the engine's."""

    tokenizer: Any

    def add_request(self, request_id: str | None = None, **options: Any) -> str:
        raise NotImplementedError

    def step(self) -> list[RequestOutput]:
        raise NotImplementedError

    def generate(
        self,
        prompts: Prompts,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts and return them in input order.

        Args:
            prompts: a string, a chat (a list of messages with `role` and `content`) or token ids, or a list
                of one of these.
            sampling: one for all, or one a prompt; `sampling_params` is the same.

        Raises:
            RequestError: a prompt cannot run (then none has), naming it.
        """
        self._check_runs()
        each = as_list(prompts)
        samplings = sampling_of_each(one_of(sampling, sampling_params), len(each))
        ids: list[str] = []
        try:
            for prompt, params in zip(each, samplings, strict=True):
                ids.append(self._add(prompt, params, stream=False))
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
        self,
        prompt: str | TokenIds | Chat,
        sampling: SamplingParams | None = None,
        *,
        sampling_params: SamplingParams | None = None,
    ) -> Outputs:
        """Complete one prompt and yield an output whenever its text grows.

        `delta_text` never splits a character nor shows a part of a stop string; joined, the deltas are the
        final text. Closing the iterator aborts the request.
        """
        self._check_runs()
        params = _for_stream(one_of(sampling, sampling_params))
        request_id = self._add(as_list(prompt)[0], params, stream=params.output_kind != "final_only")
        yield from self._follow_stream(request_id)

    @overload
    def chat(
        self, messages: Chat, *args: Any, stream: Literal[False] = False, **options: Any
    ) -> RequestOutput: ...

    @overload
    def chat(self, messages: Chat, *args: Any, stream: Literal[True], **options: Any) -> Outputs: ...

    def chat(
        self,
        messages: Chat,
        sampling: SamplingParams | None = None,
        *,
        sampling_params: SamplingParams | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        reasoning: bool | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        stream: bool = False,
        request_id: str | None = None,
    ) -> RequestOutput | Outputs:
        """Answer one conversation through the model's chat template; with `stream`, as `Engine.stream`.

        Args:
            messages: each with a `role`, and a `content` or what else the template reads (`tool_calls`).
            tools: functions in OpenAI's form, told to the template and to the engine's `tool_parser`.
            reasoning: whether the model is to think first, told to the template as `enable_thinking`; None
                leaves it to the template.
            chat_template: in the place of the model's own.
            chat_template_kwargs: variables for the template; those above are not among them.

        Raises:
            RequestError: it cannot run, or the template does not fit the messages.
            ModelError: there is no template.
        """
        self._check_runs()
        variables = dict(chat_template_kwargs or {})
        for name, value in (("tools", tools), ("enable_thinking", reasoning)):
            if value is None:
                continue
            if name in variables:
                raise RequestError(
                    "bad_prompt", f"chat_template_kwargs has {name!r}, which is given by itself too"
                )
            variables[name] = value if isinstance(value, bool) else [dict(tool) for tool in value]
        token_ids = render_chat(
            self.tokenizer,
            messages,
            add_generation_prompt=add_generation_prompt,
            template=chat_template,
            variables=variables,
        )
        params = one_of(sampling, sampling_params) or SamplingParams()
        if stream:
            params = _for_stream(params)
        grows = stream and params.output_kind != "final_only"
        request_id = self.add_request(
            request_id, prompt_token_ids=token_ids, sampling=params, tools=tools, stream=grows
        )
        outputs = self._follow_stream(request_id)
        return outputs if stream else next(output for output in outputs if output.finished)

    def _follow_stream(self, request_id: str) -> Outputs:
        """Step until a request has finished and yield its outputs; it is aborted where nobody takes them."""
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

    def _add(self, prompt: str | TokenIds | Chat, params: SamplingParams, *, stream: bool) -> str:
        if is_token_ids(prompt):
            return self.add_request(prompt_token_ids=prompt, sampling=params, stream=stream)
        return self.add_request(prompt=prompt, sampling=params, stream=stream)


def one_of(sampling: Any, sampling_params: Any) -> Any:
    """The sampling that was given by one name or the other. Raises ConfigError when it was by both."""
    if sampling is not None and sampling_params is not None:
        raise ConfigError("sampling and sampling_params are the same: give one of them")
    return sampling if sampling_params is None else sampling_params


def _for_stream(params: SamplingParams | None) -> SamplingParams:
    params = params or SamplingParams()
    if params.n != 1:
        raise RequestError("bad_sampling", f"sampling.n is {params.n}: a stream has one completion")
    return params
