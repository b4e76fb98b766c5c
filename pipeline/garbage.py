"""`mode=gc`: what dead workers left behind, found and, if told so, removed.

Attempts at chunks that no commit record names, rows cut short of chunks that are committed, temporary files,
uploads in parts that nobody goes on with.
Only what is older than a given age is taken, since a younger one may be an attempt that is about to be
committed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from engine.errors import OutputError
from pipeline.commits import retrying
from pipeline.run_state import RunState, read_job
from pipeline.storage import Storage


@dataclass(frozen=True, slots=True)
class Garbage:
    """Paths in the output that nothing refers to, and unfinished uploads as the storage names them."""

    attempts: tuple[str, ...]
    leftovers: tuple[str, ...]

    @property
    def is_empty(self) -> bool:
        return not self.attempts and not self.leftovers


def find_garbage(storage: Storage, min_age_s: float) -> Garbage:
    """What is at least so many seconds old. Raises OutputError when the folder is no output."""
    job = read_job(storage)
    if job is None:
        raise OutputError(f"{storage.url} holds no job.json, so it is not an output of Tidemill")
    attempts = tuple(_attempts(RunState(storage, job["fingerprint"]), min_age_s))
    return Garbage(attempts, tuple(retrying(lambda: storage.leftovers(min_age_s))))


def remove_garbage(storage: Storage, garbage: Garbage) -> None:
    """Remove what was found; safe to repeat."""
    for path in garbage.attempts:
        retrying(lambda path=path: storage.discard(path))
    for name in garbage.leftovers:
        retrying(lambda name=name: storage.remove_leftover(name))


def _attempts(state: RunState, min_age_s: float) -> Iterator[str]:
    plan = state.plan()
    for shard in range(plan.num_shards if plan else 0):
        folder = state.path("chunks", f"{shard:05d}")
        # Before the records that may name them.
        ages = retrying(lambda folder=folder: state.storage.ages(folder))
        kept = {
            ref.path
            for record in state.committed(shard).values()
            for ref in (record.data, record.trace, record.rejects)
            if ref is not None
        }
        for name, age in sorted(ages.items()):
            if age >= min_age_s and f"{folder}/{name}" not in kept:
                yield f"{folder}/{name}"
        yield from _partials(state, shard, min_age_s)


def _partials(state: RunState, shard: int, min_age_s: float) -> Iterator[str]:
    """Rows that were cut short, of chunks that are committed by now."""
    folder = state.path("partials", f"{shard:05d}")
    ages = retrying(lambda: state.storage.ages(folder))
    committed = {f"{chunk:05d}" for chunk in state.committed_chunks(shard)} if ages else set()
    for name, age in sorted(ages.items()):
        if age >= min_age_s and name.partition("-")[0] in committed:
            yield f"{folder}/{name}"
