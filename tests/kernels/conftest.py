"""What runs on no TPU is interpreted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from jax.experimental.pallas import tpu as pltpu


@pytest.fixture(autouse=True)
def interpret_tpu_kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests whose `backend` is pallas_tpu run its kernel in TPU interpret mode."""
    parameters = getattr(request.node, "callspec", None)
    if parameters is None or parameters.params.get("backend") != "pallas_tpu":
        yield
        return
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        yield
