"""What every test runs under: strict JAX, no network, a kept compilation cache, repeatable examples.

JAX is configured through its environment variables, so that tests which never need JAX do not pay for
importing it, and so that child processes are just as strict.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

REPOSITORY = Path(__file__).resolve().parent.parent
CACHE = REPOSITORY / ".cache"

for _name, _value in {
    "JAX_PLATFORMS": "cpu",
    # A silent promotion of dtypes is a bug that has not been noticed yet.
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    # Compiling is most of the suite's time: what one run compiled, the next one finds.
    "JAX_COMPILATION_CACHE_DIR": str(CACHE / "jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "HF_HUB_OFFLINE": "1",
    "HF_HOME": str(CACHE / "huggingface"),
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MPLBACKEND": "agg",
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ.setdefault(_name, _value)

# "repeatable" is the default: the same examples every time, so a failure is never a matter of luck.
# HYPOTHESIS_PROFILE=explore draws new ones and remembers failures; =thorough draws many.
settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("explore", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("thorough", settings.get_profile("explore"), max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root folder of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny random Llama, its config and a byte-level tokenizer with a chat template."""
    from tests.tiny_model import make_tiny_checkpoint

    return str(make_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "model"))
