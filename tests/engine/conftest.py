"""Models that several tests share, each loaded once a process, and engines behind a thread."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from engine import checkpoints
from engine.async_engine import AsyncEngine
from engine.checkpoints import LoadedModel
from tests.engine.costless import Gate, assert_nothing_is_left, costless_engine
from tests.tiny_model import make_tiny_checkpoint


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default tiny checkpoint, as a Hugging Face folder. Not to be written to."""
    return Path(make_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "model"))


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> LoadedModel:
    """The default tiny checkpoint, loaded."""
    return checkpoints.load(str(tiny_folder))


@pytest.fixture(scope="session")
def real() -> LoadedModel:
    """The embedded SmolLM2-135M-Instruct in float32."""
    return checkpoints.load(checkpoints.DEFAULT_MODEL)


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def gated(gate: Gate) -> Iterator[AsyncEngine]:
    """Its steps wait for the gate."""
    engine, _ = costless_engine(before_results=gate)
    with AsyncEngine(engine) as front:
        yield front
        gate.open()


@pytest.fixture
def front() -> Iterator[AsyncEngine]:
    engine, _ = costless_engine(num_pages=48)
    with AsyncEngine(engine) as front:
        yield front
        assert_nothing_is_left(front)
