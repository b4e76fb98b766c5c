"""`python -m jobs.bench profile`: where the time of a decode step and of a prefill step goes.

By leaving out: the layers are run with attention that gives its queries back, and the head by itself. What
the whole step takes beyond the two is attention (with writing keys and values); what the engine's own step
takes beyond running it is scheduling and text. Draws are measured by themselves, on logits of random tokens:
greedy ones, and ones with a temperature, top-k and top-p.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from engine.backends import Backends
from engine.checkpoints import DEFAULT_MODEL, load
from engine.config import EngineConfig
from engine.engine import Engine
from engine.models.packed import PackedModel, pack_model
from engine.request import request_key
from engine.sampling_params import SamplingParams
from jobs.bench.arguments import positive
from jobs.bench.machine import measure_machine
from jobs.bench.work import matrix_params
from kernels.sampling import Draws, draw

NUM_SEQS, STEP_TOKENS, CONTEXT, TRIES = 256, 512, 360, 9
PREFILL_TOKENS, DECODES = 2048, 64  # so that all prompts are in some steps before the first sequence ends
TEMPERATURE, TOP_K, TOP_P = 0.8, 50, 0.95


def median_seconds(call: Callable[[], Any]) -> float:
    jax.block_until_ready(call())
    taken = []
    for _ in range(TRIES):
        started = time.perf_counter()
        jax.block_until_ready(call())
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def engine_steps(
    engine: Engine, prompts: list[list[int]], num_tokens: int, shape: tuple[int, int]
) -> tuple[float, float]:
    """Median seconds of the engine's steps of `shape` (rows, tokens), and of the device's part of them.

    The engine must run without overlap, so that a step's dispatch and collection lie within one call.
    """
    runner = engine._runner
    dispatch, collect = runner.dispatch, runner.collect
    began: list[float] = []
    kept: list[tuple[float, float]] = []
    shapes: list[tuple[int, int]] = []

    def timed_dispatch(plan: Any, before: Any) -> Any:
        began.append(time.perf_counter())
        shapes.append((plan.num_rows, plan.num_tokens))
        return dispatch(plan, before)

    def timed_collect(step: Any) -> Any:
        results = collect(step)
        began.append(time.perf_counter())
        return results

    sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    for index, prompt in enumerate(prompts):
        engine.add_request(f"profile-{index}", prompt, sampling=sampling)
    runner.dispatch, runner.collect = timed_dispatch, timed_collect  # type: ignore[method-assign]
    try:
        while engine.has_unfinished:
            began.clear()
            shapes.clear()
            started = time.perf_counter()
            engine.step()
            if shapes == [shape]:
                kept.append((time.perf_counter() - started, began[-1] - began[0]))
    finally:
        runner.dispatch, runner.collect = dispatch, collect  # type: ignore[method-assign]
    if not kept:
        raise ValueError(f"no step had {shape[0]} rows and {shape[1]} tokens")
    return statistics.median(w for w, _ in kept), statistics.median(d for _, d in kept)


def draw_seconds(backend: str, logits: jax.Array, sampled: bool) -> float:
    """Median seconds of drawing a token from each row of f32[L, V]."""
    num_rows, vocab_size = logits.shape

    def same(value: float, dtype: Any) -> jax.Array:
        return jnp.full(num_rows, value, dtype)

    keys = jnp.asarray([request_key(0, f"profile-{row}", 0, None) for row in range(num_rows)], jnp.uint32)
    draws = Draws(
        temperature=same(TEMPERATURE if sampled else 0.0, jnp.float32),
        top_k=same(TOP_K if sampled else vocab_size, jnp.int32),
        top_p=same(TOP_P if sampled else 1.0, jnp.float32),
        min_p=same(0.0, jnp.float32),
        keys=keys,
        positions=jnp.arange(num_rows, dtype=jnp.int32),
    )
    call = jax.jit(lambda logits, draws, count: draw(logits, draws, count, backend))
    return median_seconds(lambda: call(logits, draws, jnp.int32(num_rows)))


@jax.jit
def layers_alone(model: PackedModel, token_ids: jax.Array) -> jax.Array:
    """i32[T] -> hidden [T, D], with attention that gives its queries back."""
    hidden, _ = model.forward(token_ids, token_ids, jnp.int32(0), lambda _, q, k, v, pages: (q, pages), None)
    return hidden


@jax.jit
def head_alone(model: PackedModel, hidden: jax.Array) -> jax.Array:
    return jnp.argmax(model.logits(hidden), axis=-1)


class Profile:
    """Measures the steps of one model on one machine."""

    def __init__(self, num_seqs: int):
        self.num_seqs = num_seqs
        self.machine = measure_machine()
        self.loaded = load(DEFAULT_MODEL)
        self.backend = Backends.choose(EngineConfig(), "cpu").linear
        self.packed = pack_model(self.loaded.model, "float32", self.backend)
        self._rng = np.random.default_rng(0)

    def decode(self) -> tuple[str, float]:
        """A line, and the seconds of a whole step."""
        engine = self._engine(PREFILL_TOKENS)
        prompts = self._prompts(self.num_seqs, CONTEXT - DECODES)
        whole, device = engine_steps(engine, prompts, DECODES, (self.num_seqs, self.num_seqs))
        return self._line("decode", self.num_seqs, self.num_seqs, self.num_seqs, whole, device), whole

    def prefill(self) -> str:
        engine = self._engine(STEP_TOKENS)
        engine.generate(self._prompts(1, STEP_TOKENS), SamplingParams(temperature=0, max_tokens=1))
        taken = [
            engine_steps(engine, self._prompts(1, STEP_TOKENS), 1, (1, STEP_TOKENS)) for _ in range(TRIES)
        ]
        whole, device = (statistics.median(column) for column in zip(*taken, strict=True))
        return self._line("prefill", 1, STEP_TOKENS, 16, whole, device)

    def draws(self, decode_seconds: float) -> str:
        """`decode_seconds`: of the step that they are a part of."""
        logits = jax.jit(lambda model, ids: model.logits(layers_alone(model, ids)))(
            self.packed, self._token_ids(self.num_seqs)
        )
        greedy, sampled = (draw_seconds(self.backend, logits, is_sampled) for is_sampled in (False, True))
        return (
            f"draws from {logits.shape[0]} x {logits.shape[1]} logits: greedy {1e3 * greedy:.1f} ms "
            f"({greedy / decode_seconds:.1%} of the decode step), at temperature {TEMPERATURE} with top_k "
            f"{TOP_K} and top_p {TOP_P} {1e3 * sampled:.1f} ms ({sampled / decode_seconds:.1%})"
        )

    def _engine(self, max_num_batched_tokens: int) -> Engine:
        config = EngineConfig(
            max_num_seqs=self.num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=2 * STEP_TOKENS,
            kv_cache_bytes=self._cache_bytes(),
            async_scheduling=False,
        )
        return Engine(self.loaded, config)

    def _cache_bytes(self) -> int:
        """For all sequences at once, their last pages included."""
        config = self.loaded.config
        token_bytes = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 4
        return self.num_seqs * (CONTEXT + EngineConfig().page_size) * token_bytes

    def _prompts(self, count: int, length: int) -> list[list[int]]:
        return self._rng.integers(10, 40_000, (count, length)).tolist()

    def _token_ids(self, count: int) -> jax.Array:
        return jnp.asarray(self._rng.integers(10, 40_000, count), jnp.int32)

    def _line(
        self, name: str, num_rows: int, num_tokens: int, num_logits: int, whole: float, device: float
    ) -> str:
        config = self.loaded.config
        ids = self._token_ids(num_tokens)
        layers = median_seconds(lambda: layers_alone(self.packed, ids))
        hidden = jnp.zeros((num_logits, config.d_model), jnp.float32)
        head = median_seconds(lambda: head_alone(self.packed, hidden))
        layer_flops = 2 * matrix_params(config) * num_tokens
        rate = (layer_flops + 2 * config.vocab_size * config.d_model * num_logits) / whole / 1e9
        return (
            f"{name}: {num_rows} sequences, {num_tokens} tokens: {1e3 * whole:.0f} ms = "
            f"layers' products and norms {1e3 * layers:.0f} ({layer_flops / layers / 1e9:.0f} GFLOP/s), "
            f"head and argmax {1e3 * head:.0f}, attention {1e3 * (device - layers - head):.0f}, "
            f"scheduling and text {1e3 * (whole - device):.1f}; "
            f"products at {rate / self.machine.matrix_gflops:.0%} of the rate"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    made = argparse.ArgumentParser(prog="python -m jobs.bench profile", description=__doc__)
    made.add_argument("--max-num-seqs", type=positive, default=NUM_SEQS, help="sequences that decode at once")
    profile = Profile(made.parse_args(arguments).max_num_seqs)
    machine = profile.machine
    print(f"{machine.cpu}, {machine.num_cores} cores: {machine.matrix_gflops:.0f} GFLOP/s float32 products")
    line, decode_seconds = profile.decode()
    print(line)
    print(profile.prefill())
    print(profile.draws(decode_seconds))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
