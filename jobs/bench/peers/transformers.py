"""transformers' batched `generate` on torch, as a process that answers jobs (`serving`).

It gets its best conditions: the batch size and the order of requests that a short search finds fastest, left
padding, no work after the last token of a batch. torch is imported here and nowhere else.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jobs.bench.peers.serving import Generated, Request, Sampling, serve

BATCH_SIZES = (8, 16, 32, 64, 128)
# So many new tokens show what a decode step costs at a batch size.
SEARCH_NEW_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Plan:
    """How the requests are put into batches."""

    batch_size: int
    sort_by: str  # "output", then prompt: no row waits long for its batch; "prompt": little padding
    cache: str  # "dynamic" or "static"


def batches(requests: Sequence[Request], plan: Plan) -> Iterator[list[Request]]:
    """Batches of requests that resemble each other, the longest first."""

    def size(request: Request) -> tuple[int, int]:
        both = (request.max_tokens, len(request.prompt))
        return both if plan.sort_by == "output" else (both[1], both[0])

    ordered = sorted(requests, key=size, reverse=True)
    for start in range(0, len(ordered), plan.batch_size):
        yield ordered[start : start + plan.batch_size]


class Transformers:
    """The model in float32."""

    def __init__(self, settings: dict[str, Any]):
        import torch  # pyright: ignore[reportMissingImports]
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(settings["num_threads"])
        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32).eval()
        self._eos_token_id = self._model.generation_config.eos_token_id
        self._model.generation_config.pad_token_id = 0

    @property
    def about(self) -> str:
        import transformers

        threads = self._torch.get_num_threads()
        return f"transformers {transformers.__version__}, torch {self._torch.__version__}, {threads} threads"

    def generate(self, requests: Sequence[Request], sampling: Sampling, plan: dict[str, Any]) -> Generated:
        found = self._generate(requests, sampling, Plan(**plan))
        return Generated([ids for request in requests for ids in found[request.index]])

    def _generate(
        self, requests: Sequence[Request], sampling: Sampling, plan: Plan
    ) -> dict[int, list[list[int]]]:
        """New token ids of every sample by request index, each cut to what was asked for."""
        torch = self._torch
        torch.manual_seed(sampling.seed)
        end = None if sampling.ignore_eos else self._eos_token_id
        ends: set[int] = {end} if isinstance(end, int) else set(end or ())
        self._model.generation_config.eos_token_id = end
        found: dict[int, list[list[int]]] = {}
        for batch in batches(requests, plan):
            longest = max(len(request.prompt) for request in batch)
            ids = torch.zeros((len(batch), longest), dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, request in enumerate(batch):
                ids[row, longest - len(request.prompt) :] = torch.tensor(request.prompt)
                mask[row, longest - len(request.prompt) :] = 1
            options: dict[str, Any] = {"cache_implementation": "static"} if plan.cache == "static" else {}
            if sampling.temperature > 0:
                options |= {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
            else:
                options |= {"do_sample": False}
            with torch.inference_mode():
                out = self._model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    max_new_tokens=max(request.max_tokens for request in batch),
                    num_return_sequences=sampling.n,
                    **options,
                )
            for row, request in enumerate(batch):
                samples = out[row * sampling.n : (row + 1) * sampling.n, longest:].tolist()
                found[request.index] = [_until(ids[: request.max_tokens], ends) for ids in samples]
        return found

    def prepare(self, requests: Sequence[Request], sampling: Sampling) -> dict[str, Any]:
        return asdict(self.best_plan(requests, sampling))

    def best_plan(self, requests: Sequence[Request], sampling: Sampling) -> Plan:
        """The fastest plan for such requests.

        Batch sizes are tried upwards, a single batch each, until one is slower than the one before.
        """
        tried: list[tuple[float, Plan]] = []

        def attempt(batch_size: int, cache: str) -> float:
            step = len(requests) // batch_size  # spread over the requests, so that lengths are mixed
            sample = [
                Request(request.index, request.prompt, min(request.max_tokens, SEARCH_NEW_TOKENS))
                for request in requests[::step][:batch_size]
            ]
            started = time.perf_counter()
            self._generate(sample, sampling, Plan(batch_size, "prompt", cache))
            seconds = time.perf_counter() - started
            num_tokens = sum(len(request.prompt) + request.max_tokens for request in sample)
            tried.append((num_tokens / seconds, Plan(batch_size, "prompt", cache)))
            return tried[-1][0]

        # Whatever happens only once happens here.
        self._generate(requests[:2], sampling, Plan(2, "prompt", "dynamic"))
        best = 0.0
        for batch_size in [size for size in BATCH_SIZES if size <= len(requests)] or [len(requests)]:
            if attempt(batch_size, "dynamic") < best:
                break
            best = tried[-1][0]
        # The static cache pays or not whatever the batch size is: it is tried at the best one.
        attempt(max(tried, key=lambda entry: entry[0])[1].batch_size, "static")
        fastest = max(tried, key=lambda entry: entry[0])[1]
        # The order is chosen by arithmetic, since the search cuts the new tokens short.
        by_order = [Plan(fastest.batch_size, order, fastest.cache) for order in ("prompt", "output")]
        return min(by_order, key=lambda plan: self._rows_computed(requests, plan))

    @staticmethod
    def _rows_computed(requests: Sequence[Request], plan: Plan) -> int:
        """Tokens fed through the model, padding and rows that are already done included."""
        return sum(
            len(batch) * (max(r.max_tokens for r in batch) + max(len(r.prompt) for r in batch))
            for batch in batches(requests, plan)
        )


def _until(ids: list[int], ends: set[int]) -> list[int]:
    """A sample up to and with its end-of-sequence; what follows is padding."""
    stop = next((at for at, token in enumerate(ids) if token in ends), len(ids) - 1)
    return ids[: stop + 1]


if __name__ == "__main__":
    serve(Transformers)
