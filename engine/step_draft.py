"""A step while it is being planned."""

from __future__ import annotations

from engine.plan import PlannedRow
from engine.prefix_index import PrefixIndex
from engine.request import Request
from engine.scheduler_settings import SchedulerSettings


class StepDraft:
    """The plan being made: what is in it and what is left of the step's budgets."""

    __slots__ = ("chunks", "claims", "owners", "preempted", "singles", "spare_logits", "tokens_left")

    def __init__(self, settings: SchedulerSettings, num_running: int, num_decodes: int):
        """Each of `num_decodes` running requests has one token left, which is in the step from the start."""
        # Rows of one token that are no decodes, and longer ones.
        self.singles: list[PlannedRow] = []
        self.chunks: list[PlannedRow] = []
        self.preempted: list[Request] = []
        # The known tokens of the pages that this step's rows compute, by the hash of what each continues; in
        # place of a page they lie in, whose they are: an index into `owners`.
        self.claims = PrefixIndex()
        self.owners: list[Request] = []
        self.tokens_left = settings.max_num_batched_tokens - num_decodes
        # Logits beyond the one that is set aside for each running request.
        self.spare_logits = settings.max_num_seqs + settings.num_draft_logits - num_running

    def take(self, row: PlannedRow) -> None:
        (self.singles if row.num_tokens == 1 else self.chunks).append(row)
        self.tokens_left -= row.num_tokens
        if row.num_logits > 1:
            self.spare_logits -= row.num_logits - 1

    def extend(self, row: PlannedRow) -> None:
        """Take the row of a decode with its draft, in the place of the decode."""
        self.chunks.append(row)
        self.tokens_left -= len(row.draft)
        self.spare_logits -= len(row.draft)

    def drop(self, request: Request) -> None:
        """Take a preempted request's row out again."""
        if request.remain_len == 1:
            self.tokens_left += 1
            return
        for rows in (self.singles, self.chunks):
            for index, row in enumerate(rows):
                if row.request is request:
                    del rows[index]
                    self.tokens_left += row.num_tokens
                    self.spare_logits += max(0, row.num_logits - 1)
                    return
