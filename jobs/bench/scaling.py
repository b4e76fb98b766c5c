"""`python -m jobs.bench scaling`: does a run go n times as fast with n workers?

Workers are processes with an engine of a fixed speed, so what is measured is what they cost each other:
claims, commits, requests to one store, the end of the run. The output goes to a new folder inside --output, a
local one or one of a bucket (s3://…). Timed from when all workers are ready until the run is finished.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shlex
import sys
import tempfile
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from engine.errors import ConfigError
from jobs.bench.arguments import not_negative, positive
from jobs.bench.machine import cpu_name
from jobs.bench.paced_engine import PacedEngine
from pipeline.exit_codes import ExitCode
from pipeline.metrics import Metrics
from pipeline.results import open_run
from pipeline.run import run_job
from pipeline.run_state import RunState
from pipeline.settings import Settings, from_config
from pipeline.storage import open_storage

TOKENS_A_ROW = 16
VOCAB_SIZE = 512


def numbers(text: str) -> tuple[int, ...]:
    return tuple(positive(each) for each in text.split(","))


def add_arguments(made: argparse.ArgumentParser) -> None:
    made.add_argument("--output", help="a local folder or s3://bucket/folder; default: a temporary folder")
    made.add_argument("--workers", type=numbers, default=(1, 2, 4, 8, 16), metavar="N,N,…")
    made.add_argument("--shards", type=positive, default=64)
    made.add_argument("--chunks", type=positive, default=2, help="of each shard")
    made.add_argument("--chunk-rows", type=positive, default=16)
    made.add_argument("--chunk-seconds", type=not_negative, default=1.6, help="of the engine, for each chunk")


@dataclass(frozen=True, slots=True)
class Point:
    """A run with so many workers. `efficiency`: its speed over that of so many times one worker's.

    seconds: until it was finished. engine_seconds: what the engine alone would take. requests: to the store,
    by kind, of all chunks together.
    """

    workers: int
    seconds: float
    engine_seconds: float
    efficiency: float
    requests: dict[str, int]
    wait_seconds: float


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure every number of workers, print as it goes, and return it all as plain data."""
    if len(options.workers) == 0 or options.workers[0] != 1:
        raise ConfigError("--workers must begin with 1: the others are compared with it")
    with tempfile.TemporaryDirectory(prefix="tidemill-scaling-") as folder:
        source = write_input(Path(folder) / "input", options)
        place = options.output or f"{folder}/output"
        points: list[Point] = []
        for workers in options.workers:
            alone = points[0].seconds if points else None
            points.append(measure(workers, source, f"{place}/{uuid.uuid4().hex[:8]}", folder, options, alone))
            print(line(points[-1]), flush=True)
    return {
        "command": shlex.join(["python", "-m", "jobs.bench", *sys.argv[1:]]),
        "machine": {"cpu": cpu_name(), "num_cores": len(os.sched_getaffinity(0))},
        "setup": {
            "output": options.output.partition("://")[0] if "://" in (options.output or "") else "local disk",
            "shards": options.shards,
            "chunks_a_shard": options.chunks,
            "rows_a_chunk": options.chunk_rows,
            "engine_seconds_a_chunk": options.chunk_seconds,
        },
        "points": [asdict(point) for point in points],
    }


def line(point: Point) -> str:
    requests = sum(point.requests.values())
    return (
        f"{point.workers:>3} workers: {point.seconds:7.1f} s (engines alone {point.engine_seconds:.1f} s), "
        f"efficiency {point.efficiency:.3f}, {requests} requests"
    )


def write_input(folder: Path, options: argparse.Namespace) -> Path:
    """Shards of prompts that are token ids already."""
    folder.mkdir()
    num_rows = options.chunks * options.chunk_rows
    for shard in range(options.shards):
        rows = [{"prompt_token_ids": [shard % VOCAB_SIZE, row % VOCAB_SIZE, 1]} for row in range(num_rows)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{shard:05d}.jsonl").write_text(text)
    return folder


def measure(
    workers: int, source: Path, output: str, folder: str, options: argparse.Namespace, alone: float | None
) -> Point:
    """One run; `alone` are one worker's seconds, None if this is that run."""
    # Forked from a server that has imported everything: a worker's start is not what is measured.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["jobs.bench.scaling", "jax", "transformers", "pipeline.s3_client", "pandas", "pyarrow.parquet"]
    )
    ready, ends = context.Barrier(workers + 1), context.SimpleQueue()
    processes = [
        context.Process(target=work, args=(index, workers, source, output, folder, options, ready, ends))
        for index in range(workers)
    ]
    for process in processes:
        process.start()
    try:
        ready.wait(timeout=300)
        started = time.monotonic()
        ended = [ends.get() for _ in processes]
    finally:
        for process in processes:
            process.terminate()
            process.join()
    if not all(code in (ExitCode.DONE, ExitCode.RETRY_LATER) for code, _ in ended):
        raise ConfigError(f"workers ended with {sorted(code for code, _ in ended)}: see what they said above")
    seconds = min(moment for code, moment in ended if code == ExitCode.DONE) - started
    metrics = committed(output)
    engine_seconds = options.shards * options.chunks * options.chunk_seconds / workers
    efficiency = 1.0 if alone is None else alone / (workers * seconds)
    requests = dict(sorted(metrics.store_requests.items()))
    return Point(workers, seconds, engine_seconds, efficiency, requests, metrics.wait_seconds)


def committed(output: str) -> Metrics:
    """Of all chunks."""
    state = RunState(open_storage(output), open_run(output).job["fingerprint"])
    return Metrics.sum(
        Metrics.from_json(record.metrics)
        for shard in state.finished_shards()
        for record in state.committed(shard).values()
    )


def work(
    index: int,
    count: int,
    source: Path,
    output: str,
    folder: str,
    options: argparse.Namespace,
    ready: Any,
    ends: Any,
) -> None:
    """A worker's process."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # its summary
    settings = job(index, count, source, output, folder, options)

    def make_engine(loaded: Any, settings: Settings) -> PacedEngine:
        ready.wait()
        return PacedEngine(options.chunk_seconds / TOKENS_A_ROW, settings.engine.max_num_seqs)

    code = ExitCode.BAD_CONFIG
    try:
        code = run_job(settings, load_model=load_tokenizer, make_engine=make_engine)
    finally:
        ends.put((int(code), time.monotonic()))


def job(
    index: int, count: int, source: Path, output: str, folder: str, options: argparse.Namespace
) -> Settings:
    return from_config(
        {
            "model": {"source": "none"},
            "input": {"path": str(source)},
            "output": {
                "path": output,
                "chunk_rows": options.chunk_rows,
                "spool_dir": f"{folder}/spool-{index}",
            },
            "prompt": {"form": "prompt_token_ids"},
            "sampling": {"max_tokens": TOKENS_A_ROW},
            "engine": {"max_num_seqs": options.chunk_rows, "platform": "cpu"},
            "worker": {"index": index, "count": count},
            "progress": "off",
        }
    )


def load_tokenizer(settings: Settings) -> Any:
    """In a model's place: a tokenizer of bytes, which nothing is read with."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"<{i}>": i for i in range(VOCAB_SIZE)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE(vocabulary, [])))
    config = SimpleNamespace(vocab_size=VOCAB_SIZE, max_position_embeddings=1024)
    return SimpleNamespace(tokenizer=tokenizer, config=config, fingerprint="paced")
