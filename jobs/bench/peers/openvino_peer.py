"""OpenVINO GenAI, as a process that answers jobs (`serving`). openvino is imported here and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jobs.bench.peers.serving import Generated, Request, Sampling, serve


class OpenvinoGenai:
    """Its continuous batching pipeline on a GGUF file, with prefix caching.

    The weights keep the file's precision (8 bits in groups, or 16-bit floats); keys, values and activations
    are float32, since 8-bit keys and values are another answer, not another engine.
    """

    def __init__(self, settings: dict[str, Any]):
        import openvino  # pyright: ignore[reportMissingImports]
        import openvino_genai  # pyright: ignore[reportMissingImports]

        self._openvino, self._genai = openvino, openvino_genai
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.max_num_batched_tokens = settings["max_num_batched_tokens"]
        scheduler.max_num_seqs = settings["max_num_seqs"]
        scheduler.cache_size = settings["kv_gib"]
        scheduler.enable_prefix_caching = True
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            settings["model"],
            scheduler,
            "CPU",
            {
                "INFERENCE_NUM_THREADS": settings["num_threads"],
                "INFERENCE_PRECISION_HINT": "f32",
                "KV_CACHE_PRECISION": "f32",
            },
        )

    @property
    def about(self) -> str:
        return f"OpenVINO GenAI {self._genai.__version__}, OpenVINO {self._openvino.__version__}"

    def prepare(self, requests: Sequence[Request], sampling: Sampling) -> dict[str, Any]:
        self.generate(requests, sampling, {})
        return {}

    def generate(self, requests: Sequence[Request], sampling: Sampling, plan: dict[str, Any]) -> Generated:
        import numpy

        configs = []
        for request in requests:
            config = self._genai.GenerationConfig()
            config.max_new_tokens = request.max_tokens
            config.ignore_eos = sampling.ignore_eos
            if not sampling.ignore_eos:
                config.set_eos_token_id(self._pipeline.get_tokenizer().get_eos_token_id())
            config.do_sample = sampling.temperature > 0
            if config.do_sample:
                config.temperature = sampling.temperature
                config.top_p, config.top_k = 1.0, 2**31
                config.rng_seed = sampling.seed + request.index
            config.num_return_sequences = sampling.n
            configs.append(config)
        prompts = [self._openvino.Tensor(numpy.array([request.prompt], numpy.int64)) for request in requests]
        results = self._pipeline.generate(prompts, configs)
        return Generated([list(ids) for result in results for ids in result.m_generation_ids])


if __name__ == "__main__":
    serve(OpenvinoGenai)
