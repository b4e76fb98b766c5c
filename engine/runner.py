"""Runs planned steps on the device: compiled ahead of time, pages donated. The only `device_get`."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from engine.backends import Backends
from engine.batch import BatchBuilder
from engine.buckets import Bucket, choose_bucket, declare_buckets
from engine.compilation import counting_compiles
from engine.config import EngineConfig
from engine.errors import RetraceError
from engine.group_costs import group_costs
from engine.in_flight import InFlight, step_results
from engine.memory import give_back_freed_memory, num_pages_that_fit
from engine.models.config import ModelConfig, attention_scale
from engine.models.packed import PackedModel, pack_model
from engine.page_copies import PageCopier
from engine.plan import StepPlan, StepResults
from engine.sampler import StepOutputs, sample
from engine.step_inputs import StepArrays, StepShape
from kernels.paged_attention import AttentionOptions, PageLayout, Pages, attend, page_layout


def make_step(options: AttentionOptions, layout: PageLayout, sampling_backend: str) -> Any:
    """The pure device step: (shape, model, kv_pages, arrays) -> (kv_pages, outputs).

    `kv_pages` are the pages of all layers in one pool, a layer's after the other's. `outputs.token_ids` has
    one length whatever the step's, so that any step can follow any other.
    """

    def step(
        shape: StepShape, model: PackedModel, kv_pages: Pages, arrays: StepArrays
    ) -> tuple[Pages, StepOutputs]:
        inputs = arrays.unpack(shape)
        num_tokens = inputs.rows.query_start[-1]
        num_pages = kv_pages.num_pages // model.config.num_layers

        def attend_layer(layer, q, k, v, pages):
            # Page p of layer i is page i * num_pages + p of the pool.
            rows = inputs.rows._replace(page_table=inputs.rows.page_table + layer * num_pages)
            return attend(q, k, v, pages, rows, inputs.groups, options, layout)

        hidden, kv_pages = model.forward(
            inputs.token_ids, inputs.positions, kv_pages, attend_layer, num_tokens
        )
        hidden = hidden.at[inputs.logit_tokens].get(mode="clip")
        logits = model.logits(hidden, inputs.sampling.num_rows)
        outputs = sample(logits, inputs.sampling, sampling_backend)
        drawn = jnp.pad(outputs.token_ids, (0, shape.num_draws - shape.num_logits))
        return kv_pages, outputs._replace(token_ids=drawn)

    return step


class StepRunner:
    """Owns the weights, the KV pages and the compiled steps of one model on one device."""

    def __init__(
        self,
        model: Any,
        model_config: ModelConfig,
        config: EngineConfig,
        max_model_len: int,
        *,
        takes_weights: bool = False,
    ):
        """`takes_weights`: the model's own arrays may be deleted as they are packed (`pack_model`)."""
        started = time.monotonic()
        self._device = jax.devices()[0]
        self.backends = Backends.choose(config, self._device.platform)
        self._layout = page_layout(
            self.backends.attention,
            model_config.num_kv_heads,
            model_config.head_dim,
            config.page_size,
            config.page_dtype,
        )
        self._num_layers = model_config.num_layers
        packed = pack_model(model, config.weight_format, self.backends.linear, takes_weights=takes_weights)
        self._model = jax.device_put(packed, self._device)
        options = AttentionOptions(scale=attention_scale(model_config))
        self._step = jax.jit(
            make_step(options, self._layout, self.backends.linear), donate_argnums=2, static_argnums=0
        )
        self.buckets = declare_buckets(
            config.min_token_pad,
            config.max_num_batched_tokens,
            config.max_num_seqs,
            skips_padding=self.backends.skips_padding,
        )
        self._batch = BatchBuilder(
            buckets=self.buckets,
            vocab_size=model_config.vocab_size,
            max_num_seqs=config.max_num_seqs,
            max_model_len=max_model_len,
            page_size=config.page_size,
            device=self._device,
            group_costs=group_costs(self.backends.device_keys(self._device)),
        )
        page_bytes = self._layout.page_bytes * self._num_layers
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
            self.num_pages = fit(used_bytes=self._model.num_bytes + self._temporary_bytes(config))
            self._compiled = {bucket: self._compile(bucket, self.num_pages) for bucket in self.buckets}
            self._copier = PageCopier(self._layout, self._num_layers, self.num_pages, config.max_num_seqs)
        self.num_compiled = count.num_compiled
        give_back_freed_memory()
        self._kv_pages = self._empty_pages()
        self.num_computed_tokens = 0
        self.num_padded_tokens = 0
        self.compile_seconds = time.monotonic() - started

    @property
    def device_name(self) -> str:
        """The device and the kernels that run on it, in one line."""
        return f"{self._device.platform}:{self._device.device_kind}, {self.backends.describe()}"

    def dispatch(self, plan: StepPlan, before: InFlight | None) -> InFlight:
        """Start one planned step (with at least one row), without waiting for anything. Rows that share pages
        are put next to each other, so the rows of `InFlight.plan` may have another order.

        before: the step in flight, if there is one: tokens that it draws are read on the device. Steps run
        in the order of their dispatch, each after all that the one before it reads and writes.
        """
        started = time.monotonic()
        plan, branches = self._batch.arrange(plan)
        num_tokens = plan.num_tokens
        bucket = choose_bucket(self.buckets, num_tokens, plan.num_logits)
        arrays, draws = self._batch.build(plan, branches, bucket, before)
        if plan.copies:
            self._kv_pages = self._copier.run(self._kv_pages, plan.copies)
        self._kv_pages, outputs = self._call(bucket, arrays)
        self.num_computed_tokens += num_tokens
        if not self.backends.skips_padding:
            self.num_padded_tokens += bucket.num_tokens - num_tokens
        return InFlight(plan, outputs, draws, started)

    def collect(self, step: InFlight) -> StepResults:
        """Wait for a step's results. What went wrong on the device is raised here."""
        outputs = step.outputs
        if step.draws.any_logprobs:
            outputs = jax.device_get(outputs)
        else:
            outputs = outputs._replace(token_ids=jax.device_get(outputs.token_ids))
        return step_results(step, outputs)

    def _call(self, bucket: Bucket, arrays: StepArrays) -> tuple[Pages, StepOutputs]:
        try:
            return self._compiled[bucket](self._model, self._kv_pages, arrays)
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
        arrays, shape = self._batch.idle_arrays(bucket), self._batch.shape(bucket)
        return self._step.lower(shape, self._model, kv_pages, arrays).compile()

    def _temporary_bytes(self, config: EngineConfig) -> int:
        """Bytes of the largest step's temporaries, where the number of pages depends on them."""
        if config.kv_cache_bytes is not None or self._device.platform == "cpu":
            return 0
        analysis = self._compile(self.buckets[-1], 2 * config.max_num_seqs).memory_analysis()
        return int(analysis.temp_size_in_bytes)
