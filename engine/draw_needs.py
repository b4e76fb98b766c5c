"""What the draws of a request need besides its logits. No JAX: the scheduler asks too."""

from __future__ import annotations

from engine.request import Request

# What a request's draws need, as bits.
PENALTY, MASK, BIAS, LOGPROBS, HISTORY = (1 << bit for bit in range(5))


def needs_of(request: Request) -> int:
    """What the request's draws need, as bits."""
    sampling = request.sampling
    needs = 0
    if (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) != (1, 0, 0):
        needs |= PENALTY
    follows = bool(request.bad_words_token_ids) or request.grammar is not None
    if sampling.allowed_token_ids is not None or follows:
        needs |= MASK
    if needs & PENALTY or follows:
        needs |= HISTORY
    if sampling.logit_bias:
        needs |= BIAS
    if sampling.logprobs is not None:
        needs |= LOGPROBS
    return needs
