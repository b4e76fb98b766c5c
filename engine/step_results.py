"""What a step's result does to the request it belongs to: tokens, log-probabilities, and the end."""

from __future__ import annotations

from engine.plan import PlannedRow, RowResult
from engine.request import Request


def record_prompt_logprobs(row: PlannedRow, result: RowResult) -> None:
    """Append the row's prompt log-probabilities. Raises ValueError when not exactly those asked for came."""
    due, came = row.num_prompt_logprobs, len(result.prompt_logprobs)
    if came != due:
        raise ValueError(
            f"request {row.request.request_id!r}: {due} prompt log-probabilities were asked for, {came} came"
        )
    for logprob, top_logprobs in result.prompt_logprobs:
        row.request.prompt_logprobs.append(logprob)
        row.request.prompt_top_logprobs.append(top_logprobs)


def record_token(request: Request, result: RowResult, now: float | None) -> bool:
    """Append the drawn token; True when the request ends with it, its finish and stop reasons being set.

    Up to `min_tokens` nothing but a length ends it. A token that would end it in both ways is a "stop".
    """
    token = result.token_id
    if token is None:
        raise ValueError(f"request {request.request_id!r}: its row samples and no token came")
    output, sampling = request.output_token_ids, request.sampling
    output.append(token)
    if result.logprob is not None:
        request.output_logprobs.append(result.logprob)
        request.output_top_logprobs.append(result.top_logprobs)
    num_output = len(output)
    if num_output == 1:
        request.first_token_time = now
    if num_output >= sampling.min_tokens:
        if token in request.eos_token_ids and not sampling.ignore_eos:
            request.finish_reason = "stop"
            return True
        if token in sampling.stop_token_ids:
            request.finish_reason = "stop"
            request.stop_reason = token
            return True
    if num_output >= sampling.max_tokens or request.prompt_len + num_output >= request.max_total_len:
        request.finish_reason = "length"
        return True
    return False
