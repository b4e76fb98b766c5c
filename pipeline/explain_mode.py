"""`mode=explain`: the state of each shard, who holds it, and what the given command would invalidate.

Nothing is loaded but the model's tokenizer and configuration; its weights are hashed where they lie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.platforms import select_platform
from pipeline.exit_codes import ExitCode
from pipeline.fingerprint import Fingerprint, canonical_json
from pipeline.job_plan import fingerprint_parts
from pipeline.prompts import PromptBuilder
from pipeline.results import Run, ShardState
from pipeline.run_state import RunState, read_job
from pipeline.settings import Settings
from pipeline.shards import Shard, list_shards
from pipeline.storage import Storage


def explain_job(settings: Settings, storage: Storage, model: Any) -> ExitCode:
    """Print the explanation. `model` has the `tokenizer`, `config` and `fingerprint` of a loaded one.

    Raises InputError or ConfigError for a command that could not be started either.
    """
    shards = list_shards(settings.input)
    job = read_job(storage)
    if job is None:
        print(f"{storage.url}: nothing is there yet; the command would begin a run of {len(shards)} shards")
        return ExitCode.DONE
    wanted = Fingerprint.of(_parts(settings, model, shards))
    run = Run(storage, job)
    states = run.state()
    print(f"{storage.url}: {'finished' if run.is_finished else 'in progress'}, run {job['fingerprint']}")
    now = {shard.name: shard for shard in shards}
    planned = RunState(storage, job["fingerprint"]).plan()
    versions = {each.name: each.version for each in planned.shards} if planned else {}
    for state in states:
        print("  " + _shard_line(state, _input_change(state.name, versions, now)))
    for name in sorted(set(now) - set(versions)):
        print(f"  new   {name}: not in this run")
    print(*_verdict(wanted, job, states), sep="\n", flush=True)
    return ExitCode.DONE


def _parts(settings: Settings, model: Any, shards: Sequence[Shard]) -> dict[str, Any]:
    builder = PromptBuilder(
        settings.prompt,
        settings.input,
        model.tokenizer,
        settings.sampling,
        settings.engine.model_len(model.config.max_position_embeddings),
        vocab_size=model.config.vocab_size,
        id_index=None,
    )
    return fingerprint_parts(
        settings, model, builder, shards, select_platform(settings.engine.platform, settings.engine.chip)
    )


def _input_change(
    name: str, versions: Mapping[str, Mapping[str, Any]], now: Mapping[str, Shard]
) -> str | None:
    """What became of a shard's input since it was planned; None when nothing did."""
    if name not in now:
        return "its input is gone"
    before, after = versions[name], now[name].version
    if canonical_json(before) == canonical_json(after):
        return None
    changed = [key for key in sorted({*before, *after}) if before.get(key) != after.get(key)]
    return "its input changed: " + ", ".join(
        f"{key} {before.get(key)} -> {after.get(key)}" for key in changed
    )


def _shard_line(state: ShardState, change: str | None) -> str:
    parts = [
        f"{state.shard:>5} {state.name}: {state.state}",
        f"{state.num_rows_committed:,} of {state.num_rows:,} rows in {state.num_chunks_committed} of "
        f"{state.num_chunks} chunks",
    ]
    if state.holder is not None:
        parts.append(f"held by {state.holder}")
    if change is not None:
        parts.append(change)
    return "; ".join(parts)


def _verdict(wanted: Fingerprint, job: Mapping[str, Any], states: Sequence[ShardState]) -> list[str]:
    if wanted.id == job["fingerprint"]:
        left = sum(state.state != "finished" for state in states)
        return [f"This command goes on with the run: {left} of {len(states)} shards are left."]
    num_finished = sum(state.state == "finished" for state in states)
    num_chunks = sum(state.num_chunks_committed for state in states)
    num_rows = sum(state.num_rows_committed for state in states)
    return [
        f"This command is refused: {wanted.difference(job['parts'])}.",
        f"Every result depends on that: going on would invalidate {num_finished} finished shards and "
        f"{num_chunks} committed chunks ({num_rows:,} rows). resume.on_change=fork begins anew beside them.",
    ]
