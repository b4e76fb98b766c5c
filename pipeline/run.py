"""The job: `python -m pipeline.run input.path=… output.path=…`.

    settings → platform, output, shards (cheap checks first) → model → ledger → engine → worker → summary

Whatever can be refused is refused before anything slow is loaded and before anything is created.
"""

from __future__ import annotations

import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

from engine.errors import RetryLater, TidemillError
from engine.platforms import join_processes, select_platform
from pipeline.audit_mode import gc_job, repair_output, verify_job
from pipeline.compose import compose
from pipeline.exit_codes import ExitCode
from pipeline.explain_mode import explain_job
from pipeline.id_index import IdIndex
from pipeline.job_plan import family_facts, fingerprint_parts, make_plan, package_versions
from pipeline.ledger import Ledger
from pipeline.metrics import ChunkFacts, Metrics, merge_chunks
from pipeline.monitoring import JobMonitoring
from pipeline.openai_batch import answers
from pipeline.plan import RunPlan
from pipeline.planned_reading import PlannedReader
from pipeline.preemption import NoticeWatch, notice_of
from pipeline.progress import Progress
from pipeline.prompts import PromptBuilder
from pipeline.read_ahead import ReadAhead
from pipeline.request_cache import RequestCache, open_request_cache
from pipeline.settings import KNOWN_KEYS, OutputSettings, Settings, as_config, audit_settings, from_config
from pipeline.shards import Shard, list_shards
from pipeline.signals import HandleSignals, StopRequest
from pipeline.spool import open_spool
from pipeline.storage import Storage, open_storage
from pipeline.summary import Outcome, summary_lines
from pipeline.watchdog import StepWatchdog
from pipeline.work_watch import WorkWatch
from pipeline.worker import Worker, WorkResult

LoadModel = Callable[[Settings], Any]
MakeEngine = Callable[[Any, Settings], Any]


@dataclass(frozen=True, slots=True)
class TextSide:
    """The part of a loaded model that prompts are made with."""

    tokenizer: Any
    config: Any
    fingerprint: str | None = None  # of the weights, where they were hashed


def load_model(settings: Settings) -> Any:
    """The model that the settings name: weights, configuration, tokenizer, fingerprint."""
    from engine.start import load_for

    return load_for(settings.engine, settings.model.source, settings.model.revision)


def load_text_side(settings: Settings) -> TextSide:
    """The model's tokenizer and configuration, without its weights."""
    from engine.checkpoints import load_config, load_tokenizer

    source, revision = settings.model.source, settings.model.revision
    return TextSide(load_tokenizer(source, revision=revision), load_config(source, revision=revision))


def load_planned_side(settings: Settings) -> TextSide:
    """The same for a plan for other chips, which can do without a tokenizer: then it is None."""
    from engine.checkpoints import has_tokenizer, load_config

    source, revision = settings.model.source, settings.model.revision
    if settings.plan.topology is None or has_tokenizer(source, revision=revision):
        return load_text_side(settings)
    return TextSide(None, load_config(source, revision=revision))


def describe_model(settings: Settings) -> TextSide:
    """The same with the fingerprint of the weights, which are read but not loaded."""
    from engine.checkpoints import model_fingerprint

    source, revision = settings.model.source, settings.model.revision
    return replace(load_text_side(settings), fingerprint=model_fingerprint(source, revision=revision))


def make_engine(loaded: Any, settings: Settings, lockstep: Any = None) -> Any:
    """An engine with every step compiled. `lockstep`: to the other processes that run it."""
    from engine.collector import spare_long_lived_objects
    from engine.engine import Engine

    engine = Engine(loaded, settings.engine, takes_weights=True, lockstep=lockstep)
    spare_long_lived_objects()
    return engine


def connect_processes(settings: Settings) -> Any:
    """This process's `Lockstep` with the others that run this job's engine; None where it is alone."""
    if settings.engine.coordinator_address is None:
        return None
    from engine.lockstep import connect

    return connect(settings.engine)


def follow(settings: Settings, lockstep: Any, load_model: LoadModel) -> ExitCode:
    """Run the steps of process 0, which alone reads rows and writes results, until it has ended."""
    while lockstep.waits_for_engine():
        make_engine(load_model(settings), settings, lockstep).follow()
    return ExitCode.DONE


