"""What the engine gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from engine.request import TopLogprobs


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
    """"stop", "length" or "abort"; None while it runs."""
    text: _MadeWhenRead = _MadeWhenRead()
    """Where no step needed it (no stream, no stop strings) it is made of the tokens when it is first read, in
    the reader's time."""
    stop_reason: int | str | None = None
    """The stop token id or stop string; None for end-of-sequence, length or abort."""
    cumulative_logprob: float | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None

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
