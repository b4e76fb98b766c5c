"""The stores of the pipeline's tests, for what is built on them, and an engine for the batches of servers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.pipeline.conftest import s3_bucket, s3_server

if TYPE_CHECKING:
    from engine.engine import Engine
    from jobs.batches.running import BatchModel

__all__ = ["s3_bucket", "s3_server"]


@pytest.fixture(scope="session")
def batch_engine(tiny_checkpoint: str) -> tuple[Engine, str]:
    """A small engine, and the fingerprint of its model."""
    from tests.jobs.batch_server import load_engine

    return load_engine(tiny_checkpoint)


@pytest.fixture(scope="module")
def model(batch_engine: tuple[Engine, str]) -> Iterator[BatchModel]:
    """That engine as a server has it, until the module ends."""
    from engine.async_engine import AsyncEngine
    from jobs.batches.running import BatchModel

    engine, fingerprint = batch_engine
    with AsyncEngine(engine) as shared:
        yield BatchModel(engine=shared, fingerprint=fingerprint)
