"""A real server with batches of the tiny model, for tests in this process and, as a program, to be killed.

    python -m tests.jobs.batch_server CHECKPOINT FOLDER CACHE      prints its URL

Its clock stands at `NOW`, so that two servers make the same bytes.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai

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

CHAT = "/v1/chat/completions"
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
        "max_model_len": 1024,
        "kv_cache_bytes": 256 * 16 * PAGE_BYTES,
        "scheduling_policy": "priority",
    }
    return Engine(loaded, EngineConfig(**(defaults | options))), loaded.fingerprint


def server_of(root: Path, model: BatchModel, **options: Any) -> BackgroundServer:
    """A server with batches, to be entered; its engine ends with it."""
    backend = PipelineBatches(root, {MODEL: model}, **options)
    app = create_app({MODEL: model.engine}, settings=SETTINGS, batches=backend)
    return BackgroundServer(app, SETTINGS)


def lines_of(*lines: Any) -> bytes:
    """The content of a batch file; text is written as it is."""
    return b"".join((line if isinstance(line, str) else json.dumps(line)).encode() + b"\n" for line in lines)


def create(client: openai.OpenAI, content: bytes, endpoint: Any = CHAT, **options: Any) -> Any:
    """Upload a file and make a batch of it."""
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    window: Any = options.pop("completion_window", "24h")
    return client.batches.create(
        input_file_id=file.id, endpoint=endpoint, completion_window=window, **options
    )


def ended(client: openai.OpenAI, batch_id: str, seconds: float = 60.0) -> Any:
    """The batch, once it has ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        batch = client.batches.retrieve(batch_id)
        if batch.status in ("completed", "failed", "cancelled", "expired"):
            return batch
        time.sleep(0.05)
    raise AssertionError(f"the batch is still {batch.status}")


def wait_for(has_come: Callable[[], bool], seconds: float = 120.0) -> None:
    """Until something has come; an error after so many seconds."""
    deadline = time.monotonic() + seconds
    while not has_come():
        assert time.monotonic() < deadline, "it has not come"
        time.sleep(0.01)


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
