"""What processes use, read from /proc: processor seconds and memory of a tree, and of everything else."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Process:
    """`cpu_seconds` of its own; `with_children` has those of its ended children too."""

    pid: int
    parent: int
    name: str
    cpu_seconds: float
    with_children: float


def all_processes() -> dict[int, Process]:
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            head, _, rest = (folder / "stat").read_text().rpartition(") ")
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended meanwhile
        fields = rest.split()
        user, system, child_user, child_system = map(int, fields[11:15])
        pid = int(folder.name)
        found[pid] = Process(
            pid,
            int(fields[1]),
            head.partition("(")[2],
            (user + system) / _TICKS,
            (user + system + child_user + child_system) / _TICKS,
        )
    return found


def tree(root: int, processes: dict[int, Process] | None = None) -> list[Process]:
    """The process and all its descendants that are alive."""
    processes = all_processes() if processes is None else processes
    children: dict[int, list[Process]] = {}
    for process in processes.values():
        children.setdefault(process.parent, []).append(process)
    found, open_ = [], [processes[root]] if root in processes else []
    while open_:
        process = open_.pop()
        found.append(process)
        open_ += children.get(process.pid, [])
    return found


def peak_memory_bytes(root: int) -> int:
    """The sum of every living process's peak of resident memory (VmHWM) in the tree.

    Pages that processes share count in each of them, and peaks may lie at different times, so of several
    processes it is an upper bound; of one it is exact.
    """
    total = 0
    for process in tree(root):
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    return total


def proportional_memory_bytes(root: int) -> int:
    """What the tree holds now, a page shared by n processes counting a n-th in each (Pss)."""
    total = 0
    for process in tree(root):
        try:
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


def busy_processes(seconds: float = 0.5, share: float = 0.2) -> tuple[str, ...]:
    """Other processes that use more than `share` of a core, and so spoil a measurement: pid, name, cores."""
    before = all_processes()
    time.sleep(seconds)
    used = [
        ((now.cpu_seconds - before[pid].cpu_seconds) / seconds, now)
        for pid, now in all_processes().items()
        if pid in before and pid != os.getpid()
    ]
    busy = sorted(((cores, each.pid, each.name) for cores, each in used if cores > share), reverse=True)
    return tuple(f"{pid} {name} {cores:.1f} cores" for cores, pid, name in busy[:8])


class OthersMeter:
    """How many cores everything but the given processes and their children uses, from when it is made."""

    def __init__(self, *own_pids: int):
        self._own_pids = own_pids
        self._started = time.perf_counter()
        self._before = self._others()

    def cores(self) -> float:
        """The mean so far; what the hypervisor gave to other machines counts too."""
        return max(0.0, self._others() - self._before) / (time.perf_counter() - self._started)

    def _others(self) -> float:
        user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
        processes = all_processes()
        # By pid, so that a process below two of the roots counts once.
        own = {each.pid: each for root in self._own_pids for each in tree(root, processes)}
        return (user + nice + system + irq + softirq + steal) / _TICKS - sum(
            each.with_children for each in own.values()
        )
