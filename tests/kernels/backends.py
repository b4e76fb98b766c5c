"""The backends that the shared tests of paged attention run over."""

from __future__ import annotations

import pytest

from kernels.paged_attention import available_backends

# The TPU kernel runs in interpret mode here, where each new shape takes half a minute to compile: its cases
# in the shared tests are slow ones, and `test_pallas_tpu.py` has quick ones of its own.
EVERY_BACKEND = [*available_backends(), pytest.param("pallas_tpu", marks=pytest.mark.slow)]
# A TPU's products of one query and of many add in different orders.
BITWISE_BACKENDS = available_backends()
