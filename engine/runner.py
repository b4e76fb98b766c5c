"""Runs planned steps on the device: compiled ahead of time, pages donated. The only `device_get`."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from engine.backends import Backends
from engine.buckets import Bucket, choose_bucket, declare_buckets
from engine.compilation import counting_compiles
from engine.compiled_steps import CompiledSteps
from engine.config import EngineConfig
from engine.errors import RetraceError
from engine.group_costs import group_costs
from engine.in_flight import InFlight
from engine.memory import give_back_freed_memory, keep_freed_memory, num_pages_that_fit
from engine.models.config import ModelConfig, attention_scale
from engine.models.packed import PackedModel, Wanted
from engine.placement import choose_placement
from engine.plan import StepPlan, StepResults
from engine.sampler import StepOutputs, sample
from engine.step_inputs import StepArrays, StepShape
from engine.weights_update import with_other_arrays
from kernels.paged_attention import AttentionOptions, PageLayout, Pages, attend, page_layout

if TYPE_CHECKING:
    from engine.lockstep import Lockstep

_LOG = logging.getLogger("engine.runner")


def make_step(
    options: AttentionOptions, layout: PageLayout, sampling_backend: str, sample: Any = sample
) -> Any:
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

        wanted = Wanted(inputs.logit_tokens, inputs.sampling.num_rows)
        hidden, kv_pages = model.forward(
            inputs.token_ids, inputs.positions, kv_pages, attend_layer, num_tokens, wanted
        )
        logits = model.logits(hidden, wanted.count)
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
        self._place = choose_placement(config, model_config)
        self._device = self._place.device
        self._is_ahead_of_time, self._is_verbose = config.use_aot_forward, config.runner_verbose
        self.backends = Backends.choose(config, self._device.platform)
        self._layout = page_layout(
            self.backends.attention,
            self._place.local_config.num_kv_heads,
            model_config.head_dim,
            config.page_size,
            config.page_dtype,
        )
        self._num_layers = model_config.num_layers
        self._saved = CompiledSteps(
            config.compiled_steps_path, self._place.devices, is_trusted=config.compiled_steps_trusted
        )
        self._model = self._place.pack(model, self.backends.linear, takes_weights=takes_weights)
        options = AttentionOptions(scale=attention_scale(model_config))
        self._step = self._place.jit_step(
            make_step(options, self._layout, self.backends.linear, self._place.sample)
        )
        self._facts = {
            "model": repr(model_config),
            "dtypes": [config.dtype, config.weight_format, config.page_dtype],
            "kernels": list(self.backends),
            "attention": repr((options, self._layout)),
            "mesh": self._place.description,
        }
        self.buckets = declare_buckets(
            config.min_token_pad,
            config.max_num_batched_tokens,
            config.max_num_seqs + config.num_draft_logits,
            min_input_pad=config.min_input_pad,
            skips_padding=self.backends.skips_padding,
        )
        self._batch = self._place.make_batch(
            buckets=self.buckets,
            vocab_size=model_config.vocab_size,
            max_num_seqs=config.max_num_seqs,
            max_model_len=max_model_len,
            page_size=config.page_size,
            group_costs=group_costs(self.backends.device_keys(self._device)),
        )
        page_bytes = self._layout.page_bytes * self._num_layers
        fit = partial(
            num_pages_that_fit,
            config,
            device=self._device,
            page_bytes=page_bytes,
            max_model_len=max_model_len,
            num_sharing=self._place.num_sharing,
        )
        self.num_compiled = self.num_loaded = 0
        self.compile_seconds = 0.0
        self._compiled: dict[Bucket, Any] = {}
        with self._compiling():
            # The largest step's temporaries decide how many pages fit, and its code depends on that number:
            # so it is compiled for a few pages first where the device bounds memory.
            fitting = fit(used_bytes=self._model.num_bytes + self._temporary_bytes(config))
            self.num_pages = self._place.agree(fitting)
            if config.compile_runner and self._is_ahead_of_time:
                self._compiled = {bucket: self._new_step(bucket) for bucket in self.buckets}
            self._copier = self._place.make_copier(
                self._layout, self._num_layers, self.num_pages, config.max_num_seqs, self._saved
            )
        give_back_freed_memory()
        if self._device.platform == "cpu":
            keep_freed_memory()
        self._kv_pages: Any = None
        self.make_pages()
        if config.compile_runner and not self._is_ahead_of_time:
            for bucket in self.buckets:  # `jax.jit` compiles what it runs: a step of no rows
                self._kv_pages, _ = self._call(bucket, self._batch.idle_arrays(bucket))
        self.num_computed_tokens = 0
        self.num_padded_tokens = 0
        self.compile_seconds = time.monotonic() - started

    @property
    def device_name(self) -> str:
        """The device and the kernels that run on it, in one line."""
        device, mesh = self._device, self._place.description
        return f"{device.platform}:{device.device_kind}{mesh}, {self.backends.describe()}"

    @property
    def model_dtype(self) -> str:
        """What the model was loaded as: of its activations."""
        return self._model.dtype

    @property
    def num_replicas(self) -> int | None:
        """Schedulers whose plans a step takes, as `ReplicaPlans`; None: it takes one's as it is."""
        return self._place.num_replicas if self._place.is_mesh else None

    def dispatch(self, plan: StepPlan, before: InFlight | None) -> InFlight:
        """Start one planned step (with at least one row), without waiting for anything. Rows that share pages
        are put next to each other, so the rows of `InFlight.plan` may have another order.

        before: the step in flight, if there is one: tokens that it draws are read on the device. Steps run
        in the order of their dispatch, each after all that the one before it reads and writes.
        """
        started = time.monotonic()
        plan, branches = self._batch.arrange(plan)
        num_tokens = plan.num_tokens
        bucket = choose_bucket(self.buckets, *plan.size)
        if self._is_verbose:
            _LOG.info("%d tokens, %d rows, in the step of %s", num_tokens, plan.num_rows, tuple(bucket))
        arrays, draws = self._batch.build(plan, branches, bucket, before)
        outputs = self._run(bucket, plan.copies, arrays)
        self.num_computed_tokens += num_tokens
        if not self.backends.skips_padding:
            self.num_padded_tokens += bucket.num_tokens * self._place.num_replicas - num_tokens
        return InFlight(plan, outputs, draws, started)

    def collect(self, step: InFlight) -> StepResults:
        """Wait for a step's results. What went wrong on the device is raised here."""
        outputs = step.outputs
        if step.draws.any_logprobs:
            outputs = jax.device_get(outputs)
        else:
            outputs = outputs._replace(token_ids=jax.device_get(outputs.token_ids))
        return self._batch.results(step, outputs)

    def make_pages(self) -> None:
        """Have the memory of the KV pages, holding nothing."""
        if self._kv_pages is None:
            self._kv_pages = self._place.empty_pages(self._layout, self._num_layers * self.num_pages)

    def drop_pages(self) -> None:
        """Give the memory of the KV pages back to the device. No step may be in flight."""
        self._kv_pages = None
        give_back_freed_memory()

    def replace_weights(self, model: Any, *, takes_weights: bool = False) -> None:
        """Run other weights of the same shapes from the next step on; nothing is compiled.

        model: a `Llama` or `StoredWeights`, of the model's config. Raises ModelError, changing nothing, for
            what the compiled steps were not made for.
        """
        packed = self._place.pack(model, self.backends.linear, takes_weights=takes_weights)
        self._model = with_other_arrays(self._model, packed)

    def lead(self, lockstep: Lockstep) -> None:
        """Tell the other processes of each step from here on."""
        self._batch.announce = lockstep.send

    def follow(self, lockstep: Lockstep) -> None:
        """Run the steps of process 0 until it has no more."""
        drawn = None
        for step in lockstep.steps():
            outputs = self._run(step.bucket, step.copies, self._batch.arrays(step, drawn))
            # Not further ahead than process 0 is, and what went wrong is raised.
            jax.block_until_ready(drawn)
            drawn = outputs.token_ids

    def _run(self, bucket: Bucket, copies: Any, arrays: StepArrays) -> StepOutputs:
        """Start the device's part of a step: its page copies, then the compiled step."""
        if copies:
            self._kv_pages = self._copier.run(self._kv_pages, copies)
        self._kv_pages, outputs = self._call(bucket, arrays)
        return outputs

    def _call(self, bucket: Bucket, arrays: StepArrays) -> tuple[Pages, StepOutputs]:
        if bucket not in self._compiled:  # steps are compiled when they first run
            with self._compiling():
                self._compiled[bucket] = self._new_step(bucket)
                return self._call(bucket, arrays)
        try:
            return self._compiled[bucket](self._model, self._kv_pages, arrays)
        except TypeError as error:
            # A compiled step takes exactly the shapes it was compiled for and its message names the argument.
            raise RetraceError(
                f"the step of {bucket.num_tokens} tokens and {bucket.num_logits} logits was given arguments "
                f"it was not compiled for: {error}"
            ) from error

    @contextmanager
    def _compiling(self) -> Iterator[None]:
        """Count what is compiled inside the block, and the time."""
        started, num_saved = time.monotonic(), self._saved.num_compiled
        with counting_compiles() as count:
            yield
        self.num_compiled += count.num_compiled + self._saved.num_compiled - num_saved
        self.num_loaded = self._saved.num_loaded
        self.compile_seconds += time.monotonic() - started

    def _new_step(self, bucket: Bucket) -> Any:
        """What runs a declared step: (model, kv_pages, arrays) -> (kv_pages, outputs)."""
        if self._is_ahead_of_time:
            return self._compile(bucket, self.num_pages)
        return partial(self._step, self._batch.shape(bucket))

    def _compile(self, bucket: Bucket, num_pages: int) -> Any:
        if self._is_verbose:
            _LOG.info("compiling the step of %d tokens and %d logits", *bucket)
        kv_pages = self._place.abstract_pages(self._layout, self._num_layers * num_pages)
        arrays, shape = self._batch.idle_arrays(bucket), self._batch.shape(bucket)
        arguments = (self._model, kv_pages, arrays)
        return self._saved.compile(
            f"step-{bucket.num_tokens}-{bucket.num_logits}",
            partial(self._step.lower, shape, *arguments),
            arguments,
            (kv_pages, StepOutputs._make(StepOutputs._fields)),
            self._facts | {"shape": list(shape)},
        )

    def _temporary_bytes(self, config: EngineConfig) -> int:
        """Bytes of the largest step's temporaries, where the number of pages depends on them."""
        if config.kv_cache_bytes is not None or self._device.platform == "cpu":
            return 0
        analysis = self._compile(self.buckets[-1], 2 * config.max_num_seqs).memory_analysis()
        return int(analysis.temp_size_in_bytes)
