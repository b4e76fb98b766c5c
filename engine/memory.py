"""How many KV pages fit: what the device has, less weights and the compiled steps' temporaries."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

from engine.config import CPU_KV_CACHE_BYTES, EngineConfig
from engine.errors import ConfigError

KEPT_BYTES = 256 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # as in malloc.h


def num_pages_that_fit(
    config: EngineConfig,
    *,
    device: Any,
    page_bytes: int,
    used_bytes: int,
    max_model_len: int,
    num_sharing: int = 1,
) -> int:
    """Pages of `page_bytes` (all layers together) that the device can hold.

    Args:
        config: `kv_cache_bytes` if set, else `hbm_utilization` of what the device reports (a CPU reports
            nothing: there it is 2 GiB).
        device: a jax device.
        page_bytes: of one page over all layers.
        used_bytes: taken already, or to be: weights, and the largest temporaries of a step.
        max_model_len: not more pages are made than `max_num_seqs` sequences of this length fill, twice over
            (`pages_in`): what is beyond the running ones serves the prefix cache.
        num_sharing: devices that have the host's memory in common, where it is theirs.

    Raises:
        ConfigError: not one sequence of `max_model_len` fits; with the numbers.
    """
    budget = config.kv_cache_bytes
    if budget is None:
        if device.platform == "cpu":
            usable = int(host_memory_bytes() * config.hbm_utilization)
            budget = min(CPU_KV_CACHE_BYTES, usable - used_bytes * num_sharing) // num_sharing
        else:
            limit = device_memory_bytes(device)
            budget = int(limit * config.hbm_utilization) - used_bytes
    pages_each = -(-max_model_len // config.page_size)
    num_pages = pages_in(budget, config, page_bytes, max_model_len)
    if num_pages < pages_each:
        raise ConfigError(
            f"the KV cache has room for {num_pages} pages of {config.page_size} tokens "
            f"({max(0, budget):,} bytes, {page_bytes:,} a page) and one sequence of "
            f"engine.max_model_len={max_model_len} needs {pages_each}: "
            "raise engine.kv_cache_bytes or engine.hbm_utilization, or lower engine.max_model_len"
        )
    return num_pages


def pages_in(budget: int, config: EngineConfig, page_bytes: int, max_model_len: int) -> int:
    """Pages that `budget` bytes hold, up to what twice `max_num_seqs` sequences of full length could use."""
    pages_each = -(-max_model_len // config.page_size)
    return min(max(0, budget) // page_bytes, 2 * config.max_num_seqs * pages_each)


def device_memory_bytes(device: Any) -> int:
    """The memory an accelerator lets this process use. Raises ConfigError when it does not say."""
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        raise ConfigError(
            f"device {device.device_kind!r} does not report its memory: set engine.kv_cache_bytes"
        )
    return int(stats["bytes_limit"])


def host_memory_bytes() -> int:
    """Memory this process could still take: the machine's available memory, or the container's if less."""
    available = None
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else ():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    group = Path("/sys/fs/cgroup")
    limit, current = group / "memory.max", group / "memory.current"
    if limit.exists() and current.exists() and (text := limit.read_text().strip()) != "max":
        free = int(text) - int(current.read_text())
        available = free if available is None else min(available, free)
    # Where neither tells (not Linux), the default budget stands alone.
    return CPU_KV_CACHE_BYTES * 2 if available is None else available


def keep_freed_memory() -> None:
    """From here on have the C library, where it is glibc, keep `KEPT_BYTES` of large blocks that are freed.

    Each step takes memory for its results and temporaries (50 MB of logits at 256 rows of 49,152 numbers).
    What goes back to the system in between comes again page by page, cleared. It holds for all of the
    process; `give_back_freed_memory` gives back what is kept.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, KEPT_BYTES)
            mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)


def give_back_freed_memory() -> None:
    """Have the C library return what was freed to the system, where it is glibc; elsewhere nothing happens.

    It keeps freed blocks that lie below used ones. After loading a model and compiling its steps that is some
    0.4 GiB for a model of 0.5, which would stay in the process for as long as it runs.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(ctypes.c_size_t(0))
