"""Who looks on at a worker: told of what happens, on its thread."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.metrics import Metrics
    from pipeline.progress import Standing


class WorkWatch:
    """This one listens to nothing, and is what a worker has by default."""

    def stands(self, standing: Standing) -> None:
        """How far the run is, after each step."""

    def committed(self, metrics: Metrics, is_ours: bool) -> None:
        """A chunk is committed: what it counted, and whether this attempt at it is the one that counts."""

    def shard_finished(self) -> None:
        """A shard has its final files."""
