"""The own run of the benchmark: this engine alone, with what it says about its steps."""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from engine.checkpoints import DEFAULT_MODEL, load_config, load_tokenizer
from jobs.bench.arguments import positive
from jobs.bench.machine import machine_lines, measure_machine
from jobs.bench.measurement import Measurement
from jobs.bench.peers.tidemill import Tidemill
from jobs.bench.processes import OthersMeter
from jobs.bench.report import HEADER, Repeat, repeat_line, report
from jobs.bench.work import flops
from jobs.bench.workloads import SHAPES, make_workload, real_token_ids

# The warm-up's ids come from a seed that no repeat uses.
WARM_UP_SEED = 999_983
MAX_MODEL_LEN = 1024


def add_arguments(made: argparse.ArgumentParser) -> None:
    made.add_argument("--workload", choices=[*SHAPES, "all"], default="all", help="all: W1 and W2")
    made.add_argument("--quick", action="store_true", help="an eighth of the requests")
    made.add_argument("--repeats", type=positive, default=1, help="of each workload")
    made.add_argument("--seed", type=int, default=0, help="of the token ids; each repeat adds one")
    made.add_argument("--model", default=DEFAULT_MODEL, help="what model.source takes")
    made.add_argument("--max-num-seqs", type=positive, default=64)
    made.add_argument("--max-num-batched-tokens", type=positive, default=512)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure what the options ask for, print the table as it grows, and return it all as plain data."""
    machine = measure_machine()
    print("\n".join(machine_lines(machine)), flush=True)
    text_ids = real_token_ids(load_tokenizer(options.model))
    names = ["W1", "W2"] if options.workload == "all" else [options.workload]
    sizes = {
        "max_num_seqs": options.max_num_seqs,
        "max_num_batched_tokens": options.max_num_batched_tokens,
    }
    started = time.perf_counter()
    engine = Tidemill({"model": options.model, "options": {"max_model_len": MAX_MODEL_LEN} | sizes})
    start_seconds = time.perf_counter() - started
    print(f"{engine.about}; started in {start_seconds:.1f} s", flush=True)
    setup: dict[str, Any] = {
        "model": options.model,
        "python": sys.version.split()[0],
        "jax": version("jax"),
        "quick": options.quick,
        "seed": options.seed,
        "start_seconds": start_seconds,
        "compile_seconds": engine.compile_seconds,
    } | sizes
    for name in names:
        warm_up = make_workload(name, text_ids, WARM_UP_SEED, quick=True).part(8)
        engine.measure(warm_up)
    print(HEADER, flush=True)
    repeats: list[Repeat] = []
    for number in range(options.repeats):
        for name in names:
            workload = make_workload(name, text_ids, options.seed + number, options.quick)
            others = OthersMeter(os.getpid())
            measured: Measurement = engine.measure(workload)
            # Other programs' work spoils a measurement, so it is told with it.
            measured = replace(measured, details=measured.details | {"others_cores": others.cores()})
            repeats.append(Repeat(workload, flops(load_config(options.model), workload), measured))
            print(repeat_line(repeats[-1], machine), flush=True)
    return report(machine, setup, repeats)
