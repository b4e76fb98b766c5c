"""Reads the instruction schedule that libtpu wrote down for a kernel.

One bundle is one issue cycle. This is a static count: it knows nothing of waits for memory, and code that
runs under a condition is counted as if it always ran.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

# An empty bundle does not show which loops it is in.
_BUNDLE = re.compile(r"^ *(?:0x)?[0-9a-f]+ +(LH|LB|LE|PB|PF|CT)?: +(>*) *\{(.*)")
_EMPTY = re.compile(r"^ *0x[0-9a-f]+ +: +\{\}")


@dataclass(frozen=True, slots=True)
class Loop:
    """One loop's body with the loops inside it. Counts are of bundles unless they say slots."""

    depth: int
    num_bundles: int
    slots_used: dict[str, int]
    """Instructions of each unit."""
    bundles_used: dict[str, int]
    """Bundles in which a unit has any."""
    num_dma: int
    """Instructions that start or await a copy."""
    inner: tuple[Loop, ...]

    @property
    def num_spills(self) -> int:
        """Vector registers that are put aside in memory and fetched back."""
        return self.slots_used["VLOAD:FILL"] + self.slots_used["VSTORE:SPILL"]

    def cycles(self, copies: int) -> int:
        """Bundles of one turn in which each inner loop that moves pages takes `copies` turns."""
        return self.num_bundles + sum((copies - 1) * loop.num_bundles for loop in self.inner if loop.num_dma)


@dataclass(frozen=True, slots=True)
class Schedule:
    capacity: dict[str, int]
    """How many instructions of each unit a bundle holds."""
    num_bundles: int
    loops: tuple[Loop, ...]
    """The outermost ones."""

    def matrix_loops(self) -> list[Loop]:
        """The innermost loops that use the matrix unit, in the order of the code."""
        return [found for loop in self.loops for found in _matrix_loops(loop)]


def _matrix_loops(loop: Loop) -> list[Loop]:
    inside = [found for inner in loop.inner for found in _matrix_loops(inner)]
    if inside:
        return inside
    return [loop] if loop.slots_used["MXU"] else []


def read_schedule(folder: Path, kernel: str) -> Schedule:
    """The schedule of `kernel` among what libtpu wrote to `folder`. ValueError when it is not there."""
    use_lines = _only(folder, f"*-{kernel}*-final_hlo-static-per-bundle-utilization.txt").splitlines()
    units = [name.strip() for name in use_lines[1].split(",")]
    capacity = dict(zip(units, map(int, use_lines[2].split()), strict=True))
    use = [list(map(int, line.split())) for line in use_lines[4:] if line.strip()]
    bundles: list[tuple[bool, int, str]] = []
    for line in _only(folder, f"*-{kernel}*[0-9]-final_bundles.txt").splitlines():
        found = _BUNDLE.match(line)
        if _EMPTY.match(line):
            bundles.append((False, bundles[-1][1] if bundles else 0, ""))
        elif found:
            bundles.append((found[1] == "LB", len(found[2]), found[3]))
    if len(use) != len(bundles):
        raise ValueError(
            f"libtpu wrote {len(bundles)} bundles of {kernel} to {folder} and the use of {len(use)}: the "
            "format is not the one that is read here (that of libtpu 0.0.42 and 0.0.52)"
        )

    def loops(begin: int, end: int, depth: int) -> tuple[Loop, ...]:
        result = []
        index = begin
        while index < end:
            starts, level, _ = bundles[index]
            if not starts or level != depth:
                index += 1
                continue
            stop = index + 1
            while (
                stop < end
                and bundles[stop][1] >= depth
                and not (bundles[stop][0] and bundles[stop][1] == depth)
            ):
                stop += 1
            result.append(loop(index, stop, depth))
            index = stop
        return tuple(result)

    def loop(begin: int, end: int, depth: int) -> Loop:
        part = use[begin:end]
        return Loop(
            depth=depth,
            num_bundles=end - begin,
            slots_used={unit: sum(row[i] for row in part) for i, unit in enumerate(units)},
            bundles_used={unit: sum(row[i] > 0 for row in part) for i, unit in enumerate(units)},
            num_dma=sum("dma." in text for _, _, text in bundles[begin:end]),
            inner=loops(begin + 1, end, depth + 1),
        )

    return Schedule(capacity, len(bundles), loops(0, len(bundles), 1))


def _only(folder: Path, pattern: str) -> str:
    """The text of the last file of a pattern: the compiler may schedule a kernel more than once."""
    files = sorted(folder.glob(pattern))
    if not files:
        raise ValueError(f"no {pattern} in {folder}: libtpu wrote no schedule (did the kernel compile?)")
    return files[-1].read_text()
