"""Text of a growing list of tokens, at a bounded cost per token.

Two things are held back: bytes that do not make a whole character yet, and text that may turn out to
be the beginning of a stop string. Everything else is given out as soon as it is certain.

    text   [ released ........ | held ...... | pending bytes )
                               may begin a stop string

Any stop string still to come begins in `held` or later, so only there it is looked for. The same goes for a
stop pattern, for which as much is held as its longest match can have before it is complete.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from engine.special_tokens import SpacedDecoder
from engine.stop_pattern import StopPattern


class Tokenizer(Protocol):
    """What is asked of a tokenizer; those of `transformers` and `tokenizers` have it."""

    def decode(self, token_ids: Any, *, skip_special_tokens: bool = ...) -> Any: ...


class TextDecoder(Protocol):
    """Turns tokens into text piece by piece; a piece once given is never taken back."""

    def push(self, token_ids: Sequence[int]) -> str: ...

    def finish(self) -> str: ...


class IncrementalDetokenizer:
    """The text of one request, token by token, cut at its first stop string.

    The first stop string is the one that is complete first, whatever the tokens; of two that end together,
    the longer. Unless `include_stop_str_in_output`, nothing of it is given out. Stop strings complete before
    there are `min_tokens` tokens do not count.

    What `push` and `finish` return, joined, is `text`: `tokenizer.decode` of all tokens, up to the stop.
    Exactly so for byte-level tokenizers. Others may decode an invalid byte sequence differently as a whole
    than in parts.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool = True,
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        min_tokens: int = 0,
        stop_pattern: StopPattern | None = None,
        spaces_between_special_tokens: bool = False,
        may_stop_after: Callable[[str], bool] | None = None,
        detokenize: bool = True,
    ):
        """may_stop_after: told each piece of text in turn; whether stop strings count from this one on.
        detokenize: False for a request whose text nobody wants: it stays empty.
        """
        if "" in stop:
            raise ValueError("a stop string is empty")
        self._decoder: TextDecoder = (
            text_decoder(tokenizer, skip_special_tokens, spaces_between_special_tokens)
            if detokenize
            else _NoText()
        )
        self._stop = tuple(stop)
        self._pattern = stop_pattern
        self._may_stop_after = may_stop_after
        self._first_characters = frozenset(string[0] for string in self._stop)
        self._longest = max(map(len, self._stop), default=0)
        self._include_stop = include_stop_str_in_output
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._released: list[str] = []
        self._held = ""
        self._is_finished = False
        self.stopped_by: str | None = None
        """The stop string that was found."""

    @property
    def text(self) -> str:
        """All that was given out so far; after `finish`, the whole text."""
        return "".join(self._released)

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that has become certain with these next tokens. Once stopped there is no more to push."""
        if self.stopped_by is not None or self._is_finished:
            raise ValueError("tokens came after the end of a text")
        too_early = self._min_tokens - 1 - self._num_tokens
        self._num_tokens += len(token_ids)
        if self._stop and too_early > 0:
            delta = self._extend(self._decoder.push(token_ids[:too_early]), may_stop=False)
            return delta + self._extend(self._decoder.push(token_ids[too_early:]), may_stop=True)
        return self._extend(self._decoder.push(token_ids), may_stop=True)

    def finish(self) -> str:
        """What was held back: no more tokens come. Nothing after a stop, or a second time."""
        if self.stopped_by is not None or self._is_finished:
            return ""
        delta = self._extend(self._decoder.finish(), may_stop=self._num_tokens >= self._min_tokens)
        if self.stopped_by is None:
            delta += self._held
            self._release(self._held)
            self._held = ""
        self._is_finished = True
        return delta

    def _extend(self, piece: str, may_stop: bool) -> str:
        if not piece:
            return ""
        if not self._stop and self._pattern is None:
            self._release(piece)
            return piece
        if self._may_stop_after is not None and not self._may_stop_after(piece):
            self._release(piece)
            return piece
        if self._pattern is None and not self._held and self._first_characters.isdisjoint(piece):
            self._release(piece)  # the usual case: no stop string begins here
            return piece
        num_old = len(self._held)
        text = self._held + piece
        found = self._find_stop(text, num_old) if may_stop else None
        if found is not None:
            end, start, self.stopped_by = found
            cut = end if self._include_stop else start
            self._held = ""
        else:
            cut = self._first_possible_stop(text)
            self._held = text[cut:]
        self._release(text[:cut])
        return text[:cut]

    def _release(self, text: str) -> None:
        if text:
            self._released.append(text)

    def _find_stop(self, text: str, num_old: int) -> tuple[int, int, str] | None:
        """(end, start, string) of the stop string that ends first, beyond the `num_old` characters known."""
        found = None
        for string in self._stop:
            start = text.find(string, max(0, num_old - len(string) + 1))
            if start >= 0 and (found is None or (start + len(string), start) < found[:2]):
                found = (start + len(string), start, string)
        if self._pattern is not None:
            match = self._pattern.find(text, num_old)
            if match is not None and (found is None or match[:2] < found[:2]):
                found = match
        return found

    def _first_possible_stop(self, text: str) -> int:
        """Where the longest end of `text` that begins a stop string, without completing it, begins."""
        if self._pattern is not None:
            longest = max(self._longest, self._pattern.width)
            return max(0, len(text) - longest + 1)
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[start] in self._first_characters:
                end = text[start:]
                if any(len(string) > len(end) and string.startswith(end) for string in self._stop):
                    return start
        return len(text)


def whole_text(
    tokenizer: Tokenizer,
    token_ids: Sequence[int],
    skip_special_tokens: bool,
    spaces_between_special_tokens: bool = False,
) -> str:
    """What an `IncrementalDetokenizer` makes of all these tokens when there are no stop strings."""
    if spaces_between_special_tokens:
        spaced = text_decoder(tokenizer, skip_special_tokens, True)
        return spaced.push(token_ids) + spaced.finish()
    token_bytes = _token_bytes(tokenizer, skip_special_tokens)
    if token_bytes is not None:
        return _joined(token_bytes, token_ids).decode("utf-8", "replace")
    decoder = _WindowDecoder(tokenizer, skip_special_tokens)
    return decoder.push(token_ids) + decoder.finish()


def bytes_of_token(tokenizer: Tokenizer, token_id: int) -> bytes:
    """What one token stands for by itself, special ones too; it may be part of a character. A tokenizer that
    is not byte-level is asked for the token's text."""
    token_bytes = _token_bytes(tokenizer, skip_special_tokens=False)
    if token_bytes is None:
        return tokenizer.decode([token_id], skip_special_tokens=False).encode("utf-8")
    return token_bytes[token_id] if token_id < len(token_bytes) else b""


