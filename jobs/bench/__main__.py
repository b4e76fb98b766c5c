"""`python -m jobs.bench`: how fast the engine is on this machine, and beside a peer.

A ratio above 1 means that we took less time than the peer for the same token ids.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from engine.checkpoints import load_tokenizer
from engine.errors import TidemillError
from jobs.bench.machine import OthersMeter, measure_machine
from jobs.bench.measurement import Measurement
from jobs.bench.peer import EMBEDDED, PeerProcess
from jobs.bench.report import HEADER, Repeat, machine_lines, ratio_lines, repeat_lines, report
from jobs.bench.tidemill import TidemillRunner
from jobs.bench.work import flops
from jobs.bench.workloads import WORKLOADS, Workload, make_workload, real_text

# The warm-up's ids come from a seed that no repeat uses.
WARM_UP_SEED = 999_983
MAX_MODEL_LEN = 1024


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m jobs.bench", description=__doc__)
    made.add_argument("--workload", choices=[*WORKLOADS, "all"], default="all")
    made.add_argument("--quick", action="store_true", help="an eighth of the requests")
    made.add_argument(
        "--repeats", type=_positive, default=1, help="of each workload, alternating with the peer"
    )
    made.add_argument("--seed", type=int, default=0, help="of the token ids; each repeat adds one")
    made.add_argument("--model", default=EMBEDDED, help="what model.source takes")
    made.add_argument("--max-num-seqs", type=_positive, default=64)
    made.add_argument("--max-num-batched-tokens", type=_positive, default=512)
    made.add_argument("--peer", choices=["transformers"], help="run this on the same token ids too")
    made.add_argument("--peer-python", default=sys.executable, help="the Python of the peer's environment")
    made.add_argument(
        "--peer-threads", type=_positive, default=len(os.sched_getaffinity(0)), help="default: all cores"
    )
    made.add_argument("--json", type=Path, metavar="FILE", help="write everything measured to this file")
    return made


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not 1 or more")
    return value


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure what the options ask for, print the table as it grows, and return it all as plain data."""
    machine = measure_machine()
    print("\n".join(machine_lines(machine)), flush=True)
    text_ids = load_tokenizer(options.model)(real_text(), add_special_tokens=False, verbose=False)[
        "input_ids"
    ]
    names = list(WORKLOADS) if options.workload == "all" else [options.workload]
    repeats: list[Repeat] = []
    with ExitStack() as stack:
        ours = TidemillRunner(
            options.model,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
        )
        print(
            f"tidemill started in {ours.start_seconds:.1f} s, compiling {ours.compile_seconds:.1f} s of it",
            flush=True,
        )
        setup: dict[str, Any] = {
            "model": options.model,
            "python": sys.version.split()[0],
            "jax": version("jax"),
            "quick": options.quick,
            "seed": options.seed,
            "max_num_seqs": options.max_num_seqs,
            "max_num_batched_tokens": options.max_num_batched_tokens,
            "start_seconds": ours.start_seconds,
            "compile_seconds": ours.compile_seconds,
        }
        peer = None
        if options.peer is not None:
            peer = stack.enter_context(
                closing(PeerProcess(options.peer, options.peer_python, options.model, options.peer_threads))
            )
            setup["peer"] = {"about": peer.about, "search": {}}
            print(peer.about, flush=True)
        for name in names:
            warm_up = make_workload(name, text_ids, WARM_UP_SEED, quick=True)
            ours.run(warm_up.part(8))
            if peer is not None:
                found = peer.search(make_workload(name, text_ids, WARM_UP_SEED, options.quick))
                setup["peer"]["search"][name] = found
                print(f"{name}: {peer.name} is fastest with {found['plan']}", flush=True)
        print(HEADER, flush=True)
        for number in range(options.repeats):
            for name in names:
                workload = make_workload(name, text_ids, options.seed + number, options.quick)
                repeat = Repeat(
                    workload,
                    flops(ours.engine.loaded.config, workload),
                    _watched(ours.run, workload, os.getpid()),
                    None if peer is None else _watched(peer.run, workload, os.getpid(), peer.pid),
                )
                repeats.append(repeat)
                print("\n".join(repeat_lines(repeat, machine)), flush=True)
    data = report(machine, setup, repeats)
    print("\n".join(ratio_lines(data, options.peer or "")))
    return data


def _watched(
    engine_run: Callable[[Workload], Measurement], workload: Workload, *own_pids: int
) -> Measurement:
    """The measurement, with how many cores other programs used meanwhile: they spoil it."""
    others = OthersMeter(*own_pids)
    measured = engine_run(workload)
    return replace(measured, details=measured.details | {"others_cores": others.cores()})


def main() -> int:
    options = parser().parse_args()
    try:
        data = run(options)
    except TidemillError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json is not None:
        options.json.write_text(json.dumps(data, indent=1) + "\n")
        print(f"written to {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
