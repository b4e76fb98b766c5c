"""How far a run is: what earlier attempts committed, what this one did, and what its open chunks hold."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from pipeline.metrics import Metrics
from pipeline.progress import Standing

# Below this many rejects an input is too small to be worth stopping early: it is finished and reported whole.
REJECTS_BEFORE_STOPPING = 1000


class Tally:
    """Counts rows over all shards. `before` are the ledger's counts when this attempt began."""

    def __init__(self, before: Mapping[str, int], rows_total: int, max_reject_fraction: float):
        self._before = before
        self._rows_total = rows_total
        self._max_rejects = max_reject_fraction * rows_total
        self.totals = Metrics()
        """What this attempt committed."""

    def commit(self, metrics: Metrics) -> None:
        """Count a chunk that is now committed."""
        self.totals.merge(metrics)

    def is_over_limit(self, opened: Collection[Metrics]) -> bool:
        """So many rejects that the limit is passed whatever the rest brings, in an input worth stopping."""
        rejected = self._rows_rejected(opened)
        return rejected >= REJECTS_BEFORE_STOPPING and rejected > self._max_rejects

    def standing(self, opened: Collection[Metrics]) -> Standing:
        """How far the run is, the rows in open chunks (`opened`: their metrics) included."""
        here = [self.totals, *opened]
        return Standing(
            rows_done=self._before["rows"] + sum(metrics.rows_in for metrics in here),
            rows_total=self._rows_total,
            rows_rejected=self._rows_rejected(opened),
            prompt_tokens=sum(metrics.prompt_tokens for metrics in here),
            cached_tokens=sum(metrics.cached_tokens for metrics in here),
            generated_tokens=sum(metrics.generated_tokens for metrics in here),
        )

    def _rows_rejected(self, opened: Collection[Metrics]) -> int:
        here = self.totals.rows_rejected + sum(metrics.rows_rejected for metrics in opened)
        return self._before["rejected"] + here
