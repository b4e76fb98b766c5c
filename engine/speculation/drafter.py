"""Guesses for the requests of one scheduler: who may be drafted, from which texts, and what became of it."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from engine.draw_needs import BIAS, needs_of
from engine.packed_tokens import NUM_BYTES
from engine.prefix_cache import page_hash, root_hash
from engine.request import Request
from engine.scheduler_settings import SchedulerSettings
from engine.speculation.ngram import CONTEXT_LENS, prompt_lookup
from engine.speculation.policy import Acceptance, Always, Measured, Policy
from engine.speculation.suffix_index import SuffixIndex

_LONGEST = CONTEXT_LENS[0]


@dataclass(slots=True)
class _Row:
    """What is known of one request that runs."""

    is_eligible: bool
    template: Hashable
    acceptance: Acceptance = field(default_factory=Acceptance)


class Drafter:
    """`settings.speculation`: "ngram" and "suffix" always draft, each from its own texts; "auto" drafts from
    both where it pays."""

    def __init__(self, settings: SchedulerSettings):
        mode, self._page_size = settings.speculation, settings.page_size
        self._has_ngram = mode in ("ngram", "auto")
        self._suffixes = SuffixIndex() if mode in ("suffix", "auto") else None
        self._policy: Policy = (Measured if mode == "auto" else Always)(settings.max_draft_len)
        self._rows: dict[Request, _Row] = {}
        self._planned_at: float | None = None
        self._ended_at: float | None = None
        self.num_drafted = 0
        self.num_accepted = 0
        """Of the drafted tokens, those that were drawn."""

    def budget(self, num_rows: int, most: int) -> int:
        """Tokens that the next step may draft."""
        return self._policy.budget(num_rows, most) if num_rows else 0

    def planned(self, now: float | None) -> None:
        """A step is being planned."""
        self._planned_at = now

    def draft(self, request: Request, num_rows: int, most: int) -> list[int]:
        """What may follow the request's last token, at most `most` tokens. Its last token must be known."""
        row = self._row(request)
        if not row.is_eligible or request.num_output_tokens < request.sampling.min_tokens:
            return []
        max_tokens = min(most, self._policy.draft_len(row.acceptance, num_rows))
        if max_tokens < 1:
            return []
        draft, context_len = [], 0
        if self._has_ngram:
            tokens = request.packed_tokens(0, request.num_tokens)
            draft, context_len = prompt_lookup(tokens, max_tokens)
        if self._suffixes is not None and context_len < _LONGEST:
            last = request.packed_tokens(max(0, request.num_tokens - _LONGEST), request.num_tokens)
            other, other_len = self._suffixes.lookup(row.template, last, max_tokens)
            if other_len > context_len:
                draft = other
        return draft

    def took(
        self, num_rows: int, only_draws: bool, drafts: list[tuple[Request, int, int]], now: float | None
    ) -> None:
        """A step has ended.

        Args:
            num_rows: its rows.
            only_draws: it drew behind each of its tokens; false where it also computed prompts.
            drafts: each drafted request, how many tokens were drafted and how many of them accepted.
        """
        num_drafted = sum(each[1] for each in drafts)
        num_accepted = sum(each[2] for each in drafts)
        self.num_drafted += num_drafted
        self.num_accepted += num_accepted
        for request, drafted, kept in drafts:
            if request in self._rows:
                self._rows[request].acceptance.note(drafted, kept, 0.9)
            if isinstance(self._policy, Measured):
                self._policy.note_row(drafted, kept)
        seconds = None
        if now is not None and self._planned_at is not None and only_draws:
            seconds = now - max(self._planned_at, self._ended_at or self._planned_at)
        self._ended_at = now
        self._policy.note(num_rows, num_drafted, num_accepted, seconds)

    def ended(self, request: Request) -> None:
        """A request has finished (what it drew may be guessed for others), or was aborted."""
        row = self._rows.pop(request, None)
        if self._suffixes is None or request.finish_reason == "abort" or not request.num_output_tokens:
            return
        template = self._template(request) if row is None else row.template
        start = max(0, request.prompt_len - _LONGEST)
        self._suffixes.learn(template, request.packed_tokens(start, request.num_tokens))

    def _row(self, request: Request) -> _Row:
        row = self._rows.get(request)
        if row is None:
            is_eligible = needs_of(request) in (0, BIAS) and request.sampling.prompt_logprobs is None
            row = self._rows[request] = _Row(is_eligible, self._template(request))
        return row

    def _template(self, request: Request) -> Hashable:
        """Whose outputs are like this one's: those of the same salt and template, or else those whose prompts
        share their first page (all prompts that are shorter share one)."""
        if request.template is not None:
            return request.cache_salt, request.template
        root = root_hash(request.cache_salt)
        page_bytes = self._page_size * NUM_BYTES
        first = request.packed_prompt[:page_bytes]
        return page_hash(root, first) if len(first) == page_bytes else root
