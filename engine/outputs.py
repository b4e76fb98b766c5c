"""What the engine gives back."""

from __future__ import annotations

from dataclasses import dataclass

from engine.request import TopLogprobs


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token's log-probability under the model, before temperature, penalties and masks."""

    token_id: int
    logprob: float
    top: TopLogprobs
    """The likeliest alternatives there, as many as were asked for."""


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One sample of a prompt."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    """"stop", "length" or "abort"; None while it runs."""
    stop_reason: int | str | None = None
    """The stop token id or stop string; None for end-of-sequence, length or abort."""
    cumulative_logprob: float | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """Monotonic seconds; None where it did not happen."""

    arrival_time: float
    first_scheduled_time: float | None
    first_token_time: float | None
    finished_time: float | None
    num_preemptions: int = 0


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


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Totals since the engine was made, but for the two lists, which hold what came since the last look."""

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
    device: str
    num_duplicates: int
    """Requests that were given the result of another one, none of their tokens being computed."""
