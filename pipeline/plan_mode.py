"""`mode=plan`: read and tokenise everything, generate nothing, and say what a run would do.

Only a short warm-up runs on the engine, to measure its speed; where the platform asked for is not there, the
plan is given without an estimate of time.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from engine.errors import ConfigError, OutputError
from engine.platforms import select_platform
from pipeline.exit_codes import ExitCode
from pipeline.id_index import IdIndex
from pipeline.job_plan import make_plan
from pipeline.plan_report import Estimate, Measured, RowsPlan, ShardPlan, as_json, report_lines
from pipeline.planned_reading import BATCH_ROWS
from pipeline.prompts import PromptBuilder
from pipeline.read_ahead import batches
from pipeline.rows import Prompt, Reject
from pipeline.settings import Settings
from pipeline.shards import Shard, list_shards, read_rows
from pipeline.shared_prefixes import SharedPrefixes
from pipeline.spool import open_spool

# The warm-up: prompts for this many full steps of prefill (one prompt at least), then so many decode steps.
PREFILL_STEPS = 4
DECODE_STEPS = 8


def plan_job(
    settings: Settings,
    *,
    load_model: Callable[[Settings], Any],
    load_text_side: Callable[[Settings], Any],
    make_engine: Callable[[Any, Settings], Any],
) -> ExitCode:
    """Print the plan of a job, and write it as JSON where `plan.json` says.

    `load_text_side` gives the model's tokenizer and config alone, for a plan without a measurement.
    """
    with ExitStack() as stack:
        missing_platform = _missing_platform(settings)
        shards = list_shards(settings.input)
        measures = settings.plan.measure and missing_platform is None
        loaded = load_model(settings) if measures else load_text_side(settings)
        id_index = None
        if settings.input.id_column is not None:
            spool = stack.enter_context(open_spool(settings.output.spool_dir))
            id_index = stack.enter_context(IdIndex.build(spool / "ids.sqlite", shards, settings.input))
        builder = PromptBuilder(
            settings.prompt,
            settings.input,
            loaded.tokenizer,
            settings.sampling,
            settings.engine.model_len(loaded.config.max_position_embeddings),
            vocab_size=loaded.config.vocab_size,
            id_index=id_index,
        )
        make_plan(settings, shards)  # refuses what a run would refuse
        shared = SharedPrefixes()
        rows, sample = read_all(settings, shards, builder, shared)
        measured = None
        if measures and sample:
            measured = measure(make_engine(loaded, settings), sample, settings.engine.max_num_seqs)
    estimate = None if measured is None else estimate_run(settings, rows, shared, measured)
    report = as_json(settings, rows, shared, measured, estimate)
    if settings.plan.json is not None:
        _write(Path(settings.plan.json), report)
    print(*report_lines(settings, rows, shared, measured, estimate, missing_platform), sep="\n", flush=True)
    return ExitCode.DONE


def _missing_platform(settings: Settings) -> str | None:
    """Why the engine cannot be started here, or None."""
    try:
        select_platform(settings.engine.platform)
    except ConfigError as error:
        return str(error)
    return None


def read_all(
    settings: Settings,
    shards: Sequence[Shard],
    builder: PromptBuilder,
    shared: SharedPrefixes,
) -> tuple[RowsPlan, list[Prompt]]:
    """Every row, once; and the first prompts, for the warm-up."""
    plan, sample, num_sampled = RowsPlan(), [], 0
    most = PREFILL_STEPS * settings.engine.max_num_batched_tokens
    for shard in shards:
        num_rows = num_rejected = 0
        rows = read_rows(shard, settings.input, columns=builder.columns_needed)
        for batch in batches(rows, BATCH_ROWS):
            for item in builder.build_many(batch):
                num_rows += 1
                shared.add(item)
                if isinstance(item, Reject):
                    num_rejected += 1
                    plan.rejected_by_reason[item.reason] = plan.rejected_by_reason.get(item.reason, 0) + 1
                    continue
                plan.add(item)
                if num_sampled < most and len(sample) < settings.engine.max_num_seqs:
                    sample.append(item)
                    num_sampled += len(item.token_ids)
        shared.end_shard()
        plan.shards.append(ShardPlan(shard.name, num_rows, num_rejected))
    return plan, sample


def measure(engine: Any, sample: Sequence[Prompt], max_num_seqs: int) -> Measured:
    """Prefill these prompts once, then decode a few tokens of as many sequences as run together.

    The sequences are samples of the same prompts, which share the prompts' pages: only decoding is added.
    """
    before = engine.stats()
    started = time.perf_counter()
    _run(engine, sample, max_tokens=1, num_samples=1)
    seconds = time.perf_counter() - started
    prefilled = engine.stats().num_computed_tokens - before.num_computed_tokens
    num_samples = max(1, max_num_seqs // len(sample))
    _run(engine, sample, max_tokens=DECODE_STEPS + 1, num_samples=num_samples)
    stats = engine.stats()
    # The last steps decode all sequences together; the first still fill in what was not cached.
    steps = stats.step_seconds[-DECODE_STEPS:]
    return Measured(
        device=stats.device,
        num_pages=engine.num_pages,
        prefill_tokens_per_second=prefilled / max(seconds, 1e-9),
        decode_step_seconds=statistics.median(steps) if steps else seconds,
        num_sequences=len(sample) * num_samples,
    )


def _run(engine: Any, sample: Sequence[Prompt], max_tokens: int, num_samples: int) -> None:
    for number, prompt in enumerate(sample):
        sampling = prompt.sampling.replace(
            n=num_samples, max_tokens=max_tokens, min_tokens=0, ignore_eos=True, stop=(), stop_token_ids=()
        )
        engine.add_request(
            f"plan:{max_tokens}:{number}", prompt_token_ids=prompt.token_ids, sampling=sampling
        )
    while engine.has_unfinished:
        engine.step()


def estimate_run(settings: Settings, rows: RowsPlan, shared: SharedPrefixes, measured: Measured) -> Estimate:
    """Prefill of what is not shared at the measured rate, then decoding in full batches.

    An upper bound: prefill chunks ride in decode steps, and are counted here as if they had their own.
    """
    to_prefill = shared.num_tokens - shared.num_shared
    width = max(1, min(settings.engine.max_num_seqs, rows.num_sequences))
    decode_steps = -(-rows.max_generated_tokens // width)
    prefill_steps = -(-to_prefill // settings.engine.max_num_batched_tokens)
    seconds = to_prefill / max(measured.prefill_tokens_per_second, 1e-9)
    seconds += decode_steps * measured.decode_step_seconds
    return Estimate(steps=decode_steps + prefill_steps, seconds=seconds)


def _write(path: Path, report: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"plan.json={path}: cannot be written ({error.strerror}): name another file"
        ) from error
