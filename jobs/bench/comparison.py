"""What a comparison found: as plain data, as a table for people, and as a picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jobs.bench.competitors import REFERENCE, Competitor
from jobs.bench.machine import Machine, machine_lines
from jobs.bench.measurement import percentiles
from jobs.bench.near_ties import (
    MAX_JUDGED,
    NEAR_TIE,
    Agreement,
    Difference,
    Logits,
    compare_tokens,
    judge,
    together,
)
from jobs.bench.picture import draw
from jobs.bench.protocol import Run
from jobs.bench.workloads import Workload

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Spread:
    """Of the repeats: the median, the least and the most."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def text(self, digits: int = 2) -> str:
        if self.min == self.max:
            return f"{self.median:.{digits}f}"
        return f"{self.median:.{digits}f} ({self.min:.{digits}f} to {self.max:.{digits}f})"


@dataclass(frozen=True, slots=True)
class Comparison:
    """`data` is everything as plain data; `table` is Markdown."""

    data: dict[str, Any]
    table: str

    def write(self, folder: Path) -> list[Path]:
        """comparison.json, comparison.md and comparison.png in `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"comparison.{suffix}" for suffix in ("json", "md", "png")]
        paths[0].write_text(json.dumps(self.data, indent=1) + "\n")
        paths[1].write_text(self.table)
        draw(self.data, paths[2])
        return paths


def build_comparison(
    machine: Machine, setup: dict[str, Any], found: Mapping[str, dict[str, Any]]
) -> Comparison:
    """`found` is what `workload_values` gave, by workload."""
    measured = asdict(machine) | {"busy_processes": list(machine.busy_processes)}
    data = {"machine": measured, "setup": setup, "workloads": dict(found)}
    return Comparison(data, _table(machine, data))


def workload_values(
    competitors: Sequence[Competitor],
    repeats: Sequence[Workload],
    runs: Sequence[Run],
    load_logits: Callable[[], Logits],
) -> dict[str, Any]:
    """All that was found of one workload.

    `load_logits` makes the judge of differing tokens; it is called only when there is something to judge.
    """
    by_engine = {each.name: [run for run in runs if run.name == each.name] for each in competitors}
    engines = {each.name: _engine_values(each, by_engine[each.name], repeats) for each in competitors}
    reference = _reference(competitors) if repeats[0].is_fixed else None
    for each in competitors:
        if reference is not None and each.name != reference:
            agreement, differences = _agreement(repeats, by_engine[each.name], by_engine[reference])
            if differences:
                agreement = judge(agreement, differences, load_logits())
            engines[each.name]["agreement"] = asdict(agreement) | {
                "gaps": list(agreement.gaps),
                "near_ties": agreement.num_near_ties,
                "is_right": agreement.is_right,
            }
    return {
        "rows": len(repeats[0].prompts),
        "prompt_tokens": [workload.num_prompt_tokens for workload in repeats],
        "is_fixed": repeats[0].is_fixed,
        "reference": reference,
        "engines": engines,
        "ratios": {
            ours.name: {
                peer.name: asdict(_ratio(by_engine[ours.name], by_engine[peer.name]))
                for peer in competitors
                if not peer.is_ours
            }
            for ours in competitors
            if ours.is_ours
        },
    }


def _reference(competitors: Sequence[Competitor]) -> str | None:
    """Whose greedy tokens the others' are compared with: transformers', or else our own in float32."""
    names = [each.name for each in competitors]
    return next((name for name in (REFERENCE, "tidemill-f32") if name in names), None)


def _ratio(ours: Sequence[Run], peers: Sequence[Run]) -> Spread:
    """How many times a peer's rate ours is, repeat by repeat."""
    return Spread.of([a.tokens_per_second / b.tokens_per_second for a, b in zip(ours, peers, strict=True)])


