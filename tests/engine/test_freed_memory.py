"""Freed memory leaves the process: what an engine needed only to start does not stay its own."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engine.memory import give_back_freed_memory

NUM_BLOCKS, BLOCK_BYTES = 4096, 64 << 10
"""Together 256 MiB, in blocks that the C library does not map one by one."""


def resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    raise AssertionError("the kernel does not say how much memory this process has")


needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is asked")


@needs_glibc
def test_what_was_freed_below_a_block_in_use_goes_back_to_the_system():
    blocks = [np.ones(BLOCK_BYTES, np.uint8) for _ in range(NUM_BLOCKS)]
    full = resident_bytes()
    del blocks[:-1]  # the last one lies above the others and keeps them from being given back by themselves
    give_back_freed_memory()
    assert full - resident_bytes() > NUM_BLOCKS * BLOCK_BYTES // 2
    assert blocks[-1].all()


_STEPS = """
import resource
import numpy as np
from engine.memory import give_back_freed_memory, keep_freed_memory
def faults_of_steps():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        np.empty(50 << 20, np.uint8)[:: 4096] = 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
given_back = faults_of_steps()
keep_freed_memory()
kept = faults_of_steps()
held = int(open("/proc/self/statm").read().split()[1])
give_back_freed_memory()
print(given_back, kept, held - int(open("/proc/self/statm").read().split()[1]))
"""


@needs_glibc
def test_a_steps_memory_is_kept_for_the_next_until_it_is_to_be_given_back(repository: Path):
    """In a process of its own, for which it holds from then on."""
    done = subprocess.run([sys.executable, "-c", _STEPS], cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    given_back, kept, returned = map(int, done.stdout.split())
    assert kept < given_back / 10
    assert returned > (50 << 20) / 4096 / 2, "half of a step's pages at least"
