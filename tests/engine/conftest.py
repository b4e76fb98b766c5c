"""Models that several tests share; each is loaded once a process."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine import checkpoints
from engine.checkpoints import LoadedModel
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
