"""`python -m jobs.bench growth`: what a row costs as there are more, and a token as its context grows.

Time per row should be flat; time per token may grow by what attention adds in arithmetic and in bytes read.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from engine.checkpoints import DEFAULT_MODEL, load_config
from engine.engine import Engine
from engine.errors import ConfigError
from engine.models.config import ModelConfig
from engine.sampling_params import SamplingParams
from jobs.bench.arguments import positive
from jobs.bench.machine import Machine, machine_lines, measure_machine
from jobs.bench.work import matrix_params

NUM_ROWS = (256, 1024, 4096, 16_384)
ROW_PROMPT_LEN, ROW_NEW_TOKENS = 8, 2
CONTEXTS = (256, 4096)
SHORT_RUN, LONG_RUN = 4, 36
"""New tokens of two runs: what the longer takes longer is the time of the tokens between."""


def add_arguments(made: argparse.ArgumentParser) -> None:
    made.add_argument("--model", default=DEFAULT_MODEL, help="what model.source takes")
    made.add_argument("--max-rows", type=positive, default=NUM_ROWS[-1], help="the most rows that are tried")
    made.add_argument("--context-rows", type=positive, default=8, help="sequences that decode at once")
    made.add_argument("--repeats", type=positive, default=3, help="of each measurement of contexts")
    made.add_argument("--max-num-seqs", type=positive, default=256)
    made.add_argument("--max-num-batched-tokens", type=positive, default=2048)
    made.add_argument("--kv-gib", type=positive, default=3)


def run(options: argparse.Namespace, contexts: Sequence[int] = CONTEXTS) -> dict[str, Any]:
    """Measure both, print as it goes, and return it all as plain data."""
    machine = measure_machine()
    print("\n".join(machine_lines(machine)), flush=True)
    config = load_config(options.model)
    longest = max(contexts) + LONG_RUN
    if longest > config.max_position_embeddings:
        raise ConfigError(
            f"{options.model} was made for {config.max_position_embeddings} tokens, and growth needs "
            f"{longest}: give another --model"
        )
    common = {
        "max_num_batched_tokens": options.max_num_batched_tokens,
        "kv_cache_bytes": options.kv_gib << 30,
    }
    counts = [count for count in NUM_ROWS if count <= options.max_rows] or [options.max_rows]
    rows = _rows(
        Engine.from_pretrained(options.model, max_num_seqs=options.max_num_seqs, max_model_len=64, **common),
        config,
        counts,
    )
    tokens = _contexts(
        Engine.from_pretrained(
            options.model, max_num_seqs=options.context_rows, max_model_len=longest, **common
        ),
        config,
        machine,
        contexts,
        options,
    )
    measured = asdict(machine) | {"busy_processes": list(machine.busy_processes)}
    return {"machine": measured, "rows": rows, "contexts": tokens}


def _prompts(config: ModelConfig, seed: str, count: int, length: int) -> list[list[int]]:
    """Unrelated ones: nothing of them is shared."""
    pick = random.Random(seed)
    return [[pick.randrange(config.vocab_size) for _ in range(length)] for _ in range(count)]


def _rows(engine: Engine, config: ModelConfig, counts: Sequence[int]) -> list[dict[str, float]]:
    sampling = SamplingParams(temperature=0.0, max_tokens=ROW_NEW_TOKENS, ignore_eos=True)
    engine.generate(_prompts(config, "warm-up", 64, ROW_PROMPT_LEN), sampling)
    found: list[dict[str, float]] = []
    for count in counts:
        prompts = _prompts(config, f"rows/{count}", count, ROW_PROMPT_LEN)
        started = time.perf_counter()
        engine.generate(prompts, sampling)
        each = 1000 * (time.perf_counter() - started) / count
        first = found[0]["ms_per_row"] if found else each
        found.append({"rows": count, "ms_per_row": each, "times_the_first": each / first})
        print(
            f"{count:>6} rows of {ROW_PROMPT_LEN} + {ROW_NEW_TOKENS} tokens: {each:.2f} ms a row, "
            f"{found[-1]['times_the_first']:.2f} times the first",
            flush=True,
        )
    return found


def _contexts(
    engine: Engine,
    config: ModelConfig,
    machine: Machine,
    contexts: Sequence[int],
    options: argparse.Namespace,
) -> list[dict[str, float]]:
    found: list[dict[str, float]] = []
    for context in contexts:
        prompts = _prompts(config, f"context/{context}", options.context_rows, context)
        seconds = statistics.median(
            _step_seconds(lambda num, prompts=prompts: _seconds(engine, prompts, num), options.repeats)
        )
        middle = context + (SHORT_RUN + LONG_RUN) // 2
        values = {"context": context, "sequences": options.context_rows, "step_ms": 1000 * seconds}
        values |= step_cost(config, options.context_rows, middle)
        if found:
            first = found[0]
            values["times_the_first"] = seconds * 1000 / first["step_ms"]
            values["flops_times_the_first"] = values["step_flops"] / first["step_flops"]
            values["bytes_times_the_first"] = values["step_bytes"] / first["step_bytes"]
            values["added_ms"] = values["step_ms"] - first["step_ms"]
            added_flops = values["step_flops"] - first["step_flops"]
            added_bytes = values["step_bytes"] - first["step_bytes"]
            values["added_ms_of_flops"] = added_flops / machine.matrix_gflops / 1e6
            values["added_ms_of_bytes"] = added_bytes / machine.memory_gbs / 1e6
        found.append(values)
        line = f"context {context:>5}, {options.context_rows} sequences: {1000 * seconds:.1f} ms a step"
        if len(found) > 1:
            line += (
                f", {values['times_the_first']:.2f} times the first (arithmetic "
                f"{values['flops_times_the_first']:.2f}, bytes {values['bytes_times_the_first']:.2f} times); "
                f"{values['added_ms']:.1f} ms more, where the arithmetic added takes "
                f"{values['added_ms_of_flops']:.1f} and the bytes added {values['added_ms_of_bytes']:.1f} "
                "at the machine's rates"
            )
        print(line, flush=True)
    return found


def _seconds(engine: Engine, prompts: list[list[int]], num_tokens: int) -> float:
    started = time.perf_counter()
    engine.generate(prompts, SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True))
    return time.perf_counter() - started


def _step_seconds(seconds: Callable[[int], float], repeats: int) -> list[float]:
    """Of a decode step: the difference of two runs, whose prompts the first call has left in the cache."""
    seconds(SHORT_RUN)
    return [(seconds(LONG_RUN) - seconds(SHORT_RUN)) / (LONG_RUN - SHORT_RUN) for _ in range(repeats)]


def step_cost(config: ModelConfig, num_sequences: int, context: int) -> dict[str, float]:
    """Operations and bytes read of a float32 decode step: weights once, keys and values of every sequence."""
    weights = matrix_params(config) + config.vocab_size * config.d_model
    per_pair = 4 * config.num_heads * config.head_dim * config.num_layers
    kv_bytes = 2 * config.num_kv_heads * config.head_dim * config.num_layers * 4
    return {
        "step_flops": float(num_sequences * (2 * weights + per_pair * context)),
        "step_bytes": float(4 * weights + num_sequences * context * kv_bytes),
    }
