"""The kernels compile for real GPUs, with XLA's compiler for CUDA, at the shapes of real models."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from kernels.paged_attention.gpu.targets import TARGETS, missing
from kernels.paged_attention.model_shapes import MODEL_SHAPES

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


def compile_cases(repository, chip, *cases):
    command = [sys.executable, "-m", "tests.kernels.gpu_compile", chip, *cases]
    finished = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-4000:]
    compiled = [json.loads(line) for line in finished.stdout.splitlines() if line.startswith("{")]
    assert [each["case"] for each in compiled] == list(cases)
    for each in compiled:
        assert each["alias"] >= each["pages"], f"{each['case']}: the pages are copied, not written in place"


@pytest.mark.parametrize("chip", TARGETS)
def test_every_shape_on_every_chip(repository, chip):
    compile_cases(repository, chip, *(f"{shape}:bfloat16" for shape in MODEL_SHAPES))


@pytest.mark.slow
@pytest.mark.parametrize("chip", TARGETS)
def test_page_dtypes_and_options(repository, chip):
    cases = [f"{shape}:{dtype}" for shape in ("SmolLM2-135M", "Llama-3.1-8B") for dtype in ("float32", "int8")]
    cases += [f"SmolLM2-135M:bfloat16:{option}" for option in ("chunk", "window", "soft_cap")]
    compile_cases(repository, chip, *cases)
