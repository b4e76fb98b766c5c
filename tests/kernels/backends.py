"""The backends that the shared tests of paged attention run over."""

from __future__ import annotations

import pytest

from kernels.paged_attention import available_backends

# The kernels for TPUs and GPUs run in interpret mode here, where each new shape takes many seconds to
# compile: their cases in the shared tests are slow ones, and `test_pallas_*.py` have quick ones of their own.
_INTERPRETED = [name for name in ("pallas_tpu", "pallas_gpu") if name not in available_backends()]
EVERY_BACKEND = [
    *available_backends(),
    *(pytest.param(name, marks=pytest.mark.slow) for name in _INTERPRETED),
]
# An accelerator's products of one query and of many add in different orders.
BITWISE_BACKENDS = tuple(name for name in available_backends() if not name.startswith("pallas_"))
