"""StepPlan -> StepInputs: the arrays of one step, in the shape of its bucket. The only `device_put`.

Arrays that only unusual sampling needs (histories, masks, biases) are put on the device for the steps
that need them; all others are given the same idle ones, made once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from engine.buckets import Bucket
from engine.plan import StepPlan
from engine.request import Request
from engine.sampler import MAX_LOGIT_BIAS, SamplingInputs
from engine.token_masks import mask_width, needs_mask, token_mask
from kernels.paged_attention import Rows


class StepInputs(NamedTuple):
    """Everything a step reads but weights and pages. Padding tokens belong to no slot."""

    token_ids: jax.Array  # i32[T]
    positions: jax.Array  # i32[T]
    rows: Rows
    logit_tokens: jax.Array  # i32[L], which token of the step each row of logits is of
    sampling: SamplingInputs


class BatchBuilder:
    """Builds the inputs of any planned step. Sizes are those the steps are compiled for."""

    def __init__(
        self, *, vocab_size: int, max_num_seqs: int, max_model_len: int, page_size: int, device: Any
    ):
        self._vocab_size = vocab_size
        self._max_num_seqs = max_num_seqs
        self._max_model_len = max_model_len
        self._table_width = -(-max_model_len // page_size)
        self._device = device
        self._idle: dict[int, dict[str, jax.Array]] = {}

    def build(self, plan: StepPlan, bucket: Bucket) -> StepInputs:
        """The inputs of `plan`, which must fit `bucket`."""
        token_ids = np.zeros(bucket.num_tokens, np.int32)
        positions = np.zeros(bucket.num_tokens, np.int32)
        query_start = np.full(self._max_num_seqs + 1, plan.num_tokens, np.int32)
        kv_len = np.zeros(self._max_num_seqs, np.int32)
        page_table = np.zeros((self._max_num_seqs, self._table_width), np.int32)
        logit_tokens = np.zeros(bucket.num_logits, np.int32)
        at = num_logits = 0
        for slot, row in enumerate(plan.rows):
            end = at + row.num_tokens
            query_start[slot] = at
            kv_len[slot] = row.stop
            page_table[slot, : len(row.page_ids)] = row.page_ids
            token_ids[at:end] = row.request.token_ids(row.start, row.stop)
            positions[at:end] = np.arange(row.start, row.stop)
            if row.num_logits:
                logit_tokens[num_logits : num_logits + row.num_logits] = np.arange(end - row.num_logits, end)
                num_logits += row.num_logits
            at = end
        sampling, idle = self._sampling(plan, bucket.num_logits)
        arrays = (token_ids, positions, query_start, kv_len, page_table, logit_tokens, sampling)
        put = jax.device_put(arrays, self._device)
        token_ids, positions, query_start, kv_len, page_table, logit_tokens, sampling = put
        rows = Rows(query_start, kv_len, page_table)
        return StepInputs(token_ids, positions, rows, logit_tokens, SamplingInputs(**sampling, **idle))

    def idle_inputs(self, bucket: Bucket) -> StepInputs:
        """Inputs of a step with no rows: the shapes to compile for."""
        return self.build(StepPlan(()), bucket)

    def _sampling(self, plan: StepPlan, size: int) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        """Arrays to put on the device, and those that are there already."""
        put: dict[str, Any] = {
            "temperature": np.zeros(size, np.float32),
            "top_k": np.full(size, self._vocab_size, np.int32),
            "top_p": np.ones(size, np.float32),
            "min_p": np.zeros(size, np.float32),
            "keys": np.zeros((size, 2), np.uint32),
            "positions": np.zeros(size, np.int32),
            "repetition_penalty": np.ones(size, np.float32),
            "presence_penalty": np.zeros(size, np.float32),
            "frequency_penalty": np.zeros(size, np.float32),
            "prompt_len": np.zeros(size, np.int32),
            "history_len": np.zeros(size, np.int32),
            "targets": np.zeros(size, np.int32),
            "has_target": np.zeros(size, bool),
        }
        any_logprobs = False
        unusual = _Unusual()
        index = 0
        for row in plan.rows:
            if not row.num_logits:
                continue
            if row.num_prompt_logprobs:
                end = index + row.num_prompt_logprobs
                first = row.stop - row.num_logits + 1
                put["targets"][index:end] = row.request.token_ids(first, first + row.num_prompt_logprobs)
                put["has_target"][index:end] = True
                any_logprobs = True
                index = end
            if row.samples:
                request, sampling = row.request, row.request.sampling
                any_logprobs |= sampling.logprobs is not None
                if sampling.temperature > 0:
                    put["temperature"][index] = sampling.temperature
                    put["top_k"][index] = sampling.top_k or self._vocab_size
                    put["top_p"][index] = sampling.top_p
                    put["min_p"][index] = sampling.min_p
                    put["keys"][index] = request.key
                    put["positions"][index] = request.num_tokens
                unusual.note(index, request)
                index += 1
        return self._finish(put, unusual, any_logprobs, size)

    def _finish(
        self, put: dict[str, Any], unusual: _Unusual, any_logprobs: bool, size: int
    ) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        idle = dict(self._idle_arrays(size))
        for index, request in unusual.penalised:
            sampling = request.sampling
            put["repetition_penalty"][index] = sampling.repetition_penalty
            put["presence_penalty"][index] = sampling.presence_penalty
            put["frequency_penalty"][index] = sampling.frequency_penalty
            put["prompt_len"][index] = request.prompt_len
            put["history_len"][index] = request.num_tokens
        if unusual.penalised:
            del idle["history"]
            put["history"] = np.zeros((size, self._max_model_len), np.int32)
            for index, request in unusual.penalised:
                put["history"][index, : request.num_tokens] = request.token_ids(0, request.num_tokens)
        if unusual.masked:
            del idle["token_mask"]
            put["token_mask"] = np.full((size, mask_width(self._vocab_size)), 0xFFFFFFFF, np.uint32)
            for index, request in unusual.masked:
                put["token_mask"][index] = token_mask(request, self._vocab_size)
        if unusual.biased:
            del idle["bias_ids"], idle["bias_values"]
            put["bias_ids"] = np.full((size, MAX_LOGIT_BIAS), self._vocab_size, np.int32)
            put["bias_values"] = np.zeros((size, MAX_LOGIT_BIAS), np.float32)
            for index, request in unusual.biased:
                bias = request.sampling.logit_bias
                put["bias_ids"][index, : len(bias)] = [token for token, _ in bias]
                put["bias_values"][index, : len(bias)] = [value for _, value in bias]
        filters = (put["top_k"] < self._vocab_size) | (put["top_p"] < 1) | (put["min_p"] > 0)
        put["any_random"] = np.bool_(put["temperature"].any())
        put["any_filter"] = np.bool_(filters.any())
        put["any_penalty"] = np.bool_(bool(unusual.penalised))
        put["any_mask"] = np.bool_(bool(unusual.masked))
        put["any_bias"] = np.bool_(bool(unusual.biased))
        put["any_logprobs"] = np.bool_(any_logprobs)
        return put, idle

    def _idle_arrays(self, size: int) -> dict[str, jax.Array]:
        """What stands in for the arrays that a step's rows do not need."""
        if size not in self._idle:
            arrays = {
                "history": np.zeros((size, self._max_model_len), np.int32),
                "token_mask": np.zeros((size, mask_width(self._vocab_size)), np.uint32),
                "bias_ids": np.zeros((size, MAX_LOGIT_BIAS), np.int32),
                "bias_values": np.zeros((size, MAX_LOGIT_BIAS), np.float32),
            }
            self._idle[size] = jax.device_put(arrays, self._device)
        return self._idle[size]


class _Unusual:
    """Rows of logits whose sampling needs one of the large arrays: (index, request)."""

    __slots__ = ("biased", "masked", "penalised")

    def __init__(self) -> None:
        self.penalised: list[tuple[int, Request]] = []
        self.masked: list[tuple[int, Request]] = []
        self.biased: list[tuple[int, Request]] = []

    def note(self, index: int, request: Request) -> None:
        sampling = request.sampling
        penalties = sampling.repetition_penalty != 1, sampling.presence_penalty, sampling.frequency_penalty
        if any(penalties):
            self.penalised.append((index, request))
        if needs_mask(request):
            self.masked.append((index, request))
        if sampling.logit_bias:
            self.biased.append((index, request))
