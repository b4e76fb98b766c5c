"""`python -m jobs.bench profile`: where the time of a decode step and of a prefill step goes.

By leaving out: the layers are run with attention that gives its queries back, and the head by itself. What
the whole step takes beyond the two is attention (with writing keys and values); what the engine's own step
takes beyond running it is scheduling and text.
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
from engine.sampling_params import SamplingParams
from jobs.bench.machine import measure_machine
from jobs.bench.work import matrix_params

NUM_SEQS, STEP_TOKENS, CONTEXT, TRIES = 64, 512, 340, 9


def median_seconds(call: Callable[[], Any]) -> float:
    jax.block_until_ready(call())
    taken = []
    for _ in range(TRIES):
        started = time.perf_counter()
        jax.block_until_ready(call())
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def engine_steps(engine: Engine, prompts: list[list[int]], num_tokens: int) -> tuple[float, float]:
    """Median seconds of the engine's full steps, and of the device's part of them.

    The engine must run without overlap, so that a step's dispatch and collection lie within one call.
    """
    runner = engine._runner
    dispatch, collect = runner.dispatch, runner.collect
    began: list[float] = []
    steps: list[tuple[float, float, int]] = []
    rows: list[int] = []

    def timed_dispatch(plan: Any, before: Any) -> Any:
        began.append(time.perf_counter())
        rows.append(len(plan.rows))
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
            rows.clear()
            started = time.perf_counter()
            engine.step()
            if rows:
                steps.append((time.perf_counter() - started, began[-1] - began[0], rows[0]))
    finally:
        runner.dispatch, runner.collect = dispatch, collect  # type: ignore[method-assign]
    full = max(num_rows for _, _, num_rows in steps)
    kept = [(whole, device) for whole, device, num_rows in steps if num_rows == full]
    kept = kept[len(kept) // 2 :]  # the first full ones still hold prefill chunks
    return statistics.median(w for w, _ in kept), statistics.median(d for _, d in kept)


def main(arguments: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(prog="python -m jobs.bench profile", description=__doc__).parse_args(arguments)
    machine = measure_machine()
    loaded = load(DEFAULT_MODEL)
    packed = pack_model(loaded.model, "float32", Backends.choose(EngineConfig(), "cpu").linear)
    rng = np.random.default_rng(0)
    print(f"{machine.cpu}, {machine.num_cores} cores: {machine.matrix_gflops:.0f} GFLOP/s float32 products")

    @jax.jit
    def layers_alone(model: PackedModel, token_ids: jax.Array) -> jax.Array:
        hidden, _ = model.forward(
            token_ids, token_ids, jnp.int32(0), lambda _, q, k, v, pages: (q, pages), None
        )
        return hidden

    @jax.jit
    def head_alone(model: PackedModel, hidden: jax.Array) -> jax.Array:
        return jnp.argmax(model.logits(hidden), axis=-1)

    def prompts(count: int, length: int) -> list[list[int]]:
        return rng.integers(10, 40_000, (count, length)).tolist()

    for name, num_rows, num_tokens, num_logits in (
        ("decode", NUM_SEQS, NUM_SEQS, NUM_SEQS),
        ("prefill", 1, STEP_TOKENS, 16),
    ):
        engine = Engine(
            loaded,
            EngineConfig(
                max_num_seqs=NUM_SEQS,
                max_num_batched_tokens=STEP_TOKENS,
                max_model_len=2 * STEP_TOKENS,
                async_scheduling=False,
            ),
        )
        if name == "decode":
            whole, device = engine_steps(engine, prompts(num_rows, CONTEXT - 24), 48)
        else:
            engine.generate(prompts(1, STEP_TOKENS), SamplingParams(temperature=0, max_tokens=1))
            taken = [engine_steps(engine, prompts(1, STEP_TOKENS), 1) for _ in range(TRIES)]
            whole, device = (statistics.median(column) for column in zip(*taken, strict=True))
        ids = jnp.asarray(rng.integers(10, 40_000, num_tokens), jnp.int32)
        layers = median_seconds(lambda ids=ids: layers_alone(packed, ids))
        hidden = jnp.zeros((num_logits, loaded.config.d_model), jnp.float32)
        head = median_seconds(lambda hidden=hidden: head_alone(packed, hidden))
        head_params = loaded.config.vocab_size * loaded.config.d_model
        layer_flops = 2 * matrix_params(loaded.config) * num_tokens
        rate = (layer_flops + 2 * head_params * num_logits) / whole / 1e9
        print(
            f"{name}: {num_rows} sequences, {num_tokens} tokens: {1e3 * whole:.0f} ms = "
            f"layers' products and norms {1e3 * layers:.0f} ({layer_flops / layers / 1e9:.0f} GFLOP/s), "
            f"head and argmax {1e3 * head:.0f}, attention {1e3 * (device - layers - head):.0f}, "
            f"scheduling and text {1e3 * (whole - device):.1f}; "
            f"products at {rate / machine.matrix_gflops:.0%} of the rate"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
