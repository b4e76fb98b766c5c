"""How far a run in progress is, for somebody who watches it: read again and again, each record once.

A look lists the folder of claims, and of each shard that was claimed and is not whole yet the commits: no
more folders than workers, however many shards there are. Only the first look goes over everything.
"""

from __future__ import annotations

from pipeline.commits import CommitRecord
from pipeline.exact_duplicates import num_duplicates
from pipeline.metrics import Metrics
from pipeline.plan import RunPlan
from pipeline.progress import Standing
from pipeline.run_state import MANIFEST, RunState
from pipeline.storage import Storage
from pipeline.summary import Outcome


class LiveRun:
    """Watches the run of one fingerprint. `overall` counts all that is committed, `here` what was since this
    was made; both as of the last `look`.
    """

    def __init__(self, storage: Storage, fingerprint: str, plan: RunPlan):
        self.storage = storage
        self.plan = plan
        self.overall = Metrics()
        self.here = Metrics()
        self._state = RunState(storage, fingerprint)
        self._seen: dict[int, set[int]] = {}  # chunks counted, of shards that are not whole yet
        self._keys: dict[int, list[bytes]] = {}
        self._whole: set[int] = set()
        self._num_duplicates = 0
        self.look()
        self.here = Metrics()

    @classmethod
    def open(cls, storage: Storage, fingerprint: str) -> LiveRun | None:
        """None while the run has no plan yet."""
        plan = RunState(storage, fingerprint).plan()
        return None if plan is None else cls(storage, fingerprint, plan)

    def look(self) -> None:
        """Count what was committed since the last look."""
        for name in self._state.list("claims"):
            shard = int(name)
            if shard not in self._whole:
                self._look_at(shard)

    def _look_at(self, shard: int) -> None:
        seen = self._seen.setdefault(shard, set())
        keys = self._keys.setdefault(shard, [])
        for chunk in self._state.committed_chunks(shard):
            if chunk in seen:
                continue
            # Not kept by RunState: of a long run there are very many.
            path = self._state.commit_path(shard, chunk)
            record = CommitRecord.from_bytes(self._state.read(path) or b"", f"{self.storage.url}/{path}")
            metrics = Metrics.from_json(record.metrics)
            self.overall.merge(metrics)
            self.here.merge(metrics)
            keys.append(record.duplicate_keys)
            seen.add(chunk)
        if len(seen) == self.plan.num_chunks(shard):
            self._num_duplicates += num_duplicates(keys)
            self._whole.add(shard)
            del self._seen[shard], self._keys[shard]

    @property
    def is_finished(self) -> bool:
        return self.storage.size(MANIFEST) is not None

    def standing(self) -> Standing:
        """For a progress line: rows of the whole run, tokens since this was made."""
        return Standing(
            rows_done=self.overall.rows_in,
            rows_total=self.plan.num_rows,
            rows_rejected=self.overall.rows_rejected,
            prompt_tokens=self.here.prompt_tokens,
            cached_tokens=self.here.cached_tokens,
            generated_tokens=self.here.generated_tokens,
        )

    def outcome(self, seconds: float) -> Outcome:
        """For the summary; rates are over `seconds`, for several workers' times do not add up to one."""
        here = Metrics.sum([self.here])
        here.wall_seconds = here.compile_seconds = 0.0
        return Outcome(
            overall=self.overall,
            here=here,
            duplicates=self._num_duplicates + sum(map(num_duplicates, self._keys.values())),
            rows_total=self.plan.num_rows,
            seconds=seconds,
            output=self.storage.url,
            is_finished=self.is_finished,
        )