def run_job(
    settings: Settings,
    *,
    load_model: LoadModel = load_model,
    make_engine: MakeEngine = make_engine,
    open_ledger: Callable[..., Ledger] = Ledger.open,
    stop: StopRequest | None = None,
) -> ExitCode:
    """Run the job that `settings` describe, or resume it; prints its summary.

    `stop` asks it to drain from another thread; SIGTERM and Ctrl-C always do. Raises TidemillError, with
    nothing half made, for what the user must see to.
    """
    started = time.monotonic()
    with ExitStack() as stack:
        stop = stack.enter_context(HandleSignals(stop or StopRequest(settings.drain_seconds)))
        join_processes(settings.engine)
        preemption = settings.preemption
        stack.enter_context(NoticeWatch(notice_of(preemption), stop, preemption.poll_seconds))
        platform = select_platform(settings.engine.platform, settings.engine.chip)
        lockstep = connect_processes(settings)
        if lockstep is not None:
            if not lockstep.leads:
                return follow(settings, lockstep, load_model)
            stack.callback(lockstep.end)
            make_engine = partial(cast("Any", make_engine), lockstep=lockstep)
        storage = open_output(settings.output)
        storage.check()
        shards = list_shards(settings.input)
        monitoring = stack.enter_context(JobMonitoring(settings.monitoring, settings.progress_line_seconds))
        spool = stack.enter_context(open_spool(settings.output.spool_dir))
        loaded = load_model(settings)
        builder = _prompt_builder(settings, loaded, shards, spool, stack)
        engine = cache(partial(make_engine, loaded, settings))

        def begin() -> RunPlan:
            """Called before anything is created: what the engine refuses leaves nothing behind."""
            plan = make_plan(settings, shards)
            if not stop.is_asked:
                engine()
            return plan

        ledger = stack.enter_context(
            open_ledger(
                storage,
                parts=fingerprint_parts(settings, loaded, builder, shards, platform),
                config=as_config(settings),
                make_plan=begin,
                spool_dir=spool,
                merge_metrics=merge_chunks,
                on_change=settings.resume.on_change,
            )
        )
        result = WorkResult()
        if ledger.unfinished() and not stop.is_asked:
            request_cache = None
            if settings.cache.path is not None:
                facts = family_facts(settings, loaded, platform, engine().stats().device)
                request_cache = open_request_cache(settings.cache.path, facts)
            watch = monitoring.watch(engine(), ledger)
            result = _work(settings, ledger, shards, builder, engine(), stop, spool, watch, request_cache)
        manifest = ledger.finish()
        return _conclude(settings, ledger, result, manifest is not None, stop, time.monotonic() - started)


def open_output(settings: OutputSettings) -> Storage:
    """The storage that results go to."""
    assert settings.path is not None, "only mode=plan does without an output"
    return open_storage(
        settings.path,
        unsafe_single_writer=settings.unsafe_single_writer,
        max_requests_per_second=settings.max_requests_per_second,
    )


def _prompt_builder(
    settings: Settings, loaded: Any, shards: Sequence[Shard], spool: Path, stack: ExitStack
) -> PromptBuilder:
    id_index = None
    if settings.input.id_column is not None:
        id_index = stack.enter_context(IdIndex.build(spool / "ids.sqlite", shards, settings.input))
    return PromptBuilder(
        settings.prompt,
        settings.input,
        loaded.tokenizer,
        settings.sampling,
        max_model_len(settings, loaded),
        vocab_size=loaded.config.vocab_size,
        id_index=id_index,
    )


def max_model_len(settings: Settings, loaded: Any) -> int:
    """Tokens of prompt and output together: what is asked for, or else what the model was made for."""
    return settings.engine.model_len(loaded.config.max_position_embeddings)


def _work(
    settings: Settings,
    ledger: Ledger,
    shards: Sequence[Shard],
    builder: PromptBuilder,
    engine: Any,
    stop: StopRequest,
    spool: Path,
    watch: WorkWatch,
    request_cache: RequestCache | None,
) -> WorkResult:
    stats = engine.stats()
    facts = ChunkFacts(
        attempt=uuid.uuid4().hex[:12],
        device=stats.device,
        versions=package_versions(),
        fingerprint=ledger.fingerprint,
    )
    print(f"engine: {facts.device}", file=sys.stderr, flush=True)
    stop.begin_work()
    created = ledger.plan.created
    planned = PlannedReader(builder, settings.input, ledger, spool, ledger.plan.chunk_rows)
    progress = "off" if settings.monitoring.console else settings.progress
    with StepWatchdog(settings.step_timeout_s) as watchdog, ReadAhead(planned) as reader:
        worker = Worker(
            ledger,
            shards,
            engine,
            reader,
            stop,
            partial(Progress, progress, line_seconds=settings.progress_line_seconds),
            facts,
            watchdog,
            max_num_seqs=settings.engine.max_num_seqs * stats.num_replicas,
            page_size=settings.engine.page_size,
            max_reject_fraction=settings.max_reject_fraction,
            place=settings.worker,
            make_answer=None if created is None else answers(builder.tokenizer, created),
            watch=watch,
            cache=request_cache,
        )
        return worker.run()


