"""Drafts from finished outputs of the same template: what followed the same tokens there.

Outputs of one template say the same things in the same words (Oliaro et al. 2024, SuffixDecoding). Here a
context of a few tokens leads to the place where it stood last; contexts of several lengths are kept, and the
longest that is known counts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable

from engine.packed_tokens import NUM_BYTES, unpack_tokens
from engine.speculation.ngram import CONTEXT_LENS

MAX_TOKENS = 1 << 16
"""Of finished outputs that are known, over all templates; those learnt first are forgotten first. A token
takes about half a kilobyte."""

_LONGEST = CONTEXT_LENS[0] * NUM_BYTES


class SuffixIndex:
    """Finished outputs by template; a template is any key that says whose outputs are alike."""

    def __init__(self, max_tokens: int = MAX_TOKENS):
        self._max_tokens = max_tokens
        self._num_tokens = 0
        # Of each template, by context: the output it stood in last, and behind which byte.
        self._places: dict[Hashable, dict[bytes, tuple[bytes, int]]] = {}
        self._outputs: deque[tuple[Hashable, bytes]] = deque()
        self._unread: deque[tuple[Hashable, bytes]] = deque()
        self._num_unread = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of the outputs that are known."""
        return self._num_tokens + self._num_unread

    def learn(self, template: Hashable, tokens: bytes) -> None:
        """A request has ended. `tokens`, packed, are the end of its prompt, `CONTEXT_LENS[0]` tokens at most,
        and its output.

        They are read when somebody asks: where nothing is drafted, outputs cost nothing.
        """
        num_tokens = len(tokens) // NUM_BYTES
        if num_tokens > self._max_tokens:
            return
        self._unread.append((template, tokens))
        self._num_unread += num_tokens
        while self._num_unread > self._max_tokens:
            self._num_unread -= len(self._unread.popleft()[1]) // NUM_BYTES

    def lookup(self, template: Hashable, last_tokens: bytes, max_tokens: int) -> tuple[list[int], int]:
        """At most `max_tokens` tokens that may follow these packed ones, and how many of them, the context,
        stood before the same tokens in an output of this template; nothing and 0 where none did."""
        while self._unread:
            self._read(*self._unread.popleft())
        places = self._places.get(template)
        if places is None:
            return [], 0
        for context_len in CONTEXT_LENS:
            num_bytes = context_len * NUM_BYTES
            if len(last_tokens) < num_bytes:
                continue
            place = places.get(last_tokens[-num_bytes:])
            if place is not None:
                output, stop = place
                return unpack_tokens(output[stop : stop + max_tokens * NUM_BYTES]).tolist(), context_len
        return [], 0

    def _read(self, template: Hashable, output: bytes) -> None:
        num_tokens = len(output) // NUM_BYTES
        self._num_unread -= num_tokens
        while self._outputs and self._num_tokens + num_tokens > self._max_tokens:
            self._forget()
        places = self._places.setdefault(template, {})
        for context in _contexts(output):
            places[output[slice(*context)]] = (output, context[1])
        self._outputs.append((template, output))
        self._num_tokens += num_tokens

    def _forget(self) -> None:
        """Forget the output that was read first, and what is known of no other."""
        template, output = self._outputs.popleft()
        places = self._places[template]
        for start, stop in _contexts(output):
            place = places.get(output[start:stop])
            if place is not None and place[0] is output:
                del places[output[start:stop]]
        if not places:
            del self._places[template]
        self._num_tokens -= len(output) // NUM_BYTES


def _contexts(output: bytes) -> list[tuple[int, int]]:
    """The bytes of each context that is followed by a token of the output."""
    stops = range(min(_LONGEST, len(output)), len(output), NUM_BYTES)
    return [
        (stop - context_len * NUM_BYTES, stop)
        for stop in stops
        for context_len in CONTEXT_LENS
        if context_len * NUM_BYTES <= stop
    ]
