"""What the engine gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from engine.message_parsing import Parsing
from engine.request import TopLogprobs

if TYPE_CHECKING:
    from engine.parsers import ParsedMessage, ToolCall
    from engine.scheduler_settings import SchedulerStats


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token's log-probability under the model, before temperature, penalties and masks."""

    token_id: int
    logprob: float
    top: TopLogprobs
    """The likeliest alternatives there, as many as were asked for."""


class _MadeWhenRead:
    """A field of a dataclass that is given as a string, or as what makes it when it is first read."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type) -> str:
        if instance is None:
            raise AttributeError(f"{owner.__name__}.{self._name} has no default")
        text = vars(instance)[self._name]
        if not isinstance(text, str):
            text = vars(instance)[self._name] = text()
        return text

    def __set__(self, instance: Any, text: str | Callable[[], str]) -> None:
        vars(instance)[self._name] = text


@dataclass(frozen=True)
class CompletionOutput:
    """One sample of a prompt."""

    index: int
    token_ids: tuple[int, ...]
    finish_reason: str | None
    """"stop", "length", "abort", "timeout", or "error" (its structured output cost more to follow than one
    may); None while it runs."""
    text: _MadeWhenRead = _MadeWhenRead()
    """Where no step needed it (no stream, no stop strings) it is made of the tokens when it is first read, in
    the reader's time."""
    stop_reason: int | str | None = None
    """The stop token id or stop string, or what the error is; None for end-of-sequence, length or abort."""
    cumulative_logprob: float | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    parsing: Parsing | None = None
    """How its text is read as a message, where the engine has parsers."""

    @property
    def message(self) -> ParsedMessage | None:
        """Its text as a message: content, reasoning, tool calls; None where the engine has no parsers. Made
        when it is read, of the text so far."""
        return None if self.parsing is None else self.parsing.parse(self.text)

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        message = self.message
        return () if message is None else message.tool_calls

    @property
    def reasoning_content(self) -> str | None:
        message = self.message
        return None if message is None else message.reasoning

    def but(self, **changes: Any) -> CompletionOutput:
        """A copy with some fields changed, as `dataclasses.replace`; the text is not made for it."""
        return CompletionOutput(**{**vars(self), **changes})

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copies: with the text, without what makes it."""
        return vars(self) | {"text": self.text}


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """Monotonic seconds; None where it did not happen."""

    arrival_time: float
    first_scheduled_time: float | None
    first_token_time: float | None
    finished_time: float | None
    num_preemptions: int = 0
    output_time: float | None = None
    """When this output was made."""


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A request, whole when `finished`."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    finished: bool
    metrics: RequestMetrics
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    """One entry a prompt token; the first has none."""
    delta_text: str = ""
    """Streaming: what sample 0 grew by since the output before."""
    num_cached_tokens: int = 0
    num_truncated_tokens: int = 0
    """Prompt tokens that were cut, because the request or the engine's options asked for it."""
    num_generated_tokens: int = 0
    """Of all samples together, those included that `best_of` did not choose."""
    update_seq: int = 0
    """Outputs given of this request, this one included."""
    whole_text: str | None = None
    """The text of sample 0, where `outputs` hold what is new alone."""

    @property
    def accumulated_text(self) -> str:
        """The whole text of sample 0 so far."""
        return self.outputs[0].text if self.whole_text is None else self.whole_text

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """Those of sample 0."""
        return self.outputs[0].tool_calls

    @property
    def reasoning_content(self) -> str | None:
        """That of sample 0."""
        return self.outputs[0].reasoning_content

    @property
    def first_token_time(self) -> float | None:
        """Seconds from its arrival to its first token."""
        return self._seconds(self.metrics.arrival_time, self.metrics.first_token_time)

    @property
    def processing_time(self) -> float | None:
        """Seconds from its arrival to its end, or to this output."""
        return self._seconds(self.metrics.arrival_time, self._latest)

    @property
    def time_spent_generating(self) -> float | None:
        """Seconds from its first step to its end, or to this output."""
        return self._seconds(self.metrics.first_scheduled_time, self._latest)

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens, of all samples, by the time spent generating; 0 before there is any."""
        seconds = self.time_spent_generating
        return self.num_generated_tokens / seconds if seconds else 0.0

    @property
    def _latest(self) -> float | None:
        finished = self.metrics.finished_time
        return self.metrics.output_time if finished is None else finished

    @staticmethod
    def _seconds(start: float | None, stop: float | None) -> float | None:
        return None if start is None or stop is None else stop - start


def ended_early(output: RequestOutput, reason: str, now: float) -> RequestOutput:
    """The last output of a request that goes no further, given the one as it stands; `now` in monotonic
    seconds."""
    outputs = [
        sample if sample.finish_reason else sample.but(finish_reason=reason) for sample in output.outputs
    ]
    metrics = replace(output.metrics, finished_time=now)
    return replace(output, outputs=tuple(outputs), finished=True, metrics=metrics)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Totals since the engine was made, but for the two lists, which hold what came since the last look (of
    the last 65,536 steps at most; empty in `Engine.totals`)."""

    num_steps: int
    step_seconds: tuple[float, ...]
    """Seconds of each step since the last look."""
    batch_occupancy: tuple[int, ...]
    """Sequences in each step since the last look."""
    num_prompt_tokens: int
    """Of admitted requests, each sample's counted."""
    num_cached_tokens: int
    """Those of them found in the prefix cache."""
    num_computed_tokens: int
    """Tokens fed through the model, recomputed ones included."""
    num_padded_tokens: int
    """Padding fed through with them; none where the kernels leave padding out."""
    num_generated_tokens: int
    running: int
    waiting: int
    pages_free: int
    pages_cached: int
    pages_held: int
    preemptions: int
    evictions: int
    compile_seconds: float
    """Tracing, compiling or reading back the declared steps at the start."""
    num_compiled: int
    """Steps that had to be compiled, not found in the compilation cache."""
    num_loaded: int
    """Steps read whole from `engine.compiled_steps_path`, neither traced nor compiled."""
    device: str
    num_duplicates: int
    """Requests that were given the result of another one, none of their tokens being computed."""
    num_drafted_tokens: int = 0
    """Tokens guessed and looked at (engine/speculation)."""
    num_accepted_tokens: int = 0
    """Those of them that were drawn: each saved a step of its row."""
    num_replicas: int = 1
    """Schedulers whose batches run in one step, each of up to `engine.max_num_seqs` sequences."""

    @classmethod
    def of(
        cls,
        scheduler: SchedulerStats,
        runner: Any,
        *,
        num_steps: int,
        step_seconds: tuple[float, ...],
        batch_occupancy: tuple[int, ...],
        num_prompt_tokens: int,
        num_duplicates: int,
        num_replicas: int,
    ) -> EngineStats:
        """Those of an engine, from its parts; `runner` is its `StepRunner`."""
        return cls(
            num_steps=num_steps,
            step_seconds=step_seconds,
            batch_occupancy=batch_occupancy,
            num_prompt_tokens=num_prompt_tokens,
            num_cached_tokens=scheduler.num_prefix_hits,
            num_computed_tokens=runner.num_computed_tokens,
            num_padded_tokens=runner.num_padded_tokens,
            num_generated_tokens=scheduler.num_generated_tokens,
            num_drafted_tokens=scheduler.num_drafted_tokens,
            num_accepted_tokens=scheduler.num_accepted_tokens,
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
            num_duplicates=num_duplicates,
            num_replicas=num_replicas,
        )
