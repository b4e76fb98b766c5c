"""Every step is compiled at the start, and a second start of the same configuration compiles nothing."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

START = """
import sys
from engine.engine import Engine
engine = Engine.from_pretrained(sys.argv[1], compilation_cache_dir=sys.argv[2], max_num_seqs=4, page_size=16,
                                max_num_batched_tokens=int(sys.argv[3]), max_model_len=64,
                                kv_cache_bytes=1 << 20)
print(engine.stats().num_compiled, len(engine._runner.buckets))
"""


def start(checkpoint: str, cache: Path, max_num_batched_tokens: int) -> tuple[int, int]:
    """(steps compiled, steps declared) of a new process."""
    command = [sys.executable, "-c", START, checkpoint, str(cache), str(max_num_batched_tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    num_compiled, num_declared = map(int, done.stdout.split())
    return num_compiled, num_declared


def test_the_second_start_compiles_nothing(tiny_checkpoint, tmp_path):
    cache = tmp_path / "compiled"
    first = start(tiny_checkpoint, cache, 16)
    assert first[0] >= first[1] == 1
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700, "compiled code is run as it is found"
    assert start(tiny_checkpoint, cache, 16) == (0, 1)
    grown = start(tiny_checkpoint, cache, 32)
    assert 0 < grown[0] < first[0] + grown[1], "only the new step is compiled"
