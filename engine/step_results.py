"""What a step's result does to the request it belongs to: tokens, log-probabilities, and the end."""

from __future__ import annotations

from engine.plan import PlannedRow, RowLogprobs
from engine.request import Request


def record_prompt_logprobs(row: PlannedRow, logprobs: RowLogprobs | None) -> None:
    """Append the row's prompt log-probabilities. Raises ValueError when not exactly those asked for came."""
    due, came = row.num_prompt_logprobs, () if logprobs is None else logprobs.prompt
    if len(came) != due:
        raise ValueError(
            f"request {row.request.request_id!r}: {due} prompt log-probabilities were asked for, "
            f"{len(came)} came"
        )
    for logprob, top_logprobs in came:
        row.request.prompt_logprobs.append(logprob)
        row.request.prompt_top_logprobs.append(top_logprobs)


def record_logprob(request: Request, logprobs: RowLogprobs) -> None:
    """Append the drawn token's log-probability, if it was asked for."""
    if logprobs.logprob is not None:
        request.output_logprobs.append(logprobs.logprob)
        request.output_top_logprobs.append(logprobs.top)


def ends_with(request: Request, token: int) -> bool:
    """Whether the token just appended ends the request; its finish and stop reasons are set if so.

    Up to `min_tokens` nothing but a length ends it. A token that would end it in both ways is a "stop".
    """
    sampling, num_output = request.sampling, request.num_output_tokens
    if token in request.end_token_ids and num_output >= sampling.min_tokens:
        request.finish_reason = "stop"
        if sampling.ignore_eos or token not in request.eos_token_ids:
            request.stop_reason = token
        return True
    if num_output >= request.max_output_len:
        request.finish_reason = "length"
        return True
    return False