def text_decoder(
    tokenizer: Tokenizer, skip_special_tokens: bool, spaces_between_special_tokens: bool = False
) -> TextDecoder:
    """The exact decoder where a token is a sequence of bytes, else one that only asks `tokenizer.decode`."""
    if spaces_between_special_tokens and not skip_special_tokens:
        return SpacedDecoder(tokenizer, lambda: text_decoder(tokenizer, False))
    token_bytes = _token_bytes(tokenizer, skip_special_tokens)
    if token_bytes is not None:
        return _ByteDecoder(token_bytes)
    return _WindowDecoder(tokenizer, skip_special_tokens)


class _NoText:
    def push(self, token_ids: Sequence[int]) -> str:
        return ""

    def finish(self) -> str:
        return ""


class _ByteDecoder:
    """Byte-level BPE: the text is the tokens' bytes, one after the other, as UTF-8.

    Bytes that can be no part of a character become U+FFFD, one for each longest sequence that began like
    one (Unicode 16, section 3.9, "substitution of maximal subparts"), as the tokenizers' own decoder does.
    """

    def __init__(self, token_bytes: Sequence[bytes]):
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Sequence[int]) -> str:
        return self._utf8.decode(_joined(self._token_bytes, token_ids))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


def _joined(token_bytes: Sequence[bytes], token_ids: Sequence[int]) -> bytes:
    try:
        return b"".join(map(token_bytes.__getitem__, token_ids))
    except IndexError:
        # An id beyond the vocabulary (models pad their last layer) has no text, as in tokenizer.decode.
        return b"".join([token_bytes[token] for token in token_ids if token < len(token_bytes)])


