"""Runs planned steps on the device: compiled ahead of time, pages donated. The only `device_get`."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx

from engine.batch import BatchBuilder, StepInputs
from engine.buckets import Bucket, choose_bucket, declare_buckets
from engine.compilation import counting_compiles
from engine.config import EngineConfig
from engine.errors import RetraceError
from engine.memory import num_pages_that_fit
from engine.models.config import ModelConfig, attention_scale
from engine.models.layer_loop import looped_forward
from engine.plan import PlannedRow, RowResult, StepPlan
from engine.sampler import StepOutputs, sample
from kernels.paged_attention import AttentionOptions, PageLayout, Pages, attend, page_layout


def make_step(graph: Any, options: AttentionOptions, layout: PageLayout) -> Any:
    """The pure device step: (weights, kv_pages, inputs) -> (kv_pages, outputs).

    `kv_pages` are the pages of all layers in one pool, a layer's after the other's.
    """

    def step(weights: Any, kv_pages: Pages, inputs: StepInputs) -> tuple[Pages, StepOutputs]:
        model = nnx.merge(graph, weights)
        num_pages = kv_pages.keys.shape[0] // model.config.num_layers

        def attend_layer(layer, q, k, v, pages):
            # Page p of layer i is page i * num_pages + p of the pool.
            rows = inputs.rows._replace(page_table=inputs.rows.page_table + layer * num_pages)
            return attend(q, k, v, pages, rows, options, layout)

        hidden, kv_pages = looped_forward(model, inputs.token_ids, inputs.positions, kv_pages, attend_layer)
        logits = model.logits(hidden.at[inputs.logit_tokens].get(mode="clip"))
        return kv_pages, sample(logits, inputs.sampling)

    return step


class StepRunner:
    """Owns the weights, the KV pages and the compiled steps of one model on one device."""

    def __init__(self, model: Any, model_config: ModelConfig, config: EngineConfig, max_model_len: int):
        started = time.monotonic()
        self._device = jax.devices()[0]
        backend = "xla" if config.attention_backend == "auto" else config.attention_backend
        self._layout = page_layout(
            backend, model_config.num_kv_heads, model_config.head_dim, config.page_size, config.page_dtype
        )
        self._num_layers = model_config.num_layers
        graph, weights = nnx.split(model)
        self._weights = jax.device_put(weights, self._device)
        options = AttentionOptions(scale=attention_scale(model_config))
        self._step = jax.jit(make_step(graph, options, self._layout), donate_argnums=1)
        self._batch = BatchBuilder(
            vocab_size=model_config.vocab_size,
            max_num_seqs=config.max_num_seqs,
            max_model_len=max_model_len,
            page_size=config.page_size,
            device=self._device,
        )
        self.buckets = declare_buckets(
            config.min_token_pad, config.max_num_batched_tokens, config.max_num_seqs
        )
        page_bytes = self._layout.page_bytes * self._num_layers
        weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self._weights))
        fit = partial(
            num_pages_that_fit,
            config,
            device=self._device,
            page_bytes=page_bytes,
            max_model_len=max_model_len,
        )
        with counting_compiles() as count:
            # The largest step's temporaries decide how many pages fit, and its code depends on that number:
            # so it is compiled for a few pages first where the device bounds memory.
            self.num_pages = fit(used_bytes=weight_bytes + self._temporary_bytes(config))
            self._compiled = {bucket: self._compile(bucket, self.num_pages) for bucket in self.buckets}
        self.num_compiled = count.num_compiled
        self._kv_pages = self._empty_pages()
        self.num_computed_tokens = 0
        self.num_padded_tokens = 0
        self.compile_seconds = time.monotonic() - started

    @property
    def device_name(self) -> str:
        return f"{self._device.platform}:{self._device.device_kind}"

    def run(self, plan: StepPlan) -> list[RowResult]:
        """Compute one planned step (with at least one row) and wait for its results, one a row."""
        num_tokens = plan.num_tokens
        bucket = choose_bucket(self.buckets, num_tokens, plan.num_logits)
        inputs = self._batch.build(plan, bucket)
        self._kv_pages, outputs = self._call(bucket, inputs)
        self.num_computed_tokens += num_tokens
        self.num_padded_tokens += bucket.num_tokens - num_tokens
        return _row_results(plan, jax.device_get(outputs))

    def _call(self, bucket: Bucket, inputs: StepInputs) -> tuple[Pages, StepOutputs]:
        try:
            return self._compiled[bucket](self._weights, self._kv_pages, inputs)
        except TypeError as error:
            # A compiled step takes exactly the shapes it was compiled for and its message names the argument.
            raise RetraceError(
                f"the step of {bucket.num_tokens} tokens and {bucket.num_logits} logits was given arguments "
                f"it was not compiled for: {error}"
            ) from error

    def _empty_pages(self) -> Pages:
        return jax.device_put(self._layout.empty(self._num_layers * self.num_pages), self._device)

    def _compile(self, bucket: Bucket, num_pages: int) -> Any:
        kv_pages = jax.eval_shape(lambda: self._layout.empty(self._num_layers * num_pages))
        inputs = self._batch.idle_inputs(bucket)
        return self._step.lower(self._weights, kv_pages, inputs).compile()

    def _temporary_bytes(self, config: EngineConfig) -> int:
        """Bytes of the largest step's temporaries, where the number of pages depends on them."""
        if config.kv_cache_bytes is not None or self._device.platform == "cpu":
            return 0
        analysis = self._compile(self.buckets[-1], 2 * config.max_num_seqs).memory_analysis()
        return int(analysis.temp_size_in_bytes)


def _row_results(plan: StepPlan, outputs: StepOutputs) -> list[RowResult]:
    """Spread the rows of logits over the rows of the plan. `outputs` holds numpy arrays."""
    token_ids = outputs.token_ids.tolist()
    results = []
    index = 0
    for row in plan.rows:
        if not row.num_logits:
            results.append(RowResult())
            continue
        first, index = index, index + row.num_logits
        prompt_logprobs = tuple(
            _logprob(outputs, at, row.request.sampling.prompt_logprobs)
            for at in range(first, first + row.num_prompt_logprobs)
        )
        results.append(_row_result(row, token_ids, outputs, index - 1, prompt_logprobs))
    return results


def _row_result(
    row: PlannedRow, token_ids: list[int], outputs: StepOutputs, last: int, prompt_logprobs: Any
) -> RowResult:
    if not row.samples:
        return RowResult(prompt_logprobs=prompt_logprobs)
    num_top = row.request.sampling.logprobs
    if num_top is None:
        return RowResult(token_ids[last], prompt_logprobs=prompt_logprobs)
    logprob, top = _logprob(outputs, last, num_top)
    return RowResult(token_ids[last], logprob, top, prompt_logprobs)


def _logprob(
    outputs: StepOutputs, at: int, num_top: int | None
) -> tuple[float, tuple[tuple[int, float], ...]]:
    """The log-probability in row `at`, and the `num_top` likeliest alternatives."""
    ids = np.asarray(outputs.top_ids)[at, :num_top].tolist()
    logprobs = np.asarray(outputs.top_logprobs)[at, :num_top].tolist()
    return float(outputs.logprobs[at]), tuple(zip(ids, logprobs, strict=True))
