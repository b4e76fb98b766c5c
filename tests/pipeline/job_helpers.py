"""Whole jobs in this process, on the engine without a model: what the tests of the job share."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pipeline.exit_codes import ExitCode
from pipeline.ledger import Ledger
from pipeline.process_identity import ProcessIdentity
from pipeline.run import run_job
from pipeline.settings import Settings, from_config
from pipeline.signals import StopRequest
from pipeline.storage import open_storage
from tests.pipeline.fake_engine import FakeEngine
from tests.pipeline.input_helpers import lines, make_chat_tokenizer, write_jsonl
from tests.pipeline.small_run import gone_process, stored_results


def write_shards(folder: Path, num_shards: int = 3, rows_per_shard: int = 8) -> Path:
    """JSONL shards whose row i of shard s has the id `s-i`."""
    for shard in range(num_shards):
        rows = [{"id": f"{shard}-{i}", "prompt": f"say {shard} and {i}"} for i in range(rows_per_shard)]
        write_jsonl(folder / f"{shard}.jsonl", lines(rows))
    return folder


def job_settings(input_path: Path, output_path: Path | str, **overrides: Any) -> Settings:
    """Settings of a small job; `overrides` are dotted keys with `__` for the dot."""
    values: dict[str, Any] = {
        "model": {"source": "fake"},
        "input": {"path": str(input_path), "id_column": "id"},
        "output": {"path": str(output_path), "chunk_rows": 3},
        "sampling": {"max_tokens": 6},
        "engine": {"max_num_seqs": 4, "platform": "cpu"},
        "progress": "off",
    }
    for key, value in overrides.items():
        section, _, name = key.rpartition("__")
        (values.setdefault(section, {}) if section else values)[name] = value
    return from_config(values)


def fake_model(settings: Settings, fingerprint: str = "fake-1") -> Any:
    tokenizer = make_chat_tokenizer()
    config = SimpleNamespace(vocab_size=len(tokenizer), max_position_embeddings=256)
    return SimpleNamespace(tokenizer=tokenizer, config=config, fingerprint=fingerprint)


def fake_engine(loaded: Any, settings: Settings) -> FakeEngine:
    return FakeEngine(max_num_seqs=settings.engine.max_num_seqs, seed=settings.engine.seed)


def run_fake(
    settings: Settings,
    make_engine: Callable[[Any, Settings], Any] = fake_engine,
    stop: StopRequest | None = None,
    owner: ProcessIdentity | None = None,
) -> ExitCode:
    """Leases are held in the name of `owner`, or of a process that is gone: a run that crashes here leaves
    what a dead one would.
    """
    open_ledger = partial(Ledger.open, owner=owner or gone_process())
    return run_job(
        settings, load_model=fake_model, make_engine=make_engine, open_ledger=open_ledger, stop=stop
    )


def final_bytes(output: Path | str) -> dict[str, bytes]:
    """What two runs must agree on to the byte: data/ and rejects/, by name."""
    return stored_results(open_storage(str(output)))


def commits(output: Path | str) -> dict[str, dict[str, Any]]:
    """Commit records by `<shard>/<chunk>`."""
    storage = open_storage(str(output))
    return {
        f"{shard}/{name.removesuffix('.json')}": json.loads(storage.read(f"{folder}/{shard}/{name}") or b"")
        for folder in (f"_state/{fingerprint}/commits" for fingerprint in storage.list("_state"))
        for shard in storage.list(folder)
        for name in storage.list(f"{folder}/{shard}")
    }
