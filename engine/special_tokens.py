"""Special tokens set apart: a space between one and whatever is next to it.

As the slow tokenizers of transformers have it (`PreTrainedTokenizer._decode`): runs of plain tokens and
single special tokens, joined by spaces; a run that has no text is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

_SPECIAL: WeakKeyDictionary[Any, dict[int, str]] = WeakKeyDictionary()


class SpacedDecoder:
    """A `TextDecoder` over another one, which decodes the runs between special tokens."""

    def __init__(self, tokenizer: Any, make_decoder: Callable[[], Any]):
        self._special = special_tokens(tokenizer)
        self._make_decoder = make_decoder
        self._run = make_decoder()
        self._is_in_run = False
        self._is_first = True

    def push(self, token_ids: Sequence[int]) -> str:
        return "".join([self._push_one(token) for token in token_ids])

    def finish(self) -> str:
        return self._of_run(self._run.finish())

    def _push_one(self, token: int) -> str:
        text = self._special.get(token)
        if text is None:
            return self._of_run(self._run.push([token]))
        before = self._of_run(self._run.finish())
        self._run, self._is_in_run = self._make_decoder(), False
        return before + self._apart(text)

    def _of_run(self, text: str) -> str:
        if not text or self._is_in_run:
            return text
        self._is_in_run = True
        return self._apart(text)

    def _apart(self, text: str) -> str:
        space = "" if self._is_first else " "
        self._is_first = False
        return space + text


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """The text of each special token, by its id."""
    known = _SPECIAL.get(tokenizer)
    if known is None:
        backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        added = backend.get_added_tokens_decoder().items()
        known = _SPECIAL[tokenizer] = {index: token.content for index, token in added if token.special}
    return known
