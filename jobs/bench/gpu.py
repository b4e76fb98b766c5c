"""`python -m jobs.bench gpu`: how near an accelerator's limits a large model's steps come, and how fast the
engine is with it beside transformers' continuous batching.

The model has the sizes of Llama-3.1-8B, random weights and bfloat16. Limits are measured in the same run: the
bytes of a decode step at the rate of a copy, the operations of a prefill step at the rate of a product. The
peer runs in this Python; without torch the table says that it did not run. Ends in one table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from engine.checkpoints import DEFAULT_MODEL, load_config, load_tokenizer
from engine.chips import chip_of, find_slice
from engine.config import EngineConfig
from engine.device_plan import plan_device
from engine.engine import Engine
from engine.errors import ConfigError
from engine.platforms import quieten_libtpu
from engine.roofline import StepLoad
from engine.sampling_params import SamplingParams
from engine.start import load_for
from jobs.bench.arguments import names_of, positive
from jobs.bench.competitors import Launch
from jobs.bench.machine import copied_bytes_per_second, product_operations_per_second
from jobs.bench.peer import PeerProcess
from jobs.bench.random_model import SHAPES, write_checkpoint
from jobs.bench.step_profile import engine_steps
from jobs.bench.workloads import SHAPES as WORKLOADS
from jobs.bench.workloads import make_workload, real_token_ids

TRIES = 5
MAX_MODEL_LEN = 1024  # of the workloads


@dataclass(frozen=True, slots=True)
class Figure:
    """A line of the table. `limit`, in `value`'s unit, may be a peer's; `share` is what of it is reached."""

    name: str
    value: float | None
    unit: str
    limit: float | None = None
    share: float | None = None
    note: str = ""


def as_table(figures: Sequence[Figure]) -> str:
    """In Markdown."""

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:,.2f}" if value < 1000 else f"{value:,.0f}"

    lines = ["| what | measured | limit or peer | of it | |", "| --- | --- | --- | --- | --- |"]
    for each in figures:
        share = "" if each.share is None else f"{each.share:.2f}"
        measured = "not run" if each.value is None else f"{number(each.value)} {each.unit}"
        lines.append(f"| {each.name} | {measured} | {number(each.limit)} | {share} | {each.note} |")
    return "\n".join(lines)


def sizes(batch: int, prefill: int) -> dict[str, Any]:
    """Of an engine whose full steps are decodes of `batch` sequences, or `prefill` tokens of prompts."""
    return {
        "dtype": "bfloat16",
        "max_num_seqs": batch,
        "max_num_batched_tokens": max(prefill, 2 * batch),
        "min_token_pad": min(1024, max(8, batch)),  # few steps to compile
    }


def throughput(
    folder: Path, options: dict[str, Any], workloads: Sequence[str], has_peer: bool
) -> list[Figure]:
    """Output tokens a second of both engines, each in a process of its own that is ended afterwards."""
    tokenizer = load_tokenizer(DEFAULT_MODEL)
    text_ids = real_token_ids(tokenizer)
    launches = {
        "Tidemill": Launch(
            Path(sys.executable), "jobs.bench.peers.tidemill", {}, {"model": str(folder), "options": options}
        )
    }
    if has_peer:
        module = "jobs.bench.peers.continuous"
        launches["transformers"] = Launch(Path(sys.executable), module, {}, {"model": str(folder)})
    rates: dict[tuple[str, str], float] = {}
    about: dict[str, str] = {}
    absent: list[Figure] = []
    for name, launch in launches.items():
        try:
            process = PeerProcess(name, launch)
        except ConfigError as error:
            if name == "Tidemill":
                raise
            absent.append(Figure(f"{name}, output", None, "", note=str(error)))
            continue
        try:
            about[name] = process.about
            for workload in workloads:
                process.prepare(make_workload(workload, text_ids, seed=1, quick=True), None)
                done = process.run(make_workload(workload, text_ids, seed=0))
                rates[name, workload] = sum(map(len, done.token_ids)) / done.seconds
        finally:
            process.close()
    return [
        Figure(
            f"{workload}, output",
            rates["Tidemill", workload],
            "tokens/s",
            peer := rates.get(("transformers", workload)),
            None if peer is None else rates["Tidemill", workload] / peer,
            "; peer: ".join(about.values()),
        )
        for workload in workloads
    ] + absent


def steps(folder: Path, batch: int, context: int, prefill: int) -> list[Figure]:
    """Median times of full decode and prefill steps on JAX's first device, beside what bounds them."""
    is_host = jax.devices()[0].platform == "cpu"
    bandwidth = copied_bytes_per_second((64 if is_host else 1024) << 20)
    rate = product_operations_per_second(512 if is_host else 8192, "bfloat16")
    options = sizes(batch, prefill)
    # The last prompt is in before the first sequence ends, though decodes take their part of every step.
    num_new = -(-batch * context // (options["max_num_batched_tokens"] - batch)) + 32
    longest = max(context + num_new, prefill + 1)
    config = EngineConfig(max_model_len=longest, async_scheduling=False, **options)
    engine = Engine(load_for(config, str(folder)), config)
    chip = chip_of(jax.devices()[0].device_kind)
    # Of the slice only the kind of chip matters here, for how pages lie.
    topology = find_slice("h200-1" if chip is None else f"{chip.name}-{min(chip.slices)}")
    plan = plan_device(load_config(str(folder)), config, topology, engine.max_model_len)
    roofline, pick = plan.roofline(), np.random.default_rng(0)

    def prompts(count: int, length: int) -> list[list[int]]:
        return pick.integers(10, 40_000, (count, length)).tolist()

    _, decode = engine_steps(engine, prompts(batch, context), num_new, (batch, batch))
    load = StepLoad(batch, batch, batch, context + num_new / 2)
    moved = roofline.bytes_moved(load)
    engine.generate(prompts(1, prefill), SamplingParams(temperature=0, max_tokens=1))
    taken = [engine_steps(engine, prompts(1, prefill), 1, (1, prefill))[1] for _ in range(TRIES)]
    whole = statistics.median(taken)
    operations = roofline.flops(StepLoad(prefill, 1, 1, prefill / 2))
    return [
        Figure("copies", bandwidth / 1e9, "GB/s", note=engine.stats().device),
        Figure("products in bfloat16", rate / 1e12, "TFLOP/s"),
        Figure(
            f"decode step, {batch} sequences at {context:,} tokens and more",
            1e3 * decode,
            "ms",
            1e3 * moved / bandwidth,
            moved / bandwidth / decode,
            f"{moved / 1e9:.1f} GB at the rate of copies",
        ),
        Figure(
            f"prefill step, {prefill:,} tokens",
            1e3 * whole,
            "ms",
            1e3 * operations / rate,
            operations / rate / whole,
            f"{operations / 1e12:.1f} TFLOP at the rate of products",
        ),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    made = argparse.ArgumentParser(prog="python -m jobs.bench gpu", description=__doc__)
    made.add_argument("--shape", choices=SHAPES, default="Llama-3.1-8B")
    made.add_argument("--batch", type=positive, default=256, help="sequences that decode at once")
    made.add_argument("--context", type=positive, default=2048, help="tokens that each of them begins with")
    made.add_argument("--prefill", type=positive, default=2048, help="tokens of a prefill step")
    made.add_argument(
        "--workloads",
        type=names_of(list(WORKLOADS)),
        default=("W1", "W2"),
        help=f"of {', '.join(WORKLOADS)}; empty: none",
    )
    made.add_argument("--no-peer", action="store_true", help="leave transformers out")
    made.add_argument("--folder", type=Path, default=Path(".bench-peers/models"), help="for the checkpoint")
    made.add_argument("--json", type=Path, metavar="FILE", help="write everything measured to this file")
    chosen = made.parse_args(arguments)
    quieten_libtpu()
    folder = write_checkpoint(chosen.folder, chosen.shape)
    options = {"max_model_len": MAX_MODEL_LEN} | sizes(chosen.batch, chosen.prefill)
    # Other processes first: from its first use on, JAX keeps most of an accelerator's memory to itself.
    figures = []
    if chosen.workloads:
        figures = throughput(folder, options, chosen.workloads, has_peer=not chosen.no_peer)
    figures = steps(folder, chosen.batch, chosen.context, chosen.prefill) + figures
    print(f"{chosen.shape}, random weights, bfloat16, jax {jax.__version__}\n\n{as_table(figures)}")
    if chosen.json is not None:
        kept = {"shape": chosen.shape, "jax": jax.__version__, "figures": [asdict(each) for each in figures]}
        chosen.json.write_text(json.dumps(kept, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
