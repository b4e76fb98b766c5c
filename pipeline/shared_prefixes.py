"""What the rows of a run have in common, planned as a run would plan them and never run."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.metrics import MAX_TEMPLATES
from pipeline.prefix_hashes import SeenPrefixes
from pipeline.prefix_plan import WindowPlanner
from pipeline.row_order import PrefixGroup
from pipeline.rows import Prompt, Reject, excerpt

# Of prompts in one window, how their beginnings are shown.
_SHOWN_CHARS = 80


@dataclass(frozen=True, slots=True)
class PlannedTemplate:
    """A beginning of `num_tokens` tokens that `rows` rows of a window share; `text` is how it begins."""

    rows: int
    num_tokens: int
    text: str

    @property
    def saving(self) -> int:
        """Tokens that need not be computed, at most."""
        return (self.rows - 1) * self.num_tokens


class SharedPrefixes:
    """Counts how many prompt tokens a cache that forgets nothing would hold, and finds the templates.

    In the planned order a cache of few pages comes close to that. `is_exact` is False once there were more
    different beginnings than are remembered: then it is a lower bound.
    """

    def __init__(self) -> None:
        self._seen = SeenPrefixes()
        self._planner: WindowPlanner | None = None
        self._texts: list[str] = []
        self._templates: list[PlannedTemplate] = []
        self.num_tokens = 0
        self.num_shared = 0

    @property
    def is_exact(self) -> bool:
        return self._seen.is_exact

    @property
    def share(self) -> float:
        return self.num_shared / self.num_tokens if self.num_tokens else 0.0

    @property
    def templates(self) -> list[PlannedTemplate]:
        """Those that save most, first."""
        return self._templates

    def add(self, row: Prompt | Reject) -> None:
        """Take the next row of a shard."""
        if self._planner is None:
            self._planner = WindowPlanner(row.shard_index, row.position, self._seen)
        self._planner.add(row)
        self._texts.append((row.text or "")[:_SHOWN_CHARS] if isinstance(row, Prompt) else "")
        if self._planner.is_full:
            self.end_shard()

    def end_shard(self) -> None:
        """The rows so far are planned; those to come are another window's."""
        if self._planner is None:
            return
        window = self._planner.plan()
        self.num_tokens += self._planner.num_prompt_tokens
        self.num_shared += sum(window.achievable(place) for place in range(window.start, window.stop))
        found: dict[int, PrefixGroup] = {}
        for place in range(window.start, window.stop):
            group = window.group(place)
            group = None if group is None else group.template
            if group is not None:
                found[id(group)] = group
        for group in found.values():
            [first] = window.positions(group.start, group.start + 1)
            text = excerpt(self._texts[first - window.start])
            self._templates.append(PlannedTemplate(group.num_rows, group.prefix_len, text))
        self._templates.sort(key=lambda template: -template.saving)
        del self._templates[MAX_TEMPLATES:]
        self._planner, self._texts = None, []
