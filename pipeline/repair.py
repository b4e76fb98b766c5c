"""`mode=repair`: take away what is missing or damaged, and all that was made from it; the job then makes it
again.

Only what `pipeline/verify.py` found is touched, with the shard's lease held, so that no other worker is at
it. Removal goes from the top down (manifest, shard record, final files, commit record, the chunk's files): a
repair that is cut short leaves a run that goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from engine.errors import OutputError, RetryLater
from pipeline.commits import retrying
from pipeline.lease_book import TAKEOVER_S, LeaseBook
from pipeline.manifest import part_name
from pipeline.plan import RunPlan
from pipeline.process_identity import ProcessIdentity
from pipeline.run_state import MANIFEST, RunState
from pipeline.storage import Storage
from pipeline.verify import KINDS, Finding

_POLL_SECONDS = 2.0


def repair(
    storage: Storage,
    fingerprint: str,
    findings: Sequence[Finding],
    *,
    patience_s: float = TAKEOVER_S + 30.0,
    sleep: Callable[[float], None] = time.sleep,
) -> list[str]:
    """Remove what has to be made again; its paths. `patience_s`: how long a shard's holder is waited for.

    Raises RetryLater when another worker holds a damaged shard, OutputError for what is not this program's to
    remove.
    """
    foreign = [finding.path for finding in findings if finding.is_foreign]
    if foreign:
        raise OutputError(
            f"{storage.url}/{foreign[0]} is not of this run and is not removed; move it away and start again"
        )
    state = RunState(storage, fingerprint)
    plan_path = state.path("plan.json")
    if any(finding.path == plan_path for finding in findings):
        return _remove(storage, [plan_path])  # the job plans anew, and then the rest can be verified
    plan = state.plan()
    assert plan is not None, "verified"
    removed = _remove(storage, [MANIFEST])
    by_shard: dict[int, list[Finding]] = {}
    for finding in findings:
        if finding.shard is not None:
            by_shard.setdefault(finding.shard, []).append(finding)
    leases = LeaseBook(storage, state.folder, owner=ProcessIdentity.of_this_process())
    try:
        for shard, found in sorted(by_shard.items()):
            _wait_for_lease(leases, storage, shard, patience_s, sleep)
            removed += _remove(storage, _paths(storage, state, plan, shard, found))
    finally:
        leases.close()
    return removed


def _wait_for_lease(
    leases: LeaseBook, storage: Storage, shard: int, patience_s: float, sleep: Callable[[float], None]
) -> None:
    waited = 0.0
    while leases.claim(shard) is None:
        if waited >= patience_s:
            raise RetryLater(
                f"{storage.url}: another worker holds shard {shard}, which is damaged; stop it, or let it "
                "end, and start the same command again"
            )
        sleep(_POLL_SECONDS)
        waited += _POLL_SECONDS


def _paths(
    storage: Storage, state: RunState, plan: RunPlan, shard: int, findings: Iterable[Finding]
) -> list[str]:
    """What has to go of a shard, top down."""
    final, commits, files = [], [], []
    for finding in findings:
        if finding.chunk is None:
            # The record goes too: of a file and what is on record of it, either may be the one that is wrong.
            final += [state.shard_path(shard), finding.path]
            continue
        # With a chunk go all files made of it: another attempt at it has other times and, where a device's
        # results depend on the batch, other tokens.
        final += [state.shard_path(shard)]
        final += [part_name(kind, shard, plan.num_shards, plan.output_format) for kind in KINDS]
        commits.append(state.commit_path(shard, finding.chunk))
        prefix = f"{finding.chunk:05d}-"
        names = state.list("chunks", f"{shard:05d}")
        files += [state.path("chunks", f"{shard:05d}", name) for name in names if name.startswith(prefix)]
    return list(dict.fromkeys([*final, *commits, *files]))


def _remove(storage: Storage, paths: Iterable[str]) -> list[str]:
    """Remove objects; those that were there."""
    removed = []
    for path in paths:
        if retrying(lambda path=path: storage.size(path)) is not None:
            retrying(lambda path=path: storage.discard(path))
            removed.append(path)
    return removed
