"""Compiling for chips that are not here, in a process of its own (`tpu_compile`, `gpu_compile`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def run_compiler(program: str, repository: Path, chip: str, *cases: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", program, chip, *cases]
    # libtpu lets one process in at a time, for the sake of chips that this one does not touch.
    environment = os.environ | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    return subprocess.run(command, cwd=repository, capture_output=True, text=True, env=environment)


def compile_cases(program: str, repository: Path, chip: str, *cases: str) -> list[dict[str, Any]]:
    """What the compiler says of each case; all must compile, their pages written in place."""
    finished = run_compiler(program, repository, chip, *cases)
    assert finished.returncode == 0, finished.stderr[-4000:]
    compiled = [json.loads(line) for line in finished.stdout.splitlines() if line.startswith("{")]
    assert [each["case"] for each in compiled] == list(cases)
    for each in compiled:
        assert each["alias"] >= each["pages"], f"{each['case']}: the pages are copied, not written in place"
    return compiled
