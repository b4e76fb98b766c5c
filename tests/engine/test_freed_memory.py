"""Freed memory leaves the process: what an engine needed only to start does not stay its own."""

from __future__ import annotations

import platform
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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is asked to give memory back")
def test_what_was_freed_below_a_block_in_use_goes_back_to_the_system():
    blocks = [np.ones(BLOCK_BYTES, np.uint8) for _ in range(NUM_BLOCKS)]
    full = resident_bytes()
    del blocks[:-1]  # the last one lies above the others and keeps them from being given back by themselves
    give_back_freed_memory()
    assert full - resident_bytes() > NUM_BLOCKS * BLOCK_BYTES // 2
    assert blocks[-1].all()
