"""job.json: what an output folder is, and whether it is this run's.

A folder belongs to the first fingerprint that was written there. Another one is refused, with what
differs, or forks into a folder of its own inside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import ConfigError, OutputError
from pipeline.commits import publish_record, retrying
from pipeline.fingerprint import Fingerprint, canonical_json, readable_json, redact
from pipeline.plan import RunPlan
from pipeline.run_state import JOB, JOB_VERSION, RunState, read_job
from pipeline.schema import SCHEMA_VERSION
from pipeline.storage import Storage

_OURS = ("data", "rejects", "trace", "metrics", "_state")


@dataclass(frozen=True, slots=True)
class BegunRun:
    """A run whose job.json and plan are there. `state.storage` is a fork's folder when `is_fork`."""

    state: RunState
    plan: RunPlan
    is_fork: bool


def begin_run(
    storage: Storage,
    wanted: Fingerprint,
    config: Mapping[str, Any],
    make_plan: Callable[[], RunPlan],
    on_change: str,
) -> BegunRun:
    """Begin a run or find it begun. `make_plan` is called when it has no plan, before anything is created.

    Raises OutputError when the folder is another run's and `on_change` is "refuse", or is no output at all.
    """
    if on_change not in ("refuse", "fork"):
        raise ConfigError(f"resume.on_change is {on_change!r}; it must be 'refuse' or 'fork'")
    storage.check()
    is_fork = False
    job = read_job(storage)
    if job is not None and job["fingerprint"] != wanted.id:
        if on_change == "refuse":
            raise _belongs_to_another(storage, wanted, job)
        storage, is_fork = storage.subfolder(_fork_name(wanted)), True
        job = read_job(storage)
    if job is None:
        _refuse_foreign(storage)
    state = RunState(storage, wanted.id)
    plan = state.plan() or make_plan()
    publish_record(storage, JOB, _job_bytes(wanted, config))
    job = read_job(storage)
    if job is None or job["fingerprint"] != wanted.id:
        # Somebody began another run here a moment ago, or a fork's eight digits are taken.
        raise _belongs_to_another(storage, wanted, job or {"fingerprint": "", "parts": {}})
    publish_record(storage, state.path("plan.json"), canonical_json(plan.to_json()))
    return BegunRun(state, state.plan() or plan, is_fork)


def _fork_name(fingerprint: Fingerprint) -> str:
    return f"fork-{fingerprint.id[:8]}"


def _job_bytes(fingerprint: Fingerprint, config: Mapping[str, Any]) -> bytes:
    return readable_json(
        {
            "job_version": JOB_VERSION,
            "schema_version": SCHEMA_VERSION,
            "fingerprint": fingerprint.id,
            "parts": fingerprint.to_json(),
            "config": redact(config),
        }
    )


def _refuse_foreign(storage: Storage) -> None:
    """A folder with our names in it and no job.json is not ours to write to."""
    found = [name for name in _OURS if retrying(lambda name=name: storage.list(name))]
    # Looked at again: another worker may have begun the run meanwhile, and job.json comes before all else.
    if found and read_job(storage) is None:
        raise OutputError(
            f"{storage.url} holds {found[0]}/ but no job.json, so it is not an output of this program; "
            "choose an empty folder as output.path"
        )


def _belongs_to_another(storage: Storage, wanted: Fingerprint, job: Mapping[str, Any]) -> OutputError:
    state = RunState(storage, job["fingerprint"])
    plan = state.plan()
    num_chunks = sum(state.num_committed(shard) for shard in range(plan.num_shards)) if plan else 0
    return OutputError(
        f"{storage.url} belongs to another configuration: {wanted.difference(job['parts'])}; going on would "
        f"invalidate its {len(state.finished())} finished shards and {num_chunks} committed chunks: choose "
        "another output.path, or keep them and set resume.on_change=fork to write to "
        f"{_fork_name(wanted)}/ inside it"
    )
