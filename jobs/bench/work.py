"""How much arithmetic a workload is, so that its time can be read as a fraction of the machine's rate."""

from __future__ import annotations

from engine.models.config import ModelConfig
from jobs.bench.workloads import Workload


def matrix_params(config: ModelConfig) -> int:
    """Weights that every token is multiplied with: the layers' matrices, not embedding and head."""
    attention = config.d_model * config.head_dim * 2 * (config.num_heads + config.num_kv_heads)
    return config.num_layers * (attention + 3 * config.d_model * config.intermediate_size)


def flops(config: ModelConfig, workload: Workload) -> float:
    """Floating-point operations that the workload needs when its shared prefix is computed once.

    A multiplication and an addition count as two. Products with weights and attention's two products are
    counted, norms and softmax are not. The last token drawn is not fed back.
    """
    per_token = 2 * matrix_params(config)
    head = 2 * config.d_model * config.vocab_size
    per_pair = 4 * config.num_heads * config.head_dim * config.num_layers  # one query meeting one key

    def span(start: int, stop: int) -> float:
        """Tokens [start, stop) of one sequence, each attending to itself and all before it."""
        num_pairs = (stop * (stop + 1) - start * (start + 1)) / 2
        return (stop - start) * per_token + num_pairs * per_pair

    total = span(0, workload.shared_len)
    for prompt, num_new in zip(workload.prompts, workload.max_tokens, strict=True):
        total += span(workload.shared_len, len(prompt) + num_new - 1) + num_new * head
    return total
