"""Measurements as plain data for JSON, and as a table for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jobs.bench.machine import Machine
from jobs.bench.measurement import Measurement, agreement
from jobs.bench.workloads import Workload


@dataclass(frozen=True, slots=True)
class Repeat:
    """One repeat of one workload: ours, and the peer's on the same token ids when there is a peer."""

    workload: Workload
    flops: float
    ours: Measurement
    peer: Measurement | None


def repeat_values(repeat: Repeat, machine: Machine) -> dict[str, Any]:
    """Everything worth keeping of a repeat; rates are per second of wall time."""
    values: dict[str, Any] = {
        "num_requests": len(repeat.workload.prompts),
        "num_prompt_tokens": repeat.workload.num_prompt_tokens,
        "num_output_tokens": repeat.workload.num_output_tokens,
        "gflop": repeat.flops / 1e9,
        repeat.ours.engine: _rates(repeat.workload, repeat.ours),
    }
    reached = repeat.flops / 1e9 / repeat.ours.seconds
    values[repeat.ours.engine] |= {"gflops": reached, "matrix_fraction": reached / machine.matrix_gflops}
    if repeat.peer is not None:
        values[repeat.peer.engine] = _rates(repeat.workload, repeat.peer)
        values["ratio"] = repeat.peer.seconds / repeat.ours.seconds
        values["agreement"] = agreement(repeat.ours, repeat.peer)
    return values


def _rates(workload: Workload, measured: Measurement) -> dict[str, Any]:
    num_output = workload.num_output_tokens
    return {
        "seconds": measured.seconds,
        "output_tokens_per_second": num_output / measured.seconds,
        "total_tokens_per_second": (workload.num_prompt_tokens + num_output) / measured.seconds,
        **measured.details,
    }


def ratio_summary(ratios: Sequence[float]) -> dict[str, float]:
    """How many times faster we were: the median over the repeats, and the least and the most."""
    ordered = sorted(ratios)
    middle = len(ordered) // 2
    median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    return {"median": median, "min": ordered[0], "max": ordered[-1]}


def report(machine: Machine, setup: dict[str, Any], repeats: Sequence[Repeat]) -> dict[str, Any]:
    """The whole run as plain data."""
    workloads: dict[str, Any] = {}
    for name in dict.fromkeys(repeat.workload.name for repeat in repeats):
        values = [repeat_values(repeat, machine) for repeat in repeats if repeat.workload.name == name]
        workloads[name] = {"repeats": values}
        ratios = [entry["ratio"] for entry in values if "ratio" in entry]
        if ratios:
            workloads[name]["ratio"] = ratio_summary(ratios)
    measured = asdict(machine) | {"busy_processes": list(machine.busy_processes)}
    return {"machine": measured, "setup": setup, "workloads": workloads}


def machine_lines(machine: Machine) -> list[str]:
    lines = [
        f"{machine.cpu}, {machine.num_cores} cores ({machine.device}): "
        f"{machine.matrix_gflops:.0f} GFLOP/s float32 products, {machine.memory_gbs:.1f} GB/s read",
    ]
    if machine.load_average > 0.5 or machine.busy_processes:
        busy = "; ".join(machine.busy_processes) or "none that stands out"
        lines.append(
            f"not alone: load average {machine.load_average:.1f} at the start, busy processes: {busy}"
        )
    return lines


HEADER = (
    f"{'workload':<9}{'engine':<14}{'wall s':>9}{'out tok/s':>11}{'all tok/s':>11}"
    f"{'step ms p50':>13}{'p99':>9}{'hit':>7}{'of rate':>9}{'ratio':>8}{'tokens agreed':>15}"
)


def repeat_lines(repeat: Repeat, machine: Machine) -> list[str]:
    """A line for us, and one for the peer."""
    values = repeat_values(repeat, machine)
    lines = []
    for measured in (repeat.ours, repeat.peer):
        if measured is None:
            continue
        rates = values[measured.engine]
        line = (
            f"{repeat.workload.name:<9}{measured.engine:<14}{rates['seconds']:>9.1f}"
            f"{rates['output_tokens_per_second']:>11.1f}{rates['total_tokens_per_second']:>11.1f}"
        )
        if measured is repeat.ours:
            step = rates["step_ms"]
            line += f"{step['p50']:>13.0f}{step['p99']:>9.0f}{rates['prefix_hit']:>7.0%}"
            line += f"{rates['matrix_fraction']:>9.0%}"
        else:
            line += f"{'':>38}{values['ratio']:>7.2f}x{values['agreement']['tokens_agreed']:>15.1%}"
        if rates["others_cores"] > 0.1:
            line += f"   others used {rates['others_cores']:.1f} cores"
        lines.append(line)
    return lines


def ratio_lines(data: dict[str, Any], peer: str) -> list[str]:
    lines = []
    for name, workload in data["workloads"].items():
        if "ratio" in workload:
            ratio = workload["ratio"]
            spread = f"{ratio['min']:.2f} to {ratio['max']:.2f} in {len(workload['repeats'])} repeats"
            lines.append(f"{name}: {ratio['median']:.2f} times the speed of {peer} ({spread})")
    return lines
