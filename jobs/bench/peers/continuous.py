"""transformers' continuous batching on torch, as a process that answers jobs (`serving`).

In bfloat16, on a GPU where torch has one. torch is imported here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jobs.bench.peers.serving import Generated, Request, Sampling, serve


class Continuous:
    """The model, with all that transformers chooses by itself: attention, pages, CUDA graphs."""

    def __init__(self, settings: dict[str, Any]):
        import torch  # pyright: ignore[reportMissingImports]
        from transformers import AutoModelForCausalLM

        self._torch = torch
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        model: Any = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.bfloat16)
        self._model = model.to(self._device).eval()

    @property
    def about(self) -> str:
        import transformers

        where = self._torch.cuda.get_device_name(0) if self._device == "cuda" else "CPU"
        return f"transformers {transformers.__version__}, torch {self._torch.__version__}, bfloat16, {where}"

    def prepare(self, requests: Sequence[Request], sampling: Sampling) -> dict[str, Any]:
        self.generate(requests, sampling, {})
        return {}

    def generate(self, requests: Sequence[Request], sampling: Sampling, plan: dict[str, Any]) -> Generated:
        from transformers import GenerationConfig

        if sampling.temperature > 0 or sampling.n > 1 or not sampling.ignore_eos:
            raise ValueError("only greedy requests of a known length are compared")
        config = GenerationConfig(
            do_sample=False,
            eos_token_id=-1,  # none
            pad_token_id=0,
            max_new_tokens=max(request.max_tokens for request in requests),
        )
        found: dict[str, list[int]] = {}
        with self._model.continuous_batching_context_manager(
            generation_config=config, persistent_manager=True
        ) as manager:
            for request in requests:
                manager.add_request(
                    list(request.prompt), request_id=str(request.index), max_new_tokens=request.max_tokens
                )
            while len(found) < len(requests):
                result = manager.get_result(timeout=1)
                if result is None and not manager.is_running():
                    raise RuntimeError("transformers' generation ended before its requests")
                if result is not None and result.error is not None:
                    raise RuntimeError(f"transformers: request {result.request_id}: {result.error}")
                if result is not None and result.is_finished():
                    found[result.request_id] = list(result.generated_tokens)
        return Generated([found[str(request.index)] for request in requests])


if __name__ == "__main__":
    serve(Continuous)
