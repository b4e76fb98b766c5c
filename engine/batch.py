"""StepPlan -> StepArrays: the numbers of one step, in the shape of its bucket. The only `device_put`.

The numbers are one numpy vector that goes to the device with the step's own call.

Arrays that only unusual sampling needs (histories, masks, biases) are put on the device for the steps
that need them; all others are given the same idle ones, made once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

from engine.buckets import Bucket
from engine.draw_needs import BIAS, HISTORY, LOGPROBS, MASK, PENALTY
from engine.group_costs import GroupCosts
from engine.in_flight import Draws, InFlight, step_results
from engine.packed_tokens import unpack_tokens
from engine.plan import StepPlan, StepResults
from engine.prefix_groups import Branch, arrange_rows, find_groups
from engine.sampler import MAX_LOGIT_BIAS, StepOutputs
from engine.seat_sampling import SeatSampling
from engine.seat_table import SeatTable
from engine.step_inputs import ANY_FLAGS, StepArrays, StepShape
from engine.token_masks import mask_width, needs_mask, token_mask


class Filled(NamedTuple):
    """A step's inputs on the host."""

    numbers: np.ndarray
    unusual: dict[str, np.ndarray]
    """The arrays that only unusual sampling needs, those that this step does need."""
    draws: Draws


class BatchBuilder:
    """Builds the inputs of any planned step. Sizes are those the steps are compiled for.

    group_costs: when attention reads a shared prefix once for its rows; None: never.
    """

    def __init__(
        self,
        *,
        buckets: Sequence[Bucket],
        vocab_size: int,
        max_num_seqs: int,
        max_model_len: int,
        page_size: int,
        device: Any,
        group_costs: GroupCosts | None,
    ):
        self._vocab_size = vocab_size
        self._max_num_seqs = max_num_seqs
        self._max_model_len = max_model_len
        self._page_size = page_size
        self._group_costs = group_costs
        self._table_width = -(-max_model_len // page_size)
        self._num_draws = max(bucket.num_logits for bucket in buckets)
        self._device = device
        self._seats = SeatSampling(max_num_seqs, vocab_size)
        self._range = np.arange(max(bucket.num_tokens for bucket in buckets), dtype=np.int32)
        self._idle_numbers_of: dict[Bucket, np.ndarray] = {}
        self._idle: dict[int, dict[str, jax.Array]] = {}
        self.nothing_drawn = np.zeros(self._num_draws, np.int32)
        """What stands for the tokens of the step before where there is none."""
        self._nothing_drawn = jax.device_put(self.nothing_drawn, device)

    def shape(self, bucket: Bucket) -> StepShape:
        return StepShape(*bucket, self._max_num_seqs, self._table_width, self._num_draws)

    def arrange(self, plan: StepPlan) -> tuple[StepPlan, list[Branch]]:
        """The plan with rows that share pages next to each other, and what they share."""
        if self._group_costs is None:
            return plan, []
        arrays = plan.arrays
        page_tables = plan.table.page_tables.take(arrays.seats, axis=0)
        order, branches = arrange_rows(page_tables, arrays.starts, self._page_size)
        if not np.count_nonzero(order != self._range[: len(order)]):
            return plan, branches
        return replace(plan, arrays=arrays.take(order)), branches

    def build(
        self, plan: StepPlan, branches: Sequence[Branch], bucket: Bucket, before: InFlight | None
    ) -> tuple[StepArrays, Draws]:
        """The inputs of an arranged plan, which must fit `bucket`, and what is known of its draws.

        before: the step in flight; rows whose last token it draws read the token on the device.
        Raises ValueError when there are such rows and there is no step in flight.
        """
        filled = self.fill(plan, branches, bucket, None if before is None else before.draws)
        # The numbers themselves go to the device with the step's call: a put of their own costs the host
        # several times what the rest of the call does.
        special = jax.device_put(filled.unusual, self._device) if filled.unusual else {}
        drawn = self._nothing_drawn if before is None else before.outputs.token_ids
        rest = self._idle_arrays(bucket.num_logits) | special
        return StepArrays(numbers=filled.numbers, drawn=drawn, **rest), filled.draws

    def fill(
        self, plan: StepPlan, branches: Sequence[Branch], bucket: Bucket, drawn_before: Draws | None
    ) -> Filled:
        """The part of `build` that is the host's. `drawn_before`: what the step in flight draws."""
        numbers = self._idle_numbers(bucket).copy()
        views = self.shape(bucket).views(numbers)
        draws = Draws(np.zeros(self._seats.num_seats, np.int32), False, False)
        unusual: dict[str, np.ndarray] = {}
        if plan.num_rows:
            rows = plan.arrays
            self._seats.see(rows)
            ends = rows.lens.cumsum(dtype=np.int32)
            groups = find_groups(branches, ends, self._page_size, self._group_costs)
            if groups:
                views["groups"][:, : len(groups)] = np.transpose(groups)
            self._fill_tokens(plan, views, ends, drawn_before)
            draws, unusual = self._fill_logits(plan, views, ends)
        return Filled(numbers, unusual, draws)

    def results(self, step: InFlight, outputs: StepOutputs) -> StepResults:
        """What a step's outputs, numpy arrays, say of the rows of its plan."""
        return step_results(step, outputs)

    def idle_arrays(self, bucket: Bucket) -> StepArrays:
        """Inputs of a step with no rows: the shapes to compile for."""
        return self.build(self.idle_plan(), (), bucket, None)[0]

    def idle_plan(self) -> StepPlan:
        """A step with no rows."""
        table = SeatTable(0, self._max_model_len, self._page_size, lambda request: (0, request.arrival))
        return StepPlan.of(table, table.order, ())

    def _fill_tokens(
        self, plan: StepPlan, views: dict[str, np.ndarray], ends: np.ndarray, drawn_before: Draws | None
    ) -> None:
        """Tokens, positions and the attention's rows. `ends`: where each row's tokens end."""
        rows, table = plan.arrays, plan.table
        num_rows, num_tokens = plan.num_rows, plan.num_tokens
        begins = ends - rows.lens
        views["query_start"][:num_rows] = begins
        views["query_start"][num_rows:] = num_tokens
        views["kv_len"][:num_rows] = rows.starts + rows.lens
        table.page_tables.take(rows.seats, axis=0, out=views["page_table"][:num_rows], mode="clip")
        views["positions"][:num_tokens] = (
            np.repeat(rows.starts - begins, rows.lens) + self._range[:num_tokens]
        )
        # Only a token that the row samples after can be pending, and then it is the row's only one.
        is_pending = rows.is_pending
        if np.count_nonzero(is_pending):
            if drawn_before is None:
                raise ValueError("a row continues a token that no step in flight draws")
            views["sources"][begins[is_pending]] = drawn_before.logit_of_seat[rows.seats[is_pending]]
        known = (~is_pending).nonzero()[0]
        is_last = rows.samples[known] & (rows.lens[known] == 1)  # the seat has the last token of its request
        if np.count_nonzero(is_last):
            last, known = known[is_last], known[~is_last]
            views["token_ids"][begins[last]] = table.tokens[rows.seats[last], rows.starts[last]]
        for index in known.tolist():
            start, begin, num_tokens = rows.starts.item(index), begins.item(index), rows.lens.item(index)
            tokens = rows.requests[index].packed_tokens(start, start + num_tokens)
            views["token_ids"][begin : begin + num_tokens] = unpack_tokens(tokens)

    def _fill_logits(
        self, plan: StepPlan, views: dict[str, np.ndarray], ends: np.ndarray
    ) -> tuple[Draws, dict[str, np.ndarray]]:
        """The rows of logits; returns what is known of the draws, and the arrays of unusual sampling."""
        rows = plan.arrays
        total = plan.num_logits
        views["num_logits"][0] = total
        drawing = rows.where(rows.samples)
        requests, seats, stops = drawing.requests, drawing.seats, drawing.starts + drawing.lens
        if total == len(seats):  # without log-probabilities of prompts, or drafts, a row of logits is a draw
            at = self._range[:total]
            views["logit_tokens"][:total] = ends[rows.samples] - 1
            self._seats.sampled.take(seats, axis=1, out=views["sampled"][:, :total], mode="clip")
            views["sample_positions"][:total] = stops
        else:
            logit_ends = rows.num_logits.cumsum(dtype=np.int32)
            at = logit_ends[rows.samples] - 1
            if plan.drafts:  # a token is drawn behind each drafted one too
                num_more = plan.draft_lens(seats)
                requests, seats = requests.repeat(num_more + 1), seats.repeat(num_more + 1)
                before = _counting_down(num_more)
                stops, at = stops.repeat(num_more + 1) - before, at.repeat(num_more + 1) - before
            views["logit_tokens"][:total] = (
                np.repeat(ends - logit_ends, rows.num_logits) + self._range[:total]
            )
            views["sampled"][:, at] = self._seats.sampled[:, seats]
            views["sample_positions"][at] = stops
        needs = self._seats.needs[seats]
        is_short = stops < self._seats.min_total_len[seats]
        any_need = int(np.bitwise_or.reduce(needs, initial=0))
        any_mask = any_need & MASK > 0 or bool(np.count_nonzero(is_short))
        has_targets = total > len(seats)
        any_logprobs = any_need & LOGPROBS > 0 or has_targets
        flags = {
            "any_penalty": any_need & PENALTY > 0,
            "any_mask": any_mask,
            "any_bias": any_need & BIAS > 0,
            "any_logprobs": any_logprobs,
        }
        views["any"][:] = [flags[name] for name in ANY_FLAGS]
        if has_targets:
            self._fill_targets(plan, views)
        unusual: dict[str, np.ndarray] = {}
        size = len(views["logit_tokens"])
        if any_need & PENALTY:
            penalised = (needs & PENALTY).nonzero()[0]
            views["history_len"][at[penalised]] = stops[penalised]
            history = unusual["history"] = np.zeros((size, self._max_model_len), np.int32)
            for index in penalised:
                request = requests[index]
                history[at[index], : stops[index]] = request.token_ids(0, int(stops[index]))
        if any_mask:
            mask = unusual["token_mask"] = np.full(
                (size, mask_width(self._vocab_size)), 0xFFFFFFFF, np.uint32
            )
            for index in (((needs & MASK) > 0) | is_short).nonzero()[0]:
                request = requests[index]
                if needs_mask(request):
                    mask[at[index]] = token_mask(request, self._vocab_size)
        if any_need & BIAS:
            ids = unusual["bias_ids"] = np.full((size, MAX_LOGIT_BIAS), self._vocab_size, np.int32)
            values = unusual["bias_values"] = np.zeros((size, MAX_LOGIT_BIAS), np.float32)
            for index in (needs & BIAS).nonzero()[0]:
                bias = requests[index].sampling.logit_bias
                ids[at[index], : len(bias)] = [token for token, _ in bias]
                values[at[index], : len(bias)] = [value for _, value in bias]
        logit_of_seat = np.zeros(self._seats.num_seats, np.int32)
        logit_of_seat[seats] = at
        any_history = has_targets or any_need & HISTORY > 0 or bool(plan.drafts)
        return Draws(logit_of_seat, any_logprobs, any_history), unusual

    def _fill_targets(self, plan: StepPlan, views: dict[str, np.ndarray]) -> None:
        """The next tokens of the prompt positions whose log-probabilities are due."""
        index = 0
        for row in plan.rows:
            if row.num_prompt_logprobs:
                end = index + row.num_prompt_logprobs
                first = row.stop - row.num_logits + 1
                targets = row.request.token_ids(first, first + row.num_prompt_logprobs)
                views["targets"][index:end] = targets
                views["has_target"][index:end] = 1
            index += row.num_logits

    def _idle_numbers(self, bucket: Bucket) -> np.ndarray:
        """The packed numbers of a step with no rows, made once."""
        if bucket not in self._idle_numbers_of:
            shape = self.shape(bucket)
            numbers = self._idle_numbers_of[bucket] = np.zeros(shape.size, np.int32)
            views = shape.views(numbers)
            views["sampled"][:] = self._seats.idle[:, None]
            views["sources"][:] = self._range[: bucket.num_tokens] + self._num_draws
        return self._idle_numbers_of[bucket]

    def _idle_arrays(self, size: int) -> dict[str, jax.Array]:
        """What stands in for the arrays that a step's rows do not need."""
        if size not in self._idle:
            self._idle[size] = jax.device_put(self.idle_rows(size), self._device)
        return self._idle[size]

    def idle_rows(self, size: int) -> dict[str, np.ndarray]:
        """The same for `size` rows of logits, on the host."""
        return {
            "history": np.zeros((size, self._max_model_len), np.int32),
            "token_mask": np.zeros((size, mask_width(self._vocab_size)), np.uint32),
            "bias_ids": np.full((size, MAX_LOGIT_BIAS), self._vocab_size, np.int32),
            "bias_values": np.zeros((size, MAX_LOGIT_BIAS), np.float32),
        }


def _counting_down(counts: np.ndarray) -> np.ndarray:
    """For each count n the numbers n, n - 1, ... 0, behind one another."""
    ends = (counts + 1).cumsum(dtype=np.int32)
    return ends.repeat(counts + 1) - 1 - np.arange(ends[-1] if len(ends) else 0, dtype=np.int32)
