"""llama.cpp, as a process that answers jobs (`serving`). llama_cpp is imported here and nowhere else.

Its batches are driven through its C interface, as its own server does it: a slot a sequence, prompts in large
batches, and all running sequences' next tokens in one. A prefix that many prompts share is computed once, in
a sequence of its own, and copied from there.
"""

from __future__ import annotations

import ctypes
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from jobs.bench.peers.serving import Generated, Request, Sampling, serve

# A group of requests behind one prefix is worth a sequence of its own from these sizes on.
MIN_SHARED_LEN, MIN_SHARED_ROWS, MAX_PREFIXES = 64, 4, 4
MICRO_BATCH = 512


@dataclass(frozen=True, slots=True)
class Plan:
    """How many sequences decode at once, and whether they share one buffer of keys and values."""

    num_slots: int
    unified: bool


PLANS = (Plan(8, False), Plan(32, False), Plan(32, True))


@dataclass(slots=True)
class Slot:
    """A running sequence: `todo` tokens are to be decoded from position `pos` on."""

    request: Request
    sample: int
    pos: int
    todo: list[int]
    new_ids: list[int] = field(default_factory=list)
    logits_at: int | None = None


class LlamaCpp:
    """A model, and a context that is made anew when the plan changes."""

    def __init__(self, settings: dict[str, Any]):
        import llama_cpp  # pyright: ignore[reportMissingImports]

        self._lib: Any = llama_cpp
        # Kept alive: the library calls it as long as it lives.
        self._silence = self._lib.llama_log_callback(lambda level, text, data: None)
        self._lib.llama_log_set(self._silence, ctypes.c_void_p(0))
        self._lib.llama_backend_init()
        params = self._lib.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = self._lib.llama_model_load_from_file(settings["model"].encode(), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {settings['model']}")
        vocab = self._lib.llama_model_get_vocab(self._model)
        self._vocab_size = self._lib.llama_vocab_n_tokens(vocab)
        self._is_end: Callable[[int], bool] = lambda token: self._lib.llama_vocab_is_eog(vocab, token)
        self._settings = settings
        self._max_batch = settings["max_num_batched_tokens"]
        self._batch = self._lib.llama_batch_init(self._max_batch, 0, 1)
        self._context: Any = None
        self._plan: Plan | None = None
        self._use(PLANS[0])

    @property
    def about(self) -> str:
        threads = self._settings["num_threads"]
        return f"llama.cpp by llama-cpp-python {self._lib.__version__}, {threads} threads"

    def prepare(self, requests: Sequence[Request], sampling: Sampling) -> dict[str, Any]:
        """The fastest of `PLANS` on the warm-up's requests, as far as they fill its slots."""
        tried: list[tuple[float, Plan]] = []
        for plan in PLANS:
            if plan.num_slots > len(requests) * sampling.n and tried:
                continue
            started = time.perf_counter()
            self.generate(requests, sampling, asdict(plan))
            tried.append((time.perf_counter() - started, plan))
        return asdict(min(tried, key=lambda entry: entry[0])[1])

    def generate(self, requests: Sequence[Request], sampling: Sampling, plan: dict[str, Any]) -> Generated:
        self._use(Plan(**plan))
        num_slots = plan["num_slots"]
        self._memory = self._lib.llama_get_memory(self._context)
        self._lib.llama_memory_clear(self._memory, False)
        prefixes = shared_prefixes(requests)
        for index, prefix in enumerate(prefixes):
            self._compute_prefix(num_slots + index, prefix)
        waiting = [(request, sample) for request in requests for sample in range(sampling.n)][::-1]
        done: dict[tuple[int, int], list[int]] = {}
        slots: list[Slot | None] = [None] * num_slots
        draw = self._drawer(sampling)
        while waiting or any(slots):
            for index in range(num_slots):
                if slots[index] is None and waiting:
                    slots[index] = self._admit(index, *waiting.pop(), prefixes, num_slots)
            self._decode(slots)
            for index, slot in enumerate(slots):
                if slot is None or slot.logits_at is None:
                    continue
                token = draw(self._logits(slot.logits_at))
                slot.logits_at = None
                slot.new_ids.append(token)
                slot.todo = [token]
                ended = not sampling.ignore_eos and self._is_end(token)
                if ended or len(slot.new_ids) == slot.request.max_tokens:
                    done[slot.request.index, slot.sample] = slot.new_ids
                    slots[index] = None
        return Generated(
            [done[request.index, sample] for request in requests for sample in range(sampling.n)]
        )

    def _use(self, plan: Plan) -> None:
        if plan == self._plan:
            return
        if self._context:
            self._lib.llama_free(self._context)
        params = self._lib.llama_context_default_params()
        params.n_seq_max = plan.num_slots + MAX_PREFIXES
        params.n_ctx = params.n_seq_max * self._settings["max_model_len"]
        params.n_batch, params.n_ubatch = self._max_batch, min(MICRO_BATCH, self._max_batch)
        params.n_threads = params.n_threads_batch = self._settings["num_threads"]
        params.kv_unified = plan.unified
        self._context = self._lib.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot make a context for {plan}")
        self._plan = plan

    def _admit(
        self, index: int, request: Request, sample: int, prefixes: Sequence[tuple[int, ...]], first: int
    ) -> Slot:
        """Take a sequence into a slot; what it shares with a computed prefix is copied."""
        self._lib.llama_memory_seq_rm(self._memory, index, -1, -1)
        for number, prefix in enumerate(prefixes):
            # At least one token is decoded, for its logits.
            if len(prefix) < len(request.prompt) and tuple(request.prompt[: len(prefix)]) == prefix:
                self._lib.llama_memory_seq_cp(self._memory, first + number, index, -1, -1)
                return Slot(request, sample, len(prefix), list(request.prompt[len(prefix) :]))
        return Slot(request, sample, 0, list(request.prompt))

    def _compute_prefix(self, sequence: int, prefix: Sequence[int]) -> None:
        for start in range(0, len(prefix), self._max_batch):
            part = prefix[start : start + self._max_batch]
            self._batch.n_tokens = 0
            for offset, token in enumerate(part):
                self._put(token, start + offset, sequence, wants_logits=False)
            self._check(self._lib.llama_decode(self._context, self._batch))

    def _decode(self, slots: Sequence[Slot | None]) -> None:
        """One batch: every running sequence's next token, then as much of the prompts as fits."""
        self._batch.n_tokens = 0
        running = [(index, slot) for index, slot in enumerate(slots) if slot is not None]
        for index, slot in sorted(running, key=lambda entry: len(entry[1].todo)):
            part = slot.todo[: self._max_batch - self._batch.n_tokens]
            whole = len(part) == len(slot.todo)
            for offset, token in enumerate(part):
                is_last = whole and offset == len(part) - 1
                if is_last:
                    slot.logits_at = self._batch.n_tokens
                self._put(token, slot.pos + offset, index, is_last)
            slot.pos += len(part)
            slot.todo = slot.todo[len(part) :]
        self._check(self._lib.llama_decode(self._context, self._batch))

    def _put(self, token: int, pos: int, sequence: int, wants_logits: bool) -> None:
        batch, at = self._batch, self._batch.n_tokens
        batch.token[at], batch.pos[at], batch.logits[at] = token, pos, wants_logits
        batch.n_seq_id[at] = 1
        batch.seq_id[at][0] = sequence
        batch.n_tokens = at + 1

    @staticmethod
    def _check(status: int) -> None:
        if status:
            raise RuntimeError(f"llama_decode failed with status {status}")

    def _logits(self, index: int) -> Any:
        import numpy

        pointer = self._lib.llama_get_logits_ith(self._context, index)
        return numpy.ctypeslib.as_array(pointer, (self._vocab_size,))

    @staticmethod
    def _drawer(sampling: Sampling) -> Callable[[Any], int]:
        import numpy

        if sampling.temperature == 0:
            return lambda logits: int(logits.argmax())
        rng = numpy.random.default_rng(sampling.seed)

        def draw(logits: Any) -> int:
            sums = numpy.exp((logits - logits.max()) / sampling.temperature).cumsum()
            return min(int(sums.searchsorted(rng.random() * sums[-1])), len(sums) - 1)

        return draw


def shared_prefixes(requests: Sequence[Request]) -> list[tuple[int, ...]]:
    """The prefixes that are worth computing once, the most shared first."""
    heads = Counter(tuple(request.prompt[:MIN_SHARED_LEN]) for request in requests)
    found = []
    for head, count in heads.most_common(MAX_PREFIXES):
        if count < MIN_SHARED_ROWS or len(head) < MIN_SHARED_LEN:
            continue
        group = [p for p in (tuple(request.prompt) for request in requests) if p[: len(head)] == head]
        least, most = min(group), max(group)  # what these two share, all between them share
        pairs = enumerate(zip(least, most, strict=False))
        differ = next((at for at, (a, b) in pairs if a != b), min(len(least), len(most)))
        found.append(least[: min(differ, min(map(len, group)) - 1)])
    return found


if __name__ == "__main__":
    serve(LlamaCpp)
