"""The kernel compiles for real TPUs, with libtpu's compiler, at the shapes of real models."""

from __future__ import annotations

import os
import platform
import sys

import pytest

from kernels.paged_attention.model_shapes import MODEL_SHAPES
from kernels.paged_attention.tpu.topology import TOPOLOGIES, is_installed
from tests.kernels.compiler_process import compile_cases, run_compiler

PROGRAM = "tests.kernels.tpu_compile"

needs_libtpu = pytest.mark.skipif(
    not is_installed(), reason="libtpu is absent: install the extra tpu-compile"
)
HAVE_FP8 = ("v6e", "tpu7x")


@pytest.mark.skipif(
    "CI" not in os.environ or sys.platform != "linux" or platform.machine() != "x86_64",
    reason="not a CI on which libtpu can be installed",
)
def test_ci_has_libtpu():
    assert is_installed(), "nothing would be compiled for TPUs: install the extra tpu-compile"


@needs_libtpu
@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_every_shape_on_every_chip(repository, chip):
    compile_cases(PROGRAM, repository, chip, *(f"{shape}:bfloat16" for shape in MODEL_SHAPES))


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
    compile_cases(PROGRAM, repository, chip, *cases)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("chip", [chip for chip in TOPOLOGIES if chip not in HAVE_FP8])
def test_fp8_pages_are_refused_where_the_chip_has_no_fp8(repository, chip):
    finished = run_compiler(PROGRAM, repository, chip, "Llama-3.1-8B:float8_e4m3fn")
    assert f"TPU {chip} has no fp8" in finished.stderr
    assert finished.returncode == 1