class _WindowDecoder:
    """Any tokenizer: decodes a short window of the last tokens and gives out what it grew by.

    window  [ context ........ | pending ..... )
              text given out     text held: it ends in U+FFFD, so a character may be incomplete

    The context is there because a token's text can depend on the one before it (a leading space that is
    dropped at the beginning of a text). Each token is decoded a bounded number of times.
    """

    _MAX_PENDING = 16
    """More tokens than an incomplete character can have: what still ends in U+FFFD then is invalid."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool):
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._window: list[int] = []
        self._num_context = 0
        self._context_text = ""

    def push(self, token_ids: Sequence[int]) -> str:
        # One by one: each may end a character, and after it the window can begin anew.
        return "".join([self._push_one(token) for token in token_ids])

    def _push_one(self, token: int) -> str:
        self._window.append(token)
        text = self._decode()
        delta = text[len(self._context_text) :]
        is_stuck = len(self._window) - self._num_context > self._MAX_PENDING
        if not delta:
            if is_stuck:  # special tokens, skipped: they mean nothing to what follows either
                del self._window[self._num_context :]
            return ""
        if text.endswith("\ufffd") and not is_stuck:
            return ""
        del self._window[: self._num_context]
        self._num_context = len(self._window)
        self._context_text = self._decode()
        return delta

    def finish(self) -> str:
        delta = self._decode()[len(self._context_text) :]
        self._num_context = len(self._window)
        self._context_text += delta
        return delta

    def _decode(self) -> str:
        if not self._window:
            return ""
        return self._tokenizer.decode(self._window, skip_special_tokens=self._skip_special_tokens)


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: a visible character for each byte, its own where it has one."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    alphabet = {chr(byte): byte for byte in visible}
    alphabet.update({chr(256 + index): byte for index, byte in enumerate(hidden)})
    return alphabet


_BYTE_OF_CHARACTER = _byte_of_character()

# The tables of the tokenizers in use: a vocabulary is walked once, not once for each request.
_TABLES: WeakKeyDictionary[Any, dict[bool, tuple[bytes, ...]]] = WeakKeyDictionary()


def _token_bytes(tokenizer: Tokenizer, skip_special_tokens: bool) -> Sequence[bytes] | None:
    """The bytes of each token id, or None when the tokenizer's decoder is not the byte-level one."""
    tables = _TABLES.get(tokenizer)
    if tables is None:
        tables = _TABLES[tokenizer] = _byte_tables(tokenizer)
    return tables.get(skip_special_tokens)


def _byte_tables(tokenizer: Tokenizer) -> dict[bool, tuple[bytes, ...]]:
    """By whether special tokens are skipped; none when the tokenizer's decoder is not the byte-level one."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", tokenizer)
    # By name, so that this module needs neither package.
    if type(getattr(backend, "decoder", None)).__name__ != "ByteLevel":
        return {}
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    whole: list[bytes] = []
    visible: list[bytes] = []
    for token_id in range(max(backend.get_vocab(with_added_tokens=True).values()) + 1):
        token = backend.id_to_token(token_id) or ""
        whole.append(_bytes_of_token(token))
        visible.append(b"" if token in special else whole[-1])
    return {False: tuple(whole), True: tuple(visible)}


def _bytes_of_token(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF_CHARACTER[character] for character in token])
    except KeyError:  # an added token, spelled in plain text
        return token.encode("utf-8")
