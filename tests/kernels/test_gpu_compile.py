"""The kernels compile for real GPUs, with XLA's compiler for CUDA, at the shapes of real models."""

from __future__ import annotations

import pytest

from kernels.paged_attention.gpu.targets import TARGETS, missing
from kernels.paged_attention.model_shapes import MODEL_SHAPES
from tests.kernels.compiler_process import compile_cases, run_compiler

PROGRAM = "tests.kernels.gpu_compile"

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


def check_cases(repository, chip, *cases):
    """They compile without spills, and with no more memory than the tiles reckon with."""
    for each in compile_cases(PROGRAM, repository, chip, *cases):
        case, kernels = each["case"], each["kernels"]
        assert set(kernels) == {"write", "chunk", "group", "decode", "combine"}
        for name, kernel in kernels.items():
            assert kernel["spill_bytes"] == 0, f"{case}: {name} spills"
        for name, most in each["shared"].items():
            assert kernels[name]["shared_bytes"] <= most <= TARGETS[chip].shared_of_block, f"{case}: {name}"


@pytest.mark.parametrize("chip", TARGETS)
def test_every_shape_on_every_chip(repository, chip):
    check_cases(repository, chip, *(f"{shape}:bfloat16:64" for shape in MODEL_SHAPES))


@pytest.mark.slow
@pytest.mark.parametrize("chip", TARGETS)
@pytest.mark.parametrize("page_size", [16, 256])
def test_page_dtypes_and_options(repository, chip, page_size):
    dtypes = ["float32", "bfloat16", "int8"] + (["float8_e4m3fn"] if TARGETS[chip].major >= 9 else [])
    shapes = ("SmolLM2-135M", "Llama-3.1-8B", "Gemma-3-12B")
    cases = [f"{shape}:{dtype}:{page_size}" for shape in shapes for dtype in dtypes]
    cases += [f"Llama-3.1-8B:bfloat16:{page_size}:{option}" for option in ("chunk", "window", "soft_cap")]
    check_cases(repository, chip, *cases)


@pytest.mark.slow
def test_fp8_pages_are_refused_where_the_chip_has_no_fp8(repository):
    finished = run_compiler(PROGRAM, repository, "A100", "Llama-3.1-8B:float8_e4m3fn:64")
    assert "A100 has no float8_e4m3fn: give pages of int8" in finished.stderr
    assert finished.returncode == 1
