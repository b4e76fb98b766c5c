"""One request: one sample of one prompt, as the scheduler moves it from its first token to its last.

    tokens    [ prompt_token_ids ........ | output_token_ids ..... | drawn ...... )
               0                    prompt_len             num_tokens      total_len
    computed  [0, num_computed)          keys and values are in page_ids, or a step in flight puts them there
    drawn     [num_tokens, total_len)    at most one token, that the step in flight draws: not known yet
    remaining [num_computed, total_len)  what the scheduler still has to feed to the model

A request always has at least one remaining token while it runs: the last one drawn, whose keys and
values are computed by the step that draws the next.

While it runs, its counters and drawn tokens are in a row of the scheduler's `SeatTable`, where a step moves
those of all requests at once; what is said here of them is read from there.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from engine.packed_tokens import NUM_BYTES, pack_tokens
from engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from engine.seat_table import SeatTable
    from engine.structured.grammars import GrammarState

TopLogprobs = tuple[tuple[int, float], ...]
"""The likeliest alternatives at one position: (token id, log-probability), likeliest first."""


class RequestStatus(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    LEAVING = "leaving"
    """Its last token is being drawn: it needs no more steps and has given up its pages."""
    FINISHED = "finished"


@dataclass(slots=True, eq=False, kw_only=True)
class Request:
    """Mutable state of one sample. The scheduler is the only writer of everything below `max_total_len`."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    packed_prompt: bytes = field(default=b"", repr=False)
    """Its token ids, packed; made of them when not given."""
    sampling: SamplingParams
    key: tuple[int, int]
    """Two uint32 (`request_key`): with a token's position they make its random key."""
    max_total_len: int
    """Prompt and output tokens together stop here."""
    sample_index: int = 0
    num_given: int = 0
    """Output tokens that it began with (engine/drawn.py)."""
    priority: int = 0
    """Lower runs sooner, under the priority policy."""
    eos_token_ids: frozenset[int] = frozenset()
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    grammar: GrammarState | None = None
    """Where it is in what its text must follow."""
    expected_len: int | None = None
    """Prompt and output tokens it will probably come to: pages are set aside for these."""
    cache_salt: str | None = None
    """Prompts share pages only with prompts of the same salt."""
    tenant: str | None = None
    """On whose behalf it runs: what waits is started in turns of equal tokens."""
    template: str | None = None
    """Whose outputs are like this one's (engine/speculation); None: those of prompts that begin alike."""

    arrival: int = 0
    """Sequence number given by `Scheduler.add`; lower is older."""
    arrival_step: int = 0
    """Steps that the scheduler had planned when it came."""
    num_charged: int = 0
    """Output tokens that its tenant has been charged with (engine/waiting_queue.py)."""
    table: SeatTable | None = None
    """Where its numbers are while it runs, in the row `seat`."""
    seat: int = 0
    page_ids: list[int] = field(default_factory=list)
    """Pages that hold tokens [0, num_computed) and room for those planned."""
    num_pages_to_come: int = 0
    """Pages set aside for it while it runs, beyond page_ids (admission)."""
    page_hashes: list[bytes] = field(default_factory=list)
    """Content hashes of the first full pages, computed once and kept over preemption (prefix_cache)."""
    num_shared_pages: int = 0
    """Leading pages of page_ids that the prefix cache knows."""
    num_cached_tokens: int = 0
    """Prompt tokens found in the prefix cache at the first admission."""
    num_preemptions: int = 0
    status: RequestStatus = RequestStatus.WAITING
    finish_reason: str | None = None
    """"stop", "length", "abort" or "error", once finished."""
    stop_reason: int | str | None = None
    """The stop token id or stop string that ended it, or what went wrong; None for end-of-sequence."""
    output_logprobs: list[float] = field(default_factory=list)
    output_top_logprobs: list[TopLogprobs] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)
    """Entry p is the log-probability of prompt token p + 1; the first token has none."""
    prompt_top_logprobs: list[TopLogprobs] = field(default_factory=list)
    arrival_time: float | None = None
    """Times are monotonic seconds, as passed to the scheduler; None until it happened."""
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    _output_token_ids: list[int] = field(default_factory=list, init=False)
    _num_computed: int = field(default=0, init=False)
    _num_pending: int = field(default=0, init=False)
    prompt_len: int = field(init=False)
    max_output_len: int = field(init=False)
    """Output tokens stop here: the lesser of `max_tokens` and what `max_total_len` leaves."""
    max_computed_len: int = field(init=False)
    """Tokens that are ever computed: all but the last one drawn."""
    end_token_ids: frozenset[int] = field(init=False)
    """Tokens that end it, once there are `min_tokens`."""

    def __post_init__(self) -> None:
        self.prompt_token_ids = tuple(self.prompt_token_ids)
        self.packed_prompt = self.packed_prompt or pack_tokens(self.prompt_token_ids)
        self.prompt_len = len(self.prompt_token_ids)
        self.max_output_len = min(self.sampling.max_tokens, self.max_total_len - self.prompt_len)
        self.max_computed_len = self.prompt_len + self.max_output_len - 1
        ends = frozenset() if self.sampling.ignore_eos else self.eos_token_ids
        self.end_token_ids = ends.union(self.sampling.stop_token_ids)

    # These three change only where the request has no seat, and by its seat's row where it has one.

    @property
    def output_token_ids(self) -> list[int]:
        if self.table is None:
            return self._output_token_ids
        return self._drawn(self.prompt_len, self.num_tokens)

    @output_token_ids.setter
    def output_token_ids(self, token_ids: list[int]) -> None:
        self._output_token_ids = token_ids

    @property
    def num_computed(self) -> int:
        return self._num_computed if self.table is None else self.table.num_computed.item(self.seat)

    @num_computed.setter
    def num_computed(self, num_computed: int) -> None:
        self._num_computed = num_computed

    @property
    def num_pending(self) -> int:
        """Tokens that the step in flight draws: 1 or 0."""
        return self._num_pending if self.table is None else self.table.num_pending.item(self.seat)

    @num_pending.setter
    def num_pending(self, num_pending: int) -> None:
        self._num_pending = num_pending

    def sit(self, table: SeatTable, seat: int) -> None:
        """Its numbers are in this seat from now on."""
        self.table, self.seat = table, seat

    def stand(self) -> None:
        """Its numbers are its own again."""
        own = self.output_token_ids, self.num_computed, self.num_pending
        self.table = None
        self._output_token_ids, self._num_computed, self._num_pending = own

    def cut(self, num_tokens: int) -> None:
        """Forget the tokens behind the first `num_tokens`: they came in one step with the one that ends
        it."""
        if self.table is None:
            del self._output_token_ids[num_tokens - self.prompt_len :]
        else:
            self.table.cut(self.seat, num_tokens)

    @property
    def num_tokens(self) -> int:
        if self.table is None:
            return self.prompt_len + len(self._output_token_ids)
        return self.table.num_tokens.item(self.seat)

    @property
    def total_len(self) -> int:
        """Tokens known, and the one that is being drawn."""
        return self.num_tokens + self.num_pending

    @property
    def remain_len(self) -> int:
        """Tokens whose keys and values no step has computed or is computing."""
        return self.num_tokens + self.num_pending - self.num_computed

    @property
    def num_drawn(self) -> int:
        """Output tokens known, and the one that is being drawn."""
        return self.num_output_tokens + self.num_pending

    @property
    def num_output_tokens(self) -> int:
        return self.num_tokens - self.prompt_len

    @property
    def is_finished(self) -> bool:
        return self.status is RequestStatus.FINISHED

    @property
    def num_prompt_logprobs_due(self) -> int:
        """Prompt positions whose log-probabilities are wanted and not recorded yet."""
        if self.sampling.prompt_logprobs is None:
            return 0
        return self.prompt_len - 1 - len(self.prompt_logprobs)

    def token_ids(self, start: int, stop: int) -> list[int]:
        """Tokens [start, stop) of prompt and output together."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens [{start}, {stop}) of a request of {self.num_tokens}")
        prompt_len = self.prompt_len
        if start >= prompt_len:
            return self._drawn(start, stop)
        tokens = list(self.prompt_token_ids[start:stop])
        if stop > prompt_len:
            tokens += self._drawn(prompt_len, stop)
        return tokens

    def packed_tokens(self, start: int, stop: int) -> bytes:
        """The same, packed."""
        prompt_len = self.prompt_len
        tokens = self.packed_prompt[start * NUM_BYTES : stop * NUM_BYTES]
        if stop <= prompt_len:
            return tokens
        start = max(start, prompt_len)
        if self.table is None:
            return tokens + pack_tokens(self._drawn(start, stop))
        return tokens + self.table.tokens[self.seat, start:stop].tobytes()

    def _drawn(self, start: int, stop: int) -> list[int]:
        """Tokens [start, stop), none of the prompt."""
        if self.table is None:
            return self._output_token_ids[start - self.prompt_len : stop - self.prompt_len]
        return self.table.tokens[self.seat, start:stop].tolist()


def request_key(run_seed: int, row_id: str, sample_index: int, seed: int | None) -> tuple[int, int]:
    """The two uint32 every draw of a sample descends from; they depend on its identity alone.

    With a sampling seed: on (seed, sample_index). Without: on (run_seed, row_id, sample_index).
    """
    digest = hashlib.blake2b(digest_size=8, person=b"tidemill-key")
    # The id comes last and the numbers' widths are told, so no two identities spell the same bytes.
    if seed is not None:
        digest.update(f"seed:{seed}:{sample_index}".encode())
    else:
        digest.update(f"row:{run_seed}:{sample_index}:".encode())
        digest.update(row_id.encode("utf-8", "surrogatepass"))
    raw = digest.digest()
    return int.from_bytes(raw[:4], "little"), int.from_bytes(raw[4:], "little")
