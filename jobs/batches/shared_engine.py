"""An engine that a server's clients use too, as a batch's worker sees it: rows go in behind the clients'
requests.

A worker steps its engine; this one is stepped by its own thread, and a step here waits a moment for results.
Rows are handed to it without waiting for its step, so that many begin at once; what it cannot run comes back
with the results. What it does not take because too many are waiting is offered again with each step.
"""

from __future__ import annotations

import hashlib
import queue
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from engine.async_engine import AsyncEngine
from engine.drawn import DrawnTokens
from engine.errors import EngineClosed, Overloaded, RequestError
from engine.outputs import EngineStats, RequestOutput
from engine.sampling_params import MAX_SEED, SamplingParams
from pipeline.open_work import Refusal

BATCH_PRIORITY = 1_000_000
"""Lower runs sooner: batches come after whoever waits for an answer."""
STEP_SECONDS = 0.05
TENANT = "tidemill-batches"
"""For the engine's fairness all batches together are one tenant."""


class SharedEngine:
    """What `pipeline.worker.Worker` needs of an engine, over an `AsyncEngine`. For one thread.

    Draws of a row without a seed follow from the run's seed and the row's id alone, as in a job; they are
    other ones than a job's, because requests of a server have identities of their own. Rows that a stop cuts
    short begin anew.
    """

    def __init__(self, engine: AsyncEngine, cache_salt: str | None = None):
        """`cache_salt`: share cached pages only with requests of the same salt."""
        self._engine = engine
        self._cache_salt = cache_salt
        self._prefix = f"batch-{uuid.uuid4().hex[:12]}:"
        self._results: queue.SimpleQueue[RequestOutput | tuple[str, Exception]] = queue.SimpleQueue()
        self._open: set[str] = set()
        self._waiting: dict[str, tuple[tuple[int, ...], SamplingParams]] = {}
        self._stats = _nothing_yet(engine.stats())

    @property
    def num_pages(self) -> int:
        return self._engine.engine.num_pages

    @property
    def has_unfinished(self) -> bool:
        return bool(self._open or self._waiting)

    @property
    def num_unfinished(self) -> int:
        return len(self._open) + len(self._waiting)

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        *,
        sampling: SamplingParams,
        identity: str,
        expected_output_len: int | None,
        drawn: Sequence[DrawnTokens] | None,
    ) -> None:
        """As `Engine.add_request`. `expected_output_len` is a hint for a job's own memory, which this is
        not."""
        if not sampling.is_greedy and sampling.seed is None:
            sampling = sampling.replace(seed=_seed_of(self._engine.engine.config.seed, identity))
        self._submit(request_id, tuple(prompt_token_ids), sampling)

    def pin_prefix(self, token_ids: Sequence[int]) -> None:
        """A batch keeps no pages from the clients' requests."""

    def release_prefix(self, token_ids: Sequence[int]) -> None:
        """Nothing was pinned."""

    def step(self) -> list[RequestOutput | Refusal]:
        """What has finished, or was refused, since the last step; waits a moment for the first. Raises
        EngineClosed, or what went wrong on the device."""
        for request_id, (token_ids, sampling) in list(self._waiting.items()):
            if not self._submit(request_id, token_ids, sampling):
                break
        outputs: list[RequestOutput | Refusal] = []
        try:
            self._take(self._results.get(timeout=STEP_SECONDS), outputs)
            while True:
                self._take(self._results.get_nowait(), outputs)
        except queue.Empty:
            pass
        return outputs

    def drawn_tokens(self, request_id: str) -> None:
        """Nothing that another engine could go on from."""

    def abort_request(self, request_id: str) -> None:
        self._waiting.pop(request_id, None)
        if request_id in self._open:
            self._open.remove(request_id)
            self._engine.abort(self._prefix + request_id)

    def stats(self) -> EngineStats:
        """Of this batch alone, as far as it is known: steps and pages are everybody's, and not counted
        here."""
        return self._stats

    def close(self) -> None:
        """Give up what is unfinished."""
        for request_id in [*self._open, *self._waiting]:
            self.abort_request(request_id)

    def _submit(self, request_id: str, token_ids: tuple[int, ...], sampling: SamplingParams) -> bool:
        """Whether the engine takes it now; otherwise it waits here."""
        self._open.add(request_id)
        try:
            self._engine.submit(
                token_ids,
                sampling,
                request_id=self._prefix + request_id,
                priority=BATCH_PRIORITY,
                tenant=TENANT,
                cache_salt=self._cache_salt,
                wait=False,
                on_output=self._results.put,
                on_error=lambda error: self._results.put((request_id, error)),
            )
        except Overloaded:
            self._open.discard(request_id)
            self._waiting[request_id] = (token_ids, sampling)
            return False
        except RequestError as error:
            self._results.put((request_id, error))
        self._waiting.pop(request_id, None)
        return True

    def _take(
        self, result: RequestOutput | tuple[str, Exception], outputs: list[RequestOutput | Refusal]
    ) -> None:
        if isinstance(result, tuple):
            request_id, error = result
            if not isinstance(error, RequestError):
                raise error
            if request_id in self._open:
                self._open.remove(request_id)
                outputs.append(Refusal(request_id, error))
            return
        request_id = result.request_id.removeprefix(self._prefix)
        if request_id not in self._open:
            return  # aborted
        if any(sample.finish_reason in ("abort", "timeout") for sample in result.outputs):
            raise EngineClosed("the engine was closed before a batch's rows were finished")
        self._open.remove(request_id)
        count = self._stats
        self._stats = replace(
            count,
            num_steps=count.num_steps + 1,
            num_prompt_tokens=count.num_prompt_tokens + len(result.prompt_token_ids),
            num_generated_tokens=count.num_generated_tokens + sum(len(s.token_ids) for s in result.outputs),
        )
        outputs.append(replace(result, request_id=request_id))


def _seed_of(run_seed: int, identity: str) -> int:
    digest = hashlib.blake2b(
        identity.encode("utf-8", "surrogatepass"), digest_size=8, key=str(run_seed).encode()
    )
    return int.from_bytes(digest.digest(), "little") & MAX_SEED


def _nothing_yet(stats: EngineStats) -> EngineStats:
    """The same engine, with nothing counted."""
    counted: dict[str, Any] = {
        name: type(value)()
        for name in EngineStats.__dataclass_fields__
        if isinstance(value := getattr(stats, name), int | float | tuple)
    }
    return replace(stats, **(counted | {"num_replicas": stats.num_replicas}))
