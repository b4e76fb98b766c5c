"""The own run's measurements as plain data for JSON, and as a table for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jobs.bench.machine import Machine
from jobs.bench.measurement import Measurement
from jobs.bench.workloads import Workload


@dataclass(frozen=True, slots=True)
class Repeat:
    """One repeat of one workload; `flops` is the work it is when its shared prefix is computed once."""

    workload: Workload
    flops: float
    measured: Measurement


def repeat_values(repeat: Repeat, machine: Machine) -> dict[str, Any]:
    """Everything worth keeping of a repeat; rates are per second of wall time."""
    num_output, seconds = repeat.workload.num_output_tokens, repeat.measured.seconds
    reached = repeat.flops / 1e9 / seconds
    return {
        "num_requests": len(repeat.workload.prompts),
        "num_prompt_tokens": repeat.workload.num_prompt_tokens,
        "num_output_tokens": num_output,
        "gflop": repeat.flops / 1e9,
        repeat.measured.engine: {
            "seconds": seconds,
            "output_tokens_per_second": num_output / seconds,
            "total_tokens_per_second": (repeat.workload.num_prompt_tokens + num_output) / seconds,
            **repeat.measured.details,
            "gflops": reached,
            "matrix_fraction": reached / machine.matrix_gflops,
        },
    }


def report(machine: Machine, setup: dict[str, Any], repeats: Sequence[Repeat]) -> dict[str, Any]:
    """The whole run as plain data."""
    workloads = {
        name: {"repeats": [repeat_values(each, machine) for each in repeats if each.workload.name == name]}
        for name in dict.fromkeys(repeat.workload.name for repeat in repeats)
    }
    measured = asdict(machine) | {"busy_processes": list(machine.busy_processes)}
    return {"machine": measured, "setup": setup, "workloads": workloads}


HEADER = (
    f"{'workload':<10}{'wall s':>9}{'out tok/s':>11}{'all tok/s':>11}"
    f"{'step ms p50':>13}{'p99':>9}{'hit':>7}{'padding':>9}{'of rate':>9}"
)


def repeat_line(repeat: Repeat, machine: Machine) -> str:
    rates = repeat_values(repeat, machine)[repeat.measured.engine]
    step = rates["step_ms"]
    line = (
        f"{repeat.workload.name:<10}{rates['seconds']:>9.1f}{rates['output_tokens_per_second']:>11.1f}"
        f"{rates['total_tokens_per_second']:>11.1f}{step['p50']:>13.0f}{step['p99']:>9.0f}"
        f"{rates['prefix_hit']:>7.0%}{rates['padding']:>9.0%}{rates['matrix_fraction']:>9.0%}"
    )
    if rates["others_cores"] > 0.1:
        line += f"   others used {rates['others_cores']:.1f} cores"
    return line
