"""transformers' batched `generate` on torch, as a process that answers jobs given on its standard input.

    python -m jobs.bench.peers.transformers      one JSON job a line in, one JSON answer a line out

It gets its best conditions: the batch size and the order of requests that a short search finds fastest, left
padding, no work after the last token of a batch. torch is imported here and nowhere else.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

BATCH_SIZES = (8, 16, 32, 64, 128)
# So many new tokens show what a decode step costs at a batch size.
SEARCH_NEW_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Plan:
    """How the requests are put into batches."""

    batch_size: int
    sort_by: str  # "output", then prompt: no row waits long for its batch; "prompt": little padding
    cache: str  # "dynamic" or "static"


@dataclass(frozen=True, slots=True)
class Request:
    index: int
    prompt: Sequence[int]
    max_tokens: int


def batches(requests: Sequence[Request], plan: Plan) -> Iterator[list[Request]]:
    """Batches of requests that resemble each other, the longest first."""

    def size(request: Request) -> tuple[int, int]:
        both = (request.max_tokens, len(request.prompt))
        return both if plan.sort_by == "output" else (both[1], both[0])

    ordered = sorted(requests, key=size, reverse=True)
    for start in range(0, len(ordered), plan.batch_size):
        yield ordered[start : start + plan.batch_size]


class Transformers:
    """The model in float32, and greedy generation that does not stop at end-of-sequence."""

    def __init__(self, folder: str, gguf_file: str | None, num_threads: int):
        import torch  # pyright: ignore[reportMissingImports]
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(num_threads)
        self._torch = torch
        options: dict[str, Any] = {} if gguf_file is None else {"gguf_file": gguf_file}
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
        self._model.generation_config.eos_token_id = None
        self._model.generation_config.pad_token_id = 0

    @property
    def about(self) -> str:
        import transformers

        threads = self._torch.get_num_threads()
        return f"transformers {transformers.__version__}, torch {self._torch.__version__}, {threads} threads"

    def generate(self, requests: Sequence[Request], plan: Plan) -> dict[int, list[int]]:
        """New token ids by request index, each cut to what was asked for."""
        torch = self._torch
        found: dict[int, list[int]] = {}
        for batch in batches(requests, plan):
            longest = max(len(request.prompt) for request in batch)
            ids = torch.zeros((len(batch), longest), dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, request in enumerate(batch):
                ids[row, longest - len(request.prompt) :] = torch.tensor(request.prompt)
                mask[row, longest - len(request.prompt) :] = 1
            options = {"cache_implementation": "static"} if plan.cache == "static" else {}
            with torch.inference_mode():
                out = self._model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    max_new_tokens=max(request.max_tokens for request in batch),
                    do_sample=False,
                    **options,
                )
            for row, request in enumerate(batch):
                found[request.index] = out[row, longest : longest + request.max_tokens].tolist()
        return found

    def timed(self, requests: Sequence[Request], plan: Plan) -> tuple[float, dict[int, list[int]]]:
        started = time.perf_counter()
        found = self.generate(requests, plan)
        return time.perf_counter() - started, found

    def best_plan(self, requests: Sequence[Request]) -> tuple[Plan, list[dict[str, Any]]]:
        """The fastest plan, and what every tried plan reached in tokens a second.

        Batch sizes are tried upwards, a single batch each, until one is slower than the one before.
        """
        tried: list[tuple[float, Plan]] = []

        def attempt(batch_size: int, cache: str) -> float:
            step = len(requests) // batch_size  # spread over the requests, so that lengths are mixed
            sample = [
                Request(request.index, request.prompt, min(request.max_tokens, SEARCH_NEW_TOKENS))
                for request in requests[::step][:batch_size]
            ]
            seconds, _ = self.timed(sample, Plan(batch_size, "prompt", cache))
            num_tokens = sum(len(request.prompt) + request.max_tokens for request in sample)
            tried.append((num_tokens / seconds, Plan(batch_size, "prompt", cache)))
            return tried[-1][0]

        self.timed(requests[:2], Plan(2, "prompt", "dynamic"))  # whatever happens only once happens here
        best = 0.0
        for batch_size in BATCH_SIZES:
            if batch_size > len(requests) or attempt(batch_size, "dynamic") < best:
                break
            best = tried[-1][0]
        # The static cache pays or not whatever the batch size is: it is tried at the best one.
        attempt(max(tried, key=lambda entry: entry[0])[1].batch_size, "static")
        fastest = max(tried, key=lambda entry: entry[0])[1]
        # The order is chosen by arithmetic, since the search cuts the new tokens short.
        by_order = [Plan(fastest.batch_size, order, fastest.cache) for order in ("prompt", "output")]
        chosen = min(by_order, key=lambda plan: self._rows_computed(requests, plan))
        return chosen, [asdict(plan) | {"tokens_per_second": rate} for rate, plan in tried]

    @staticmethod
    def _rows_computed(requests: Sequence[Request], plan: Plan) -> int:
        """Tokens fed through the model, padding and rows that are already done included."""
        return sum(
            len(batch) * (max(r.max_tokens for r in batch) + max(len(r.prompt) for r in batch))
            for batch in batches(requests, plan)
        )


def main() -> None:
    answers = sys.stdout
    sys.stdout = sys.stderr  # whatever a library prints must not mix with the answers
    peer: Transformers | None = None
    for line in sys.stdin:
        job = json.loads(line)
        requests = [Request(i, prompt, num) for i, (prompt, num) in enumerate(job.get("requests", []))]
        if job["do"] == "load":
            peer = Transformers(job["folder"], job["gguf_file"], job["num_threads"])
            answer: dict[str, Any] = {"about": peer.about}
        elif peer is None:
            raise RuntimeError("the first job must be 'load'")
        elif job["do"] == "search":
            plan, tried = peer.best_plan(requests)
            answer = {"plan": asdict(plan), "tried": tried}
        else:
            seconds, found = peer.timed(requests, Plan(**job["plan"]))
            answer = {"seconds": seconds, "token_ids": [found[i] for i in range(len(requests))]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
