"""What a step's result does to the request it belongs to: tokens, log-probabilities, and the end."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.plan import PlannedRow, RowLogprobs, StepPlan, StepResults
from engine.request import Request


def drawn_tokens(plan: StepPlan, results: StepResults) -> np.ndarray:
    """The token each row drew, anything where it does not sample. Raises ValueError when the results are not
    those of the plan's rows."""
    token_ids, arrays = results.token_ids, plan.arrays
    if len(token_ids) != plan.num_rows:
        raise ValueError(f"{len(token_ids)} results came for {plan.num_rows} rows")
    if isinstance(token_ids, np.ndarray):
        return token_ids
    for request, samples, token in zip(arrays.requests, arrays.samples, token_ids, strict=True):
        if samples and token is None and not request.is_finished:
            raise ValueError(f"request {request.request_id!r}: its row samples and no token came")
    return np.array([token or 0 for token in token_ids], np.int32)


def record(
    plan: StepPlan, token_ids: np.ndarray, results: StepResults, now: float | None
) -> tuple[list[Request], int]:
    """Append what the rows drew and set the reasons of those that end with it.

    Requests that have finished are passed over; those that gave up their seats meanwhile (they lost their
    pages, or this was their last token) keep their token.

    Returns:
        The requests that end, and how many tokens were drawn for requests that had not ended before.
    """
    table, arrays, logprobs = plan.table, plan.arrays, results.logprobs
    seats, samples = arrays.seats, arrays.samples
    is_seated = table.tickets[seats] == arrays.tickets
    draws = samples & is_seated
    table.append(seats[draws], token_ids[draws])
    num_drawn = int(np.count_nonzero(samples))
    # What else may happen to a row than one more token.
    is_special = ~is_seated | (table.num_tokens[seats] - table.prompt_lens[seats] == 1)
    if plan.num_logits > num_drawn:
        is_special |= arrays.num_logits != samples
    if table.has_end_tokens:
        is_special |= table.may_end(token_ids)
    if logprobs:
        is_special[list(logprobs)] = True
    ended: list[Request] = []
    for index in is_special.nonzero()[0].tolist():
        request, token = arrays.requests[index], token_ids.item(index)
        if request.is_finished:
            num_drawn -= samples.item(index)
            continue
        if arrays.num_logits[index] != samples[index]:  # logits of prompt positions
            _record_prompt_logprobs(plan.row(index), logprobs.get(index))
        if not samples[index]:
            continue
        if not is_seated[index]:
            request.output_token_ids.append(token)
            request.num_pending = 0
        if request.num_output_tokens == 1:
            request.first_token_time = now
        if index in logprobs:
            _record_logprob(request, logprobs[index])
        is_ended = _ends_with(request, token)
        if index in results.accepted and not is_ended:
            num_more, is_ended = _append_accepted(request, results.accepted[index])
            num_drawn += num_more
        if is_ended:
            ended.append(request)
    return ended, num_drawn


def _append_accepted(request: Request, token_ids: Sequence[int]) -> tuple[int, bool]:
    """Append what was drawn as guessed, up to a token that ends the request; how many, and whether one
    does."""
    if request.table is None:
        raise ValueError(f"request {request.request_id!r} lost its pages while its draft was in flight")
    for number, token in enumerate(token_ids, 1):
        request.table.append_one(request.seat, token)
        if _ends_with(request, token):
            return number, True
    return len(token_ids), False


def _record_prompt_logprobs(row: PlannedRow, logprobs: RowLogprobs | None) -> None:
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


def _record_logprob(request: Request, logprobs: RowLogprobs) -> None:
    """Append the drawn token's log-probability, if it was asked for."""
    if logprobs.logprob is not None:
        request.output_logprobs.append(logprobs.logprob)
        request.output_top_logprobs.append(logprobs.top)


def _ends_with(request: Request, token: int) -> bool:
    """Whether the token just appended ends the request; its finish and stop reasons are set if so.

    Up to `min_tokens` nothing but a length ends it, or a grammar that has nothing to go on with. A token that
    would end it in both ways is a "stop".
    """
    sampling, num_output, grammar = request.sampling, request.num_output_tokens, request.grammar
    if token in request.end_token_ids and (num_output >= sampling.min_tokens or grammar is not None):
        request.finish_reason = "stop"
        if sampling.ignore_eos or token not in request.eos_token_ids:
            request.stop_reason = token
        if grammar is not None and grammar.failure is not None:
            request.finish_reason, request.stop_reason = "error", grammar.failure
        return True
    if num_output >= request.max_output_len:
        request.finish_reason = "length"
        return True
    return False
