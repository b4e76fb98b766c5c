"""An engine without a model: the Engine protocol, deterministic, and able to die where a test says.

A completion's tokens follow from its prompt, its effective sampling, its identity and its sample index
alone, as the real engine's do, so whole runs can be compared byte for byte. One token per running sample
per step.
"""

from __future__ import annotations

import hashlib
import os
import signal
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from engine.drawn import DrawnTokens
from engine.errors import RequestError
from engine.outputs import CompletionOutput, EngineStats, RequestMetrics, RequestOutput, TokenLogprob
from engine.sampling_params import SamplingParams


class ByteTokenizer:
    """Token i < 256 is the byte i; 256 ends a text. Enough of transformers' interface for the pipeline."""

    bos_token_id = None
    bos_token = None
    eos_token_id = 256
    eos_token = "<end>"
    all_special_ids = (256,)
    chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"

    def __len__(self) -> int:
        return 257

    @property
    def vocab_size(self) -> int:
        return 257

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode("utf-8"))

    def __call__(self, text: str | list[str], add_special_tokens: bool = True, **_: Any) -> dict[str, Any]:
        if isinstance(text, str):
            return {"input_ids": self.encode(text)}
        return {"input_ids": [self.encode(each) for each in text]}

    def decode(self, ids: Sequence[int] | int, skip_special_tokens: bool = False, **_: Any) -> str:
        ids = [ids] if isinstance(ids, int) else ids
        text = bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")
        return text if skip_special_tokens else text + self.eos_token * sum(i == 256 for i in ids)

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        return [self.eos_token if i == 256 else f"<0x{i:02X}>" for i in ids]

    def apply_chat_template(
        self,
        messages: Sequence[dict[str, str]],
        *,
        tokenize: bool = True,
        add_generation_prompt: bool = False,
        **_: Any,
    ) -> str | list[int]:
        text = "".join(f"<{message['role']}>{message['content']}\n" for message in messages)
        text += "<assistant>" if add_generation_prompt else ""
        return self.encode(text) if tokenize else text


@dataclass(slots=True)
class _Running:
    output_tokens: list[list[int]]
    request_id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    arrival: float
    offsets: list[int]  # tokens that each sample began with
    num_steps: int = 0
    first_scheduled: float | None = None
    first_token: float | None = None

    @property
    def num_drawn(self) -> list[int]:
        """Tokens of each sample, or more where it ended before the others."""
        return [offset + self.num_steps for offset in self.offsets]


def _logprob(token: int) -> TokenLogprob:
    return TokenLogprob(token, -token / 256, ((token, -token / 256),))


