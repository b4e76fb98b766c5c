"""The plain specification of paged attention: float64 numpy, one sequence and one query at a time."""

from __future__ import annotations

import numpy as np

from kernels.paged_attention.layout import AttentionOptions


def attend_sequence(
    q: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    options: AttentionOptions,
    sinks: np.ndarray | None = None,
) -> np.ndarray:
    """Attention of one sequence's newest tokens to all of its tokens.

    Args:
        q: [Q, N, H], the queries of the last Q tokens.
        keys, values: [L, K, H], all L tokens of the sequence.
        options: what a query sees, and how its logits are scaled.
        sinks: [N] or None.

    Returns:
        [Q, N, H] in float64.
    """
    num_queries, num_heads, _ = q.shape
    num_tokens, num_kv_heads, _ = keys.shape
    out = np.zeros(q.shape, np.float64)
    for index in range(num_queries):
        i = num_tokens - num_queries + index
        for head in range(num_heads):
            kv_head = head // (num_heads // num_kv_heads)
            seen = [j for j in range(i + 1) if _sees(i, j, options)]
            logits = keys[seen, kv_head].astype(np.float64) @ q[index, head].astype(np.float64)
            logits = logits * options.scale
            if options.soft_cap is not None:
                logits = options.soft_cap * np.tanh(logits / options.soft_cap)
            extra = [] if sinks is None else [float(sinks[head])]
            weights = np.exp(logits - max([logits.max(), *extra]))
            total = weights.sum() + sum(np.exp(e - max([logits.max(), *extra])) for e in extra)
            out[index, head] = weights @ values[seen, kv_head].astype(np.float64) / total
    return out


def _sees(i: int, j: int, options: AttentionOptions) -> bool:
    return (
        j <= i
        and (options.window is None or i - j < options.window)
        and (options.chunk is None or i // options.chunk == j // options.chunk)
    )
