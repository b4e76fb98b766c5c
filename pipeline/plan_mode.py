"""`mode=plan`: read and tokenise everything, generate nothing, and say what a run would do.

Only a short warm-up runs on the engine, to measure its speed, where the platform asked for is there. For the
chips of `plan.topology` memory and time are worked out on any machine (`pipeline/plan_chips.py`).
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
from pipeline.device_estimate import Work
from pipeline.exit_codes import ExitCode
from pipeline.id_index import IdIndex
from pipeline.job_plan import make_plan
from pipeline.plan_chips import plan_chips, report_chips
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

PLAN_VERSION = 2
NO_TOKENIZER = "Plan: rows were not read, because the model comes without a tokenizer. Nothing was generated."


def plan_job(
    settings: Settings,
    *,
    load_model: Callable[[Settings], Any],
    load_text_side: Callable[[Settings], Any],
    make_engine: Callable[[Any, Settings], Any],
) -> ExitCode:
    """Print the plan of a job, and write it as JSON where `plan.json` says.

    `load_text_side` gives the model's tokenizer and config alone, for a plan without a measurement; without a
    tokenizer (None) no row is read. Raises ConfigError, after the report, when the model does not fit the
    planned chips.
    """
    with ExitStack() as stack:
        missing_platform = _missing_platform(settings)
        shards = list_shards(settings.input)
        measures = settings.plan.measure and missing_platform is None
        loaded = load_model(settings) if measures else load_text_side(settings)
        chips = plan_chips(settings, loaded.config)
        shared, rows, sample = SharedPrefixes(), None, []
        if loaded.tokenizer is not None:
            builder = _prompt_builder(settings, loaded, shards, stack)
            make_plan(settings, shards)  # refuses what a run would refuse
            rows, sample = read_all(settings, shards, builder, shared)
        measured = None
        if measures and sample:
            measured = measure(make_engine(loaded, settings), sample, settings.engine.max_num_seqs)
    estimate = None if measured is None or rows is None else estimate_run(settings, rows, shared, measured)
    devices = None if chips is None else report_chips(settings, chips, _work(rows, shared))
    report = {
        "plan_version": PLAN_VERSION,
        "rows_read": rows is not None,
        **as_json(settings, rows or RowsPlan(), shared, measured, estimate),
        "device": None if devices is None else devices.as_json(),
    }
    lines = [NO_TOKENIZER]
    if rows is not None:
        why = missing_platform if devices is None else None
        lines = report_lines(settings, rows, shared, measured, estimate, why)
    if devices is not None:
        lines += devices.lines()
    if settings.plan.json == "-":
        lines = [json.dumps(report, indent=1)]
    elif settings.plan.json is not None:
        _write(Path(settings.plan.json), report)
    print(*lines, sep="\n", flush=True)
    if devices is not None and (refusal := devices.refusal()) is not None:
        raise ConfigError(refusal)
    return ExitCode.DONE


def _prompt_builder(
    settings: Settings, loaded: Any, shards: Sequence[Shard], stack: ExitStack
) -> PromptBuilder:
    id_index = None
    if settings.input.id_column is not None:
        spool = stack.enter_context(open_spool(settings.output.spool_dir))
        id_index = stack.enter_context(IdIndex.build(spool / "ids.sqlite", shards, settings.input))
    return PromptBuilder(
        settings.prompt,
        settings.input,
        loaded.tokenizer,
        settings.sampling,
        settings.engine.model_len(loaded.config.max_position_embeddings),
        vocab_size=loaded.config.vocab_size,
        id_index=id_index,
    )


def _work(rows: RowsPlan | None, shared: SharedPrefixes) -> Work | None:
    if rows is None:
        return None
    return Work(
        num_sequences=rows.num_sequences,
        num_prompt_tokens=shared.num_tokens,
        num_shared_tokens=shared.num_shared,
        num_generated_tokens=rows.max_generated_tokens,
    )


def _missing_platform(settings: Settings) -> str | None:
    """Why the engine cannot be started here, or None."""
    try:
        select_platform(settings.engine.platform, settings.engine.chip)
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
            n=num_samples,
            max_tokens=max_tokens,
            min_tokens=0,
            ignore_eos=True,
            stop=(),
            stop_token_ids=(),
            structured=None,  # it could end before the steps that are timed
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
