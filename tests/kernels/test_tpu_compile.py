"""The kernel compiles for real TPUs, with libtpu's compiler, at the shapes of real models."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys

import pytest

from kernels.paged_attention.model_shapes import MODEL_SHAPES
from kernels.paged_attention.tpu.topology import TOPOLOGIES, is_installed

needs_libtpu = pytest.mark.skipif(
    not is_installed(), reason="libtpu is absent: install the extra tpu-compile"
)
HAVE_FP8 = ("v6e", "tpu7x")


def run_compiler(repository, chip, *cases):
    command = [sys.executable, "-m", "tests.kernels.tpu_compile", chip, *cases]
    return subprocess.run(command, cwd=repository, capture_output=True, text=True)


def compile_cases(repository, chip, *cases):
    finished = run_compiler(repository, chip, *cases)
    assert finished.returncode == 0, finished.stderr[-4000:]
    compiled = [json.loads(line) for line in finished.stdout.splitlines() if line.startswith("{")]
    assert [each["case"] for each in compiled] == list(cases)
    for each in compiled:
        assert each["alias"] >= each["pages"], f"{each['case']}: the pages are copied, not written in place"


@pytest.mark.skipif(
    "CI" not in os.environ or sys.platform != "linux" or platform.machine() != "x86_64",
    reason="not a CI on which libtpu can be installed",
)
def test_ci_has_libtpu():
    assert is_installed(), "nothing would be compiled for TPUs: install the extra tpu-compile"


@needs_libtpu
@pytest.mark.parametrize(("chip", "shape"), list(zip(TOPOLOGIES, MODEL_SHAPES, strict=True)))
def test_each_chip_and_each_shape(repository, chip, shape):
    compile_cases(repository, chip, f"{shape}:bfloat16")


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_every_shape_on_every_chip(repository, chip):
    compile_cases(repository, chip, *(f"{shape}:bfloat16" for shape in MODEL_SHAPES))


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_page_dtypes_and_options(repository, chip):
    cases = [
        f"{shape}:{dtype}" for shape in ("SmolLM2-135M", "Llama-3.1-8B") for dtype in ("float32", "int8")
    ]
    cases += [f"SmolLM2-135M:bfloat16:{option}" for option in ("chunk", "window", "soft_cap")]
    if chip in HAVE_FP8:
        cases += [f"{shape}:float8_e4m3fn" for shape in ("SmolLM2-135M", "Llama-3.1-8B")]
    compile_cases(repository, chip, *cases)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("chip", [chip for chip in TOPOLOGIES if chip not in HAVE_FP8])
def test_fp8_pages_are_refused_where_the_chip_has_no_fp8(repository, chip):
    finished = run_compiler(repository, chip, "Llama-3.1-8B:float8_e4m3fn")
    assert f"TPU {chip} has no fp8" in finished.stderr
    assert finished.returncode == 1
