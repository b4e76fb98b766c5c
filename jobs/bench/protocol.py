"""How a comparison is run: A B A B, each run in a process of its own, none beside other work."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from engine.errors import ConfigError
from jobs.bench.measurement import Measurement
from jobs.bench.processes import OthersMeter, busy_processes
from jobs.bench.workloads import Workload


class BusyMachine(ConfigError):
    """Others used the machine during every try of a run, so nothing can be said of it."""


class Started(Protocol):
    """A competitor that is ready for its first request."""

    start_seconds: float

    @property
    def pid(self) -> int: ...

    def prepare(self, workload: Workload, plan: dict[str, Any] | None) -> dict[str, Any]: ...

    def run(self, workload: Workload) -> Measurement: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Entrant:
    """A competitor as the protocol sees it: how it is started, and the share of a workload's rows it runs."""

    name: str
    share: float
    start: Callable[[], Started]


@dataclass(frozen=True, slots=True)
class Run:
    """One measured run. `rows` is the part of the repeat's workload that was run, from its first row on."""

    name: str
    repeat: int
    rows: int
    start_seconds: float
    others_cores: float
    thrown_away: int
    measured: Measurement

    @property
    def num_output_tokens(self) -> int:
        return sum(map(len, self.measured.token_ids))

    @property
    def tokens_per_second(self) -> float:
        return self.num_output_tokens / self.measured.seconds


@dataclass(frozen=True, slots=True)
class Rules:
    """`max_others_cores` is how many cores other programs may use on average; a run beside more is thrown
    away and repeated, at most `max_retries` times."""

    repeats: int
    max_others_cores: float
    max_retries: int


def alternate(
    entrants: Sequence[Entrant],
    workloads: Sequence[Workload],
    warm_up: Workload,
    rules: Rules,
    say: Callable[[str], None] = print,
) -> list[Run]:
    """Run every repeat's workload on every entrant, in the order A B A B.

    Each run has a process of its own, so that start time and peak memory are of it alone and no cache holds
    anything of another run. Raises BusyMachine, naming who was busy.
    """
    plans: dict[str, dict[str, Any]] = {}
    runs = []
    for repeat, workload in enumerate(workloads):
        for entrant in entrants:
            rows = max(1, round(entrant.share * len(workload.prompts)))
            run = _quiet_run(entrant, repeat, workload.part(rows), warm_up, plans, rules, say)
            runs.append(run)
            say(
                f"{workload.name} repeat {repeat + 1} {entrant.name}: {run.tokens_per_second:.1f} tokens/s, "
                f"{run.measured.seconds:.1f} s for {rows} of {len(workload.prompts)} rows, started in "
                f"{run.start_seconds:.1f} s"
            )
    return runs


def _quiet_run(
    entrant: Entrant,
    repeat: int,
    workload: Workload,
    warm_up: Workload,
    plans: dict[str, dict[str, Any]],
    rules: Rules,
    say: Callable[[str], None],
) -> Run:
    for thrown_away in range(rules.max_retries + 1):
        started = entrant.start()
        try:
            plans[entrant.name] = started.prepare(warm_up, plans.get(entrant.name))
            others = OthersMeter(os.getpid(), started.pid)
            measured = started.run(workload)
            others_cores = others.cores()
        finally:
            started.close()
        if others_cores <= rules.max_others_cores:
            return Run(
                entrant.name,
                repeat,
                len(workload.prompts),
                started.start_seconds,
                others_cores,
                thrown_away,
                measured,
            )
        busy = "; ".join(busy_processes(share=0.05)) or "none that still is"
        say(
            f"{workload.name} {entrant.name}: thrown away, others used {others_cores:.2f} cores, more than "
            f"{rules.max_others_cores}; busy now: {busy}"
        )
    raise BusyMachine(
        f"the machine was busy in all {rules.max_retries + 1} runs of {workload.name} on {entrant.name} "
        f"(others used {others_cores:.2f} cores in the last; busy now: {busy}): end what else runs, or "
        "allow more with --max-others-cores"
    )
