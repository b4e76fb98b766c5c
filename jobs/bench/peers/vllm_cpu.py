"""vLLM for CPU, as a process that answers jobs (`serving`). vllm is imported here and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jobs.bench.peers.serving import Generated, Request, Sampling, serve


class VllmCpu:
    """An `LLM` of the offline API, with prefix caching."""

    def __init__(self, settings: dict[str, Any]):
        import vllm  # pyright: ignore[reportMissingImports]

        self._vllm = vllm
        self._dtype = settings["dtype"]
        self._llm = vllm.LLM(
            model=settings["model"],
            dtype=settings["dtype"],
            max_model_len=settings["max_model_len"],
            max_num_seqs=settings["max_num_seqs"],
            max_num_batched_tokens=settings["max_num_batched_tokens"],
            enable_prefix_caching=True,
            disable_log_stats=True,
            seed=0,
        )

    @property
    def about(self) -> str:
        import torch  # pyright: ignore[reportMissingImports]

        return f"vLLM {self._vllm.__version__}, torch {torch.__version__}, {self._dtype}"

    def prepare(self, requests: Sequence[Request], sampling: Sampling) -> dict[str, Any]:
        self.generate(requests, sampling, {})
        return {}

    def generate(self, requests: Sequence[Request], sampling: Sampling, plan: dict[str, Any]) -> Generated:
        params = [
            self._vllm.SamplingParams(
                n=sampling.n,
                temperature=sampling.temperature,
                ignore_eos=sampling.ignore_eos,
                max_tokens=request.max_tokens,
                detokenize=True,
            )
            for request in requests
        ]
        prompts = [{"prompt_token_ids": list(request.prompt)} for request in requests]
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        samples = [list(sample.token_ids) for output in outputs for sample in output.outputs]
        return Generated(samples)


if __name__ == "__main__":
    serve(VllmCpu)
