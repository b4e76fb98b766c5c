"""What the machine has no chip for is interpreted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import jax
import pytest
from jax.experimental.pallas import tpu as pltpu

from kernels.paged_attention.gpu.calling import interpreted


@pytest.fixture(autouse=True)
def interpret_kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests whose `backend` is pallas_tpu or pallas_gpu run its kernels interpreted, where they must be."""
    parameters = getattr(request.node, "callspec", None)
    backend = None if parameters is None else parameters.params.get("backend")
    if backend == "pallas_tpu":
        mode = pltpu.force_tpu_interpret_mode(pltpu.InterpretParams())
    elif backend == "pallas_gpu" and jax.default_backend() != "gpu":
        mode = interpreted()
    else:
        mode = nullcontext()
    with mode:
        yield