def _conclude(
    settings: Settings,
    ledger: Ledger,
    result: WorkResult,
    is_finished: bool,
    stop: StopRequest,
    seconds: float,
) -> ExitCode:
    """Say how it ended, and turn that into the exit code."""
    overall = ledger.metrics_so_far()
    rows_total, url = ledger.plan.num_rows, ledger.storage.url
    code = _exit_code(settings, overall, rows_total, result, is_finished, stop)
    rows = f"{overall.rows_in:,} of {rows_total:,} rows are committed"
    rejected = max(overall.rows_rejected, result.rows_rejected)
    again = "start the same command again"
    headline = {
        ExitCode.DONE: f"Done: {rows_total:,} rows in {ledger.plan.num_shards} shards.",
        ExitCode.TOO_MANY_REJECTS: (
            f"{'Finished' if is_finished else 'Stopped early'}: {rejected:,} of {rows_total:,} "
            f"rows were rejected, over max_reject_fraction={settings.max_reject_fraction:g}. "
            f"See {url}/rejects; correct the input, or raise the limit and {again}."
        ),
        ExitCode.DRAINED: f"Stopped by {stop.cause}: {rows}; {again} to go on.",
        ExitCode.BAD_CONFIG: f"{len(result.failed_shards)} shards could not be finished; {rows}.",
        ExitCode.RETRY_LATER: f"Another process holds the shards that are left; {rows}; {again} later.",
    }[code]
    duplicates = ledger.counts()["duplicates"]
    outcome = Outcome(overall, result.totals, duplicates, rows_total, seconds, url, is_finished)
    print(headline, *summary_lines(outcome), sep="\n", flush=True)
    for error in result.failed_shards.values():
        print("tidemill: error:", error, file=sys.stderr, flush=True)
    return code


def _exit_code(
    settings: Settings,
    overall: Metrics,
    rows_total: int,
    result: WorkResult,
    is_finished: bool,
    stop: StopRequest,
) -> ExitCode:
    if result.failed_shards:
        return ExitCode.BAD_CONFIG
    is_over = overall.rows_rejected > settings.max_reject_fraction * rows_total
    if result.too_many_rejects or (is_over and is_finished):
        return ExitCode.TOO_MANY_REJECTS
    if is_finished:
        return ExitCode.DONE
    return ExitCode.DRAINED if stop.is_asked else ExitCode.RETRY_LATER


def main(arguments: Sequence[str] | None = None) -> int:
    """Compose, run, and turn every expected error into one line and an exit code."""
    try:
        arguments = sys.argv[1:] if arguments is None else arguments
        config = compose(["gc.remove=true" if each == "--yes" else each for each in arguments], KNOWN_KEYS)
        return ExitCode.DONE if config is None else _start(config)
    except RetryLater as error:
        return _fail(error, ExitCode.RETRY_LATER)
    except TidemillError as error:
        return _fail(error, ExitCode.BAD_CONFIG)
    except KeyboardInterrupt:  # before the job's own handling began: nothing is there to drain
        return ExitCode.STOPPED_AT_ONCE


def _start(config: Mapping[str, Any]) -> ExitCode:
    """Do what the mode says."""
    mode = config.get("mode")
    if mode in ("verify", "gc"):
        audit = audit_settings(config)
        storage = open_output(audit.output)
        return verify_job(storage, audit.output.spool_dir) if mode == "verify" else gc_job(storage, audit.gc)
    settings = from_config(config)
    if mode == "plan":
        from pipeline.plan_mode import plan_job

        return plan_job(
            settings, load_model=load_model, load_text_side=load_planned_side, make_engine=make_engine
        )
    if mode == "explain":
        return explain_job(settings, open_output(settings.output), describe_model(settings))
    if mode == "repair":
        repair_output(open_output(settings.output), settings.output.spool_dir)
    return run_job(settings)


def _fail(error: TidemillError, code: ExitCode) -> ExitCode:
    print("tidemill: error:", " ".join(str(error).split()), file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
