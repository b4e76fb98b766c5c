"""The stores of the pipeline's tests, for what is built on them, and an engine for the batches of servers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.pipeline.conftest import s3_bucket, s3_server
from tests.tiny_model import make_tiny_checkpoint

if TYPE_CHECKING:
    from engine.engine import Engine
    from jobs.batches.running import BatchModel

__all__ = ["s3_bucket", "s3_server"]


@pytest.fixture(scope="session")
def batch_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model whose prompts may be long enough to tell of tools."""
    folder = tmp_path_factory.mktemp("batches") / "model"
    return make_tiny_checkpoint(folder, max_position_embeddings=2048)


@pytest.fixture(scope="session")
def batch_engine(batch_checkpoint: str) -> tuple[Engine, str]:
    """A small engine, and the fingerprint of its model."""
    from tests.jobs.batch_server import load_engine

    return load_engine(batch_checkpoint)


@pytest.fixture(scope="module")
def model(batch_engine: tuple[Engine, str]) -> Iterator[BatchModel]:
    """That engine as a server has it, until the module ends."""
    from engine.async_engine import AsyncEngine
    from jobs.batches.running import BatchModel

    engine, fingerprint = batch_engine
    with AsyncEngine(engine, max_waiting=6) as shared:  # fewer than a batch would have it hold
        yield BatchModel(engine=shared, fingerprint=fingerprint)
