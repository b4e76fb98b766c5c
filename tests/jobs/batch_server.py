"""A real server with batches of the tiny model, for tests in this process and, as a program, to be killed.

    python -m tests.jobs.batch_server CHECKPOINT FOLDER CACHE      prints its URL

Its clock stands at `NOW`, so that two servers make the same bytes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from engine import checkpoints
from engine.async_engine import AsyncEngine
from engine.config import EngineConfig
from engine.engine import Engine
from engine.server.app import create_app
from engine.server.serving import BackgroundServer, serve
from engine.server.settings import ServerSettings
from jobs.batches.pipeline_batches import PipelineBatches
from jobs.batches.running import BatchModel
from tests.engine.engines import PAGE_BYTES

MODEL = "tiny"
NOW = 1_700_000_000
SETTINGS = ServerSettings(require_api_key=False, drain_seconds=1)


def load_engine(checkpoint: str, **options: Any) -> tuple[Engine, str]:
    """A small engine and the fingerprint of its model."""
    loaded = checkpoints.load(checkpoint)
    defaults: dict[str, Any] = {
        "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
        "min_token_pad": 16,
        "page_size": 16,
        "max_model_len": 256,
        "kv_cache_bytes": 256 * 16 * PAGE_BYTES,
        "scheduling_policy": "priority",
    }
    return Engine(loaded, EngineConfig(**(defaults | options))), loaded.fingerprint


def server_of(root: Path, model: BatchModel, **options: Any) -> BackgroundServer:
    """A server with batches, to be entered; its engine ends with it."""
    backend = PipelineBatches(root, {MODEL: model}, **options)
    app = create_app({MODEL: model.engine}, settings=SETTINGS, batches=backend)
    return BackgroundServer(app, SETTINGS)


def main() -> None:
    checkpoint, root, cache = sys.argv[1:]
    engine, fingerprint = load_engine(checkpoint, compilation_cache_dir=cache)
    shared = AsyncEngine(engine)
    backend = PipelineBatches(
        root, {MODEL: BatchModel(engine=shared, fingerprint=fingerprint)}, clock=lambda: NOW
    )
    app = create_app({MODEL: shared}, settings=SETTINGS, batches=backend)
    serve(app, SETTINGS, port=0, on_ready=lambda url: print(url, flush=True))


if __name__ == "__main__":
    main()
