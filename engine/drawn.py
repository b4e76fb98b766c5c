"""Going on from tokens that an earlier engine drew.

A draw depends on the request's identity and the token's position, so a request that is given its first tokens
computes their keys and values anew, as one that was preempted does, and ends as it would have ended. A sample
that had ended goes on from all its tokens but the last: drawing that one again says how it ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.errors import RequestError
from engine.inputs import checked_tokens
from engine.outputs import CompletionOutput, TokenLogprob
from engine.request import Request


@dataclass(frozen=True, slots=True)
class DrawnTokens:
    """The first tokens of one sample, with their log-probabilities where the sampling asks for them."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None

    @classmethod
    def of(cls, sample: CompletionOutput) -> DrawnTokens:
        """What of a sample, ended or not, can be gone on from."""
        stop = len(sample.token_ids) - (sample.finish_reason is not None)
        logprobs = None if sample.logprobs is None else sample.logprobs[:stop]
        return cls(sample.token_ids[:stop], logprobs)


def begin_with(requests: Sequence[Request], drawn: Sequence[DrawnTokens], vocab_size: int) -> None:
    """Give new requests, the samples of one prompt, the tokens that they go on from.

    Raises RequestError when these cannot be theirs.
    """
    first = requests[0]
    if first.sampling.prompt_logprobs is not None:
        raise _refused(first, "log-probabilities of the prompt are asked for")
    if len(drawn) != len(requests):
        raise _refused(first, f"there are {len(drawn)} samples of {len(requests)}")
    for request, each in zip(requests, drawn, strict=True):
        if len(each.token_ids) >= request.max_output_len:
            raise _refused(request, f"{len(each.token_ids)} tokens leave none to draw")
        wants_logprobs = request.sampling.logprobs is not None
        if wants_logprobs and [entry.token_id for entry in each.logprobs or ()] != list(each.token_ids):
            raise _refused(request, "they lack their log-probabilities")
        checked_tokens(request.request_id, each.token_ids, vocab_size)
        if request.grammar is not None and not request.grammar.accepts(each.token_ids):
            raise _refused(request, "they do not follow its structured output")
        request.output_token_ids = list(each.token_ids)
        request.num_given = len(each.token_ids)
        if wants_logprobs and each.logprobs is not None:
            request.output_logprobs = [entry.logprob for entry in each.logprobs]
            request.output_top_logprobs = [entry.top for entry in each.logprobs]


def _refused(request: Request, why: str) -> RequestError:
    return RequestError("bad_drawn", f"request {request.request_id!r} cannot go on from drawn tokens: {why}")