def kill_process(request_id: str) -> None:
    """The default way to die: at once, with nothing cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


class FakeEngine:
    """`crash_on`: request ids (or identities) whose step number `crash_at_step` calls `crash(request_id)`.

    Time is the number of steps taken, so that traces too are deterministic. Prompts longer than
    `max_model_len` less one raise RequestError at `add_request`, as in the real engine.
    """

    def __init__(
        self,
        *,
        max_num_seqs: int = 4,
        max_model_len: int = 4096,
        crash_on: Collection[str] = (),
        crash_at_step: int = 1,
        crash: Callable[[str], None] = kill_process,
        seed: int = 0,
        clock: Callable[[], float] | None = None,
    ):
        self.tokenizer = ByteTokenizer()
        self.max_num_seqs = max_num_seqs
        self.max_model_len = max_model_len
        self.num_pages = 1024
        self.max_in_flight = 0
        self.num_given = 0  # tokens that requests went on from
        self.pinned: Counter[tuple[int, ...]] = Counter()
        self.expected: dict[str, int] = {}
        self._crash_on = frozenset(crash_on)
        self._crash_at_step = crash_at_step
        self._crash = crash
        self._seed = seed
        self._clock = clock or (lambda: float(self._num_steps))
        self._waiting: list[_Running] = []
        self._running: list[_Running] = []
        self._num_steps = 0
        self._step_seconds: list[float] = []
        self._occupancy: list[int] = []
        self._prompt_tokens = 0
        self._generated_tokens = 0

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int] | None = None,
        prompt: str | None = None,
        sampling: SamplingParams = SamplingParams(),  # noqa: B008 - frozen
        priority: int = 0,
        identity: str | None = None,
        expected_output_len: int | None = None,
        drawn: Sequence[DrawnTokens] | None = None,
    ) -> None:
        if expected_output_len is not None:
            assert 1 <= expected_output_len <= sampling.max_tokens
            self.expected[request_id] = expected_output_len
        if prompt_token_ids is None:
            prompt_token_ids = self.tokenizer.encode(prompt or "")
        if len(prompt_token_ids) >= self.max_model_len:
            raise RequestError(
                "prompt_too_long", f"{len(prompt_token_ids)} tokens leave no room in {self.max_model_len}"
            )
        if any(each.request_id == request_id for each in self._waiting + self._running):
            raise RequestError("duplicate_id", f"request {request_id!r} is already running")
        prompt_ids = tuple(prompt_token_ids)
        tokens = [self._tokens(prompt_ids, sampling, identity or request_id, i) for i in range(sampling.n)]
        offsets = [0] * sampling.n
        if drawn is not None:
            assert sampling.prompt_logprobs is None
            offsets = [len(each.token_ids) for each in drawn]
            for own, each in zip(tokens, drawn, strict=True):
                assert tuple(own[: len(each.token_ids)]) == each.token_ids, "another row's tokens"
            self.num_given += sum(offsets)
        self._waiting.append(_Running(tokens, request_id, prompt_ids, sampling, self._clock(), offsets))

    def _tokens(
        self, prompt: tuple[int, ...], sampling: SamplingParams, identity: str, index: int
    ) -> list[int]:
        who = (sampling.seed, index) if sampling.seed is not None else (self._seed, identity, index)
        about = repr((prompt, sampling, () if sampling.is_greedy else who)).encode()
        stream = hashlib.shake_256(about).digest(2 + sampling.max_tokens)
        length = 1 + int.from_bytes(stream[:2], "little") % sampling.max_tokens
        length = sampling.max_tokens if sampling.ignore_eos else max(length, sampling.min_tokens)
        return [97 + byte % 26 for byte in stream[2 : 2 + length]]

    @property
    def has_unfinished(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def num_unfinished(self) -> int:
        return len(self._waiting) + len(self._running)

    def step(self) -> list[RequestOutput]:
        """One token for every running sample; the requests that finished."""
        while self._waiting and len(self._running) < self.max_num_seqs:
            each = self._waiting.pop(0)
            each.first_scheduled = self._clock()
            self._prompt_tokens += len(each.prompt)
            self._running.append(each)
        self.max_in_flight = max(self.max_in_flight, len(self._running))
        self._num_steps += 1
        self._step_seconds.append(0.001)
        self._occupancy.append(len(self._running))
        finished = []
        for each in list(self._running):
            each.num_steps += 1
            if each.request_id in self._crash_on and each.num_steps == self._crash_at_step:
                self._crash(each.request_id)
            if each.first_token is None:
                each.first_token = self._clock()
            self._generated_tokens += sum(
                len(tokens) >= drawn for tokens, drawn in zip(each.output_tokens, each.num_drawn, strict=True)
            )
            if all(
                drawn >= len(tokens) for tokens, drawn in zip(each.output_tokens, each.num_drawn, strict=True)
            ):
                self._running.remove(each)
                finished.append(self._output(each))
        return finished

    def _output(self, each: _Running) -> RequestOutput:
        sampling = each.sampling
        assert each.first_scheduled is not None
        assert each.first_token is not None
        completions = []
        for index, tokens in enumerate(each.output_tokens):
            logprobs = tuple(map(_logprob, tokens))
            completions.append(
                CompletionOutput(
                    index=index,
                    text=self.tokenizer.decode(tokens),
                    token_ids=tuple(tokens),
                    finish_reason="length" if len(tokens) == sampling.max_tokens else "stop",
                    cumulative_logprob=sum(-token / 256 for token in tokens)
                    if sampling.logprobs is not None
                    else None,
                    logprobs=logprobs if sampling.logprobs is not None else None,
                )
            )
        prompt_logprobs = (None, *map(_logprob, each.prompt[1:]))
        return RequestOutput(
            request_id=each.request_id,
            prompt=None,
            prompt_token_ids=each.prompt,
            prompt_logprobs=prompt_logprobs if sampling.prompt_logprobs is not None else None,
            outputs=tuple(completions),
            finished=True,
            metrics=RequestMetrics(each.arrival, each.first_scheduled, each.first_token, self._clock()),
        )

    def pin_prefix(self, token_ids: Sequence[int]) -> None:
        self.pinned[tuple(token_ids)] += 1

    def release_prefix(self, token_ids: Sequence[int]) -> None:
        if not self.pinned[tuple(token_ids)]:
            raise ValueError("a prefix is released that is not pinned")
        self.pinned[tuple(token_ids)] -= 1

    def drawn_tokens(self, request_id: str) -> tuple[DrawnTokens, ...] | None:
        for each in self._waiting + self._running:
            if each.request_id == request_id:
                wants_logprobs = each.sampling.logprobs is not None
                tokens = [
                    tuple(tokens[: min(drawn, len(tokens) - 1)])
                    for tokens, drawn in zip(each.output_tokens, each.num_drawn, strict=True)
                ]
                return tuple(
                    DrawnTokens(t, tuple(map(_logprob, t)) if wants_logprobs else None) for t in tokens
                )
        return None

    def abort_request(self, request_id: str) -> None:
        self._waiting = [each for each in self._waiting if each.request_id != request_id]
        self._running = [each for each in self._running if each.request_id != request_id]

    def stats(self) -> EngineStats:
        """Totals, and the step times since the last call."""
        seconds, self._step_seconds = self._step_seconds, []
        occupancy, self._occupancy = self._occupancy, []
        return EngineStats(
            num_steps=self._num_steps,
            step_seconds=tuple(seconds),
            batch_occupancy=tuple(occupancy),
            num_prompt_tokens=self._prompt_tokens,
            num_cached_tokens=0,
            num_computed_tokens=self._prompt_tokens + self._generated_tokens,
            num_padded_tokens=0,
            num_generated_tokens=self._generated_tokens,
            running=len(self._running),
            waiting=len(self._waiting),
            pages_free=self.num_pages - len(self._running),
            pages_cached=0,
            pages_held=len(self._running),
            preemptions=0,
            evictions=0,
            compile_seconds=0.0,
            num_compiled=0,
            num_loaded=0,
            device="fake",
            num_duplicates=0,
        )

    def close(self) -> None:
        self._waiting, self._running = [], []
