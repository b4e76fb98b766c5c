"""One batch as a run of the pipeline, and its output and error files from what the run committed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from engine.async_engine import AsyncEngine
from engine.errors import OutputError, RetryLater
from engine.sampling_params import SamplingParams
from engine.server.batches.backend import Batch, RequestCounts
from jobs.batches.shared_engine import SharedEngine
from pipeline.exit_codes import ExitCode
from pipeline.openai_batch import error_line, not_run_line, output_line
from pipeline.results import Run, open_run
from pipeline.rows import Reject
from pipeline.run import TextSide, run_job
from pipeline.settings import ModelSettings, OutputSettings, Settings
from pipeline.shards import InputSettings, list_shards, read_rows
from pipeline.signals import StopRequest

CHUNK_ROWS = 8
"""Rows committed together, in batches of up to MAX_CHUNKS such chunks: what a cancelled batch keeps comes in
them."""
MAX_CHUNKS = 1024
COMPLETION_TOKENS = 16
"""OpenAI's `max_tokens` of a completion that gives none; a chat goes on as far as fits."""
STEP_TIMEOUT_S = 3600.0

NOT_RUN = {
    "cancelled": ("batch_cancelled", "The batch was cancelled before this request was finished."),
    "expired": ("batch_expired", "This request was not finished before the completion window ended."),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchModel:
    """A model that batches may name: the server's engine, and what its weights are known by."""

    engine: AsyncEngine
    fingerprint: str


def run_batch(batch: Batch, folder: Path, model: BatchModel, stop: StopRequest) -> bool:
    """Run what is left of a batch; whether nothing is. Raises TidemillError where it cannot go on."""
    engine = model.engine.engine
    settings = batch_settings(batch, folder, model)
    side = TextSide(engine.tokenizer, engine.model_config, model.fingerprint)

    def make_engine(loaded: Any, settings: Settings) -> SharedEngine:
        made.append(SharedEngine(model.engine, cache_salt=batch.tenant))
        return made[-1]

    made: list[SharedEngine] = []
    try:
        code = run_job(settings, load_model=lambda _: side, make_engine=make_engine, stop=stop)
    finally:
        for shared in made:
            shared.close()
    if code == ExitCode.DRAINED:
        return False
    if code == ExitCode.RETRY_LATER:
        raise RetryLater(f"another process holds the run of {batch.id}")
    if code != ExitCode.DONE:
        raise OutputError(f"the run of {batch.id} ended with {code!r}")
    return True


def batch_settings(batch: Batch, folder: Path, model: BatchModel) -> Settings:
    """The job that a batch is."""
    engine = model.engine.engine
    longest = engine.max_model_len - 1
    is_completion = batch.endpoint == "/v1/completions"
    return Settings(
        model=ModelSettings(source=batch.model or ""),
        input=InputSettings(
            path=str(folder / "input.jsonl"),
            format="openai_batch",
            endpoint=batch.endpoint,
            served_model=batch.model,
        ),
        output=OutputSettings(
            path=str(folder / "run"),
            format="openai_batch",
            created=batch.created_at,
            chunk_rows=max(CHUNK_ROWS, math.ceil(batch.counts.total / MAX_CHUNKS)),
        ),
        sampling=SamplingParams(max_tokens=min(COMPLETION_TOKENS, longest) if is_completion else longest),
        engine=replace(engine.config, max_model_len=engine.max_model_len),
        max_reject_fraction=1.0,
        step_timeout_s=STEP_TIMEOUT_S,
        progress="off",
    )


def opened_run(folder: Path) -> Run | None:
    """A batch's run; None where it has not begun."""
    return open_run(folder / "run") if (folder / "run" / "job.json").exists() else None


def counts_so_far(folder: Path, total: int) -> RequestCounts:
    """What of a batch is committed."""
    run = opened_run(folder)
    if run is None:
        return RequestCounts(total=total)
    counts = run.counts()
    return RequestCounts(
        total=total, completed=counts["ok"] + counts["duplicates"], failed=counts["rejected"]
    )


def tokens_used(folder: Path) -> tuple[int, int]:
    """Tokens of the prompts and of the completions that are committed."""
    run = opened_run(folder)
    counts = {} if run is None else run.counts()
    return counts.get("prompt_tokens", 0), counts.get("generated_tokens", 0)


def write_outputs(folder: Path, output: BinaryIO, errors: BinaryIO, ended_as: str) -> RequestCounts:
    """Write the output and the error file, in input order, of what is committed; the numbers of their lines.

    ended_as: "completed", or a key of NOT_RUN, which is then the error of each row that has no result.
    """
    run = opened_run(folder)
    done: set[str] = set()
    rejects: dict[int, dict[str, Any]] = {}
    if run is not None:
        rejects = {reject["position"]: reject for reject in run.rejects()}
        for row in run.rows(["row_id", "response"]):
            if row["response"] is not None:
                output.write(output_line(row["row_id"], row["response"]).encode())
                done.add(row["row_id"])
    num_errors = 0
    for line in _error_lines(folder / "input.jsonl", done, rejects, ended_as):
        errors.write(line.encode())
        num_errors += 1
    return RequestCounts(total=len(done) + num_errors, completed=len(done), failed=num_errors)


def _error_lines(
    path: Path, done: set[str], rejects: dict[int, dict[str, Any]], ended_as: str
) -> Iterator[str]:
    settings = InputSettings(path=str(path), format="openai_batch")
    [shard] = list_shards(settings)
    for row in read_rows(shard, settings, columns=["custom_id"]):
        if row.position in rejects:
            yield error_line(rejects[row.position])
            continue
        custom_id = None if isinstance(row, Reject) else row.columns.get("custom_id")
        if custom_id in done:
            continue
        if ended_as not in NOT_RUN:
            raise OutputError(f"{path}: row {row.position} of a finished run is missing; verify the run")
        yield not_run_line(custom_id, row.position, *NOT_RUN[ended_as])


make_stop = partial(StopRequest, 10.0)
"""What asks a batch to stop. The chunks whose rows are all begun have so many seconds to be finished."""