def _engine_values(
    competitor: Competitor, runs: Sequence[Run], repeats: Sequence[Workload]
) -> dict[str, Any]:
    each = []
    for run in runs:
        each.append(
            {
                "repeat": run.repeat,
                "rows": run.rows,
                "seconds": run.measured.seconds,
                "output_tokens": run.num_output_tokens,
                "tokens_per_second": run.tokens_per_second,
                "rows_per_second": run.rows / run.measured.seconds,
                "start_seconds": run.start_seconds,
                "others_cores": run.others_cores,
                "thrown_away": run.thrown_away,
                **run.measured.details,
            }
        )
    values: dict[str, Any] = {
        "precision": competitor.precision,
        "share_of_rows": runs[0].rows / len(repeats[0].prompts),
        "runs": each,
    }
    for key in ("tokens_per_second", "rows_per_second", "start_seconds", "peak_memory_bytes"):
        values[key] = asdict(Spread.of([entry[key] for entry in each]))
    lens = [len(ids) for run in runs for ids in run.measured.token_ids]
    values["output_lens"] = {"mean": statistics.fmean(lens)} | percentiles([float(one) for one in lens])
    return values


def _agreement(
    repeats: Sequence[Workload], runs: Sequence[Run], reference: Sequence[Run]
) -> tuple[Agreement, list[Difference]]:
    parts: list[Agreement] = []
    differences: list[Difference] = []
    for workload, run, right in zip(repeats, runs, reference, strict=True):
        part, found = compare_tokens(workload.prompts, run.measured.token_ids, right.measured.token_ids)
        parts.append(part)
        differences += found
    return together(parts), differences


def _table(machine: Machine, data: dict[str, Any]) -> str:
    setup = data["setup"]
    lines = [*machine_lines(machine), ""]
    lines += [f"`{setup['command']}`", ""]
    for name, workload in data["workloads"].items():
        ours = list(workload["ratios"])
        heads = ["engine", "precision", "rows", "tokens/s", *(f"{one} against it" for one in ours)]
        heads += ["ready after s", "peak memory GiB", "greedy tokens"]
        lines += [f"## {name}", "", _row(heads), _row(["---"] * len(heads))]
        for engine, values in workload["engines"].items():
            ratios = [workload["ratios"][one].get(engine) for one in ours]
            share = values["share_of_rows"]
            lines.append(
                _row(
                    [
                        engine,
                        values["precision"],
                        "all" if share == 1 else f"{share:.0%} of them",
                        Spread(**values["tokens_per_second"]).text(1),
                        *("" if ratio is None else Spread(**ratio).text() for ratio in ratios),
                        Spread(**values["start_seconds"]).text(1),
                        f"{values['peak_memory_bytes']['max'] / GIB:.2f}",
                        _agreement_text(engine, workload, values.get("agreement")),
                    ]
                )
            )
        lines.append("")
        if not workload["is_fixed"]:
            lines += [*_length_lines(workload), ""]
    lines += [
        f"A value is the median of {setup['rules']['repeats']} alternating repeats (least to most), a ratio "
        "one of output tokens a second in the same repeat, on the same token ids. Ready is from the start of "
        "the process to its being ready for the first request, compiling or reading back what is compiled "
        "included. Peak memory is the sum of all its processes' peaks. Greedy tokens: how many rows equal "
        "the reference's; a near tie is a first difference where float32 logits are closer than "
        f"{NEAR_TIE:g} (at most {MAX_JUDGED} are judged).",
        "",
    ]
    lines += [f"- {name}: {about}" for name, about in setup["about"].items()]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _agreement_text(engine: str, workload: dict[str, Any], agreement: dict[str, Any] | None) -> str:
    if not workload["is_fixed"]:
        return "sampled"
    if engine == workload["reference"]:
        return "the reference"
    if agreement is None:
        return ""
    rows, differ = agreement["num_rows"], agreement["num_rows"] - agreement["num_equal"]
    if not differ:
        return f"all {rows} rows equal"
    judged = len(agreement["gaps"])
    share = agreement["num_agreed"] / agreement["num_tokens"]
    return (
        f"{agreement['num_equal']} of {rows} rows equal, {share:.1%} of tokens; "
        f"{agreement['near_ties']} of {judged} differences judged are near ties"
    )


def _length_lines(workload: dict[str, Any]) -> list[str]:
    """What a sampled workload needs beside its rates: it is not the same work for everyone."""
    lines = []
    for engine, values in workload["engines"].items():
        lens = values["output_lens"]
        lines.append(
            f"- {engine}: {Spread(**values['rows_per_second']).text()} rows/s; new tokens of a sample: mean "
            f"{lens['mean']:.1f}, p50 {lens['p50']:.0f}, p90 {lens['p90']:.0f}, most {lens['max']:.0f}"
        )
    return lines
