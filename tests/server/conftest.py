"""One server of the tiny model for all tests of this folder, behind a real socket on the loopback."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import openai
import pytest

from engine import checkpoints
from engine.async_engine import AsyncEngine
from engine.config import EngineConfig
from engine.engine import Engine
from engine.outputs import RequestOutput
from engine.sampling_params import SamplingParams
from engine.server.app import create_app
from engine.server.serving import BackgroundServer
from engine.server.settings import ServerSettings
from tests.engine.engines import PAGE_BYTES
from tests.tiny_model import make_tiny_checkpoint

MODEL = "tiny"
NUM_PAGES = 1024
OPEN = ServerSettings(require_api_key=False, drain_seconds=1)


def make_engine(loaded: checkpoints.LoadedModel, **options: Any) -> Engine:
    """16 sequences, one compiled step of 64 tokens, 2,048 tokens a sequence."""
    defaults: dict[str, Any] = {
        "max_num_seqs": 16,
        "max_num_batched_tokens": 64,
        "min_token_pad": 64,
        "page_size": 16,
        "kv_cache_bytes": NUM_PAGES * 16 * PAGE_BYTES,
        "scheduling_policy": "priority",
    }
    return Engine(loaded, EngineConfig(**(defaults | options)))


@pytest.fixture(scope="session")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> checkpoints.LoadedModel:
    folder = Path(tmp_path_factory.mktemp("served") / "model")
    return checkpoints.load(
        str(make_tiny_checkpoint(folder, tie_word_embeddings=False, max_position_embeddings=2048))
    )


@pytest.fixture(scope="session")
def engine(loaded: checkpoints.LoadedModel) -> Iterator[AsyncEngine]:
    with AsyncEngine(make_engine(loaded)) as engine:
        yield engine


@pytest.fixture(scope="session")
def server(engine: AsyncEngine) -> Iterator[BackgroundServer]:
    with BackgroundServer(create_app({MODEL: engine}, settings=OPEN), OPEN) as running:
        yield running


@pytest.fixture(scope="session")
def client(server: BackgroundServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(autouse=True)
def _no_page_is_held_afterwards(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test did, its requests are over and the pages add up."""
    yield
    if "engine" in request.fixturenames:
        assert_idle(request.getfixturevalue("engine"))


def assert_idle(engine: AsyncEngine) -> None:
    """All requests have left, and their pages with them: at once, or when the step in flight is over."""
    engine.run_on_step_thread(lambda: None).result()
    stats = engine.stats()
    assert engine.num_unfinished == 0
    assert (stats.running, stats.waiting, stats.pages_held) == (0, 0, 0)
    engine.run_on_step_thread(engine.engine.check_integrity).result()


def complete_with(engine: AsyncEngine, prompt: Any, sampling: SamplingParams) -> RequestOutput:
    """What the engine itself makes of a prompt."""
    done: Future[RequestOutput] = Future()
    engine.submit(prompt, sampling, on_output=done.set_result, on_error=done.set_exception)
    return done.result(timeout=30)


def complete(engine: AsyncEngine, prompt: Any, **sampling: Any) -> RequestOutput:
    return complete_with(engine, prompt, SamplingParams(**sampling))


def text_of(engine: AsyncEngine, prompt: Any, **sampling: Any) -> str:
    return complete(engine, prompt, **sampling).outputs[0].text  # type: ignore[return-value]
