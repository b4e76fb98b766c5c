"""Streamed text is the whole text: joined deltas equal one decode of all tokens, cut at the first stop.

Laws, over byte-level and other tokenizers, text of all scripts and invalid UTF-8: nothing given out is
taken back, nothing of a stop string leaks, where a text stops does not depend on its tokens, and the work
is linear in the number of tokens.
"""

from __future__ import annotations

import functools
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as RustTokenizer
from transformers import PreTrainedTokenizerFast

from engine.detokenizer import IncrementalDetokenizer, text_decoder

SAMPLES = [
    "Hello, world! def f(x):\n    return x + 1\n",
    "naïve café — “quotes” … ¿qué? Ω≈ç√∫",
    "日本語のテキスト、中文文本、한국어 텍스트。",
    "👩‍👩‍👧‍👦 family 🏳️‍🌈 flags 🇩🇪 skin 👍🏽 e\u0301 a\u0308 \u0928\u093f नमस्ते สวัสดี",
    "mixed: \u200b\u200d zero width, \ufeff bom, \x00 nul, \U0010ffff last",
]


@functools.cache
def byte_level() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer whose merges split characters in all sorts of places."""
    backend = RustTokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(SAMPLES * 3, trainer)
    backend.add_special_tokens([AddedToken("<|end|>", special=True), AddedToken("<|é|>", special=True)])
    backend.add_tokens([AddedToken("added words"), AddedToken("語")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


@functools.cache
def byte_fallback() -> PreTrainedTokenizerFast:
    """A tokenizer in the manner of SentencePiece: ▁ for spaces, bytes where a character is unknown."""
    pieces = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], "▁"]
    pieces += sorted(set("".join(SAMPLES[:2]).replace(" ", "")))
    merges = [("▁", letter) for letter in "Hwdfrxnq"]
    pieces += ["".join(pair) for pair in merges]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    backend = RustTokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(Regex(" "), "▁")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


@functools.cache
def byte_ids() -> list[int]:
    """The token id of each single byte, by the alphabet that the tokenizers package itself has."""
    # A byte's character is what the pre-tokenizer makes of it: learn it from whole characters.
    character_of: dict[int, str] = {}
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for code in [
        *range(0x80),
        *range(0x80, 0x800),
        *range(0x800, 0x11000, 0x40),
        *range(0xE000, 0x110000, 0x1000),
    ]:
        if not 0xD800 <= code < 0xE000:
            [(piece, _)] = pre_tokenizer.pre_tokenize_str(chr(code))
            character_of.update(zip(chr(code).encode(), piece, strict=True))
    alphabet = iter(sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(character_of.values())))
    # Bytes that no text has (0xC0, 0xC1, 0xF5 and above) come in the order of the rest.
    characters = [character_of.get(byte) or next(alphabet) for byte in range(256)]
    token_ids = byte_level().convert_tokens_to_ids(characters)
    assert isinstance(token_ids, list)
    return token_ids


def bytewise(text: str) -> list[int]:
    """The text as tokens of one byte each."""
    return [byte_ids()[byte] for byte in text.encode()]


def stream(
    tokenizer: Any, token_ids: list[int], size: int = 1, **options: Any
) -> tuple[list[str], str | None]:
    """The deltas of pushing `size` tokens at a time, and what stopped it."""
    detokenizer = IncrementalDetokenizer(tokenizer, **options)
    deltas = []
    for start in range(0, len(token_ids), size):
        deltas.append(detokenizer.push(token_ids[start : start + size]))
        if detokenizer.stopped_by is not None:
            break
    deltas.append(detokenizer.finish())
    assert "".join(deltas) == detokenizer.text
    return deltas, detokenizer.stopped_by


def cut_at_first_stop(text: str, stop: list[str], include: bool = False) -> tuple[str, str | None]:
    """The oracle: read character by character until some stop string is complete; longest first."""
    for end in range(len(text) + 1):
        for string in sorted(stop, key=len, reverse=True):
            if text[:end].endswith(string):
                return text[: end if include else end - len(string)], string
    return text, None


unicode_text = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    st.lists(st.sampled_from([*"".join(SAMPLES), *SAMPLES, "added words"]), max_size=40).map("".join),
)


@given(unicode_text, st.integers(1, 5))
def test_byte_level_text_comes_out_whole(text: str, size: int):
    deltas, _ = stream(byte_level(), encode(byte_level(), text), size)
    assert "".join(deltas) == text
    assert all("\ufffd" not in delta for delta in deltas if "\ufffd" not in text)


@given(st.data(), st.integers(1, 5), st.booleans())
def test_any_byte_level_token_ids_stream_to_what_decode_says(data: st.DataObject, size: int, skip: bool):
    tokenizer = byte_level()
    # Beyond the vocabulary too: models pad it.
    token_ids = data.draw(st.lists(st.integers(0, len(tokenizer) + 3), max_size=60))
    deltas, _ = stream(tokenizer, token_ids, size, skip_special_tokens=skip)
    assert "".join(deltas) == tokenizer.decode(token_ids, skip_special_tokens=skip)


@given(unicode_text.filter(lambda text: "\ufffd" not in text), st.integers(1, 5))
def test_byte_fallback_text_comes_out_whole(text: str, size: int):
    token_ids = encode(byte_fallback(), text)
    deltas, _ = stream(byte_fallback(), token_ids, size)
    assert "".join(deltas) == byte_fallback().decode(token_ids, skip_special_tokens=True)


@given(st.lists(st.integers(0, 280), max_size=60), st.integers(1, 5))
def test_any_byte_fallback_tokens_stream_without_a_surprise(token_ids: list[int], size: int):
    """Invalid bytes decode differently in parts than as a whole here; valid text around them is kept."""
    tokenizer = byte_fallback()
    letters = encode(tokenizer, "Hello")
    before = [*letters, *(token % len(tokenizer) for token in token_ids)]
    text = "".join(stream(tokenizer, [*before, *letters], size)[0])
    assert text.startswith("Hello")
    assert text.endswith("Hello")


@settings(max_examples=300)
@given(
    st.text("abc é語", max_size=30),
    st.lists(st.text("abc é語", min_size=1, max_size=5), min_size=1, max_size=4),
    st.integers(1, 4),
    st.booleans(),
)
def test_where_a_text_stops_depends_on_the_text_alone(text: str, stop: list[str], size: int, include: bool):
    expected, stopped_by = cut_at_first_stop(text, stop, include)
    for tokenizer, token_ids in (
        (byte_level(), encode(byte_level(), text)),
        (byte_level(), bytewise(text)),
    ):
        deltas, found = stream(tokenizer, token_ids, size, stop=stop, include_stop_str_in_output=include)
        assert "".join(deltas) == expected
        assert found == stopped_by


@given(st.text("ab ", max_size=20), st.lists(st.text("ab ", min_size=1, max_size=4), min_size=1, max_size=3))
def test_no_delta_ends_inside_a_stop_string(text: str, stop: list[str]):
    """At every moment what was given out begins the final text, so nothing of a stop has leaked."""
    expected, _ = cut_at_first_stop(text, stop)
    deltas, _ = stream(byte_level(), bytewise(text), stop=stop)
    for num_deltas in range(len(deltas)):
        assert expected.startswith("".join(deltas[:num_deltas]))


def test_text_is_held_exactly_while_it_may_begin_a_stop_string():
    deltas, stopped_by = stream(byte_level(), bytewise("xEN EN"), stop=["END"])
    assert deltas == ["x", "", "", "EN ", "", "", "EN"]
    assert stopped_by is None


def test_a_stop_string_straddling_tokens_is_found_and_cut():
    deltas, stopped_by = stream(byte_level(), bytewise("one\n\nEND two"), stop=["\n\nEND"])
    assert "".join(deltas) == "one"
    assert stopped_by == "\n\nEND"
    assert len(deltas) == len("one\n\nEND") + 1  # it stopped there, without the tokens that follow


def test_the_stop_string_is_kept_when_asked_for():
    deltas, stopped_by = stream(
        byte_level(), bytewise("one.two"), stop=["."], include_stop_str_in_output=True
    )
    assert "".join(deltas) == "one."
    assert stopped_by == "."


def test_a_shorter_stop_inside_a_longer_one_wins_by_being_complete_first():
    assert stream(byte_level(), bytewise("xabcd"), stop=["abcd", "c"]) == (["x", "", "", "ab", ""], "c")


def test_of_two_stops_that_end_together_the_longer_cuts():
    deltas, stopped_by = stream(byte_level(), bytewise("xabc"), stop=["c", "bc"])
    assert ("".join(deltas), stopped_by) == ("xa", "bc")


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("min_tokens", "expected"), [(0, "a"), (2, "a"), (3, "a.b"), (4, "a.b"), (5, "a.b.c")]
)
def test_stop_strings_within_min_tokens_do_not_count(min_tokens: int, expected: str, size: int):
    token_ids = bytewise("a.b.c")
    assert len(token_ids) == 5
    deltas, _ = stream(byte_level(), token_ids, size, stop=["."], min_tokens=min_tokens)
    assert "".join(deltas) == expected


def test_an_ignored_stop_is_given_out_at_once():
    assert stream(byte_level(), bytewise("a.b"), stop=["."], min_tokens=3)[0] == ["a", ".", "b", ""]


def test_an_ignored_stop_is_not_found_later_inside_what_is_held():
    """ "b" is complete too early; while "abc" is still possible it lies in the held text."""
    deltas, stopped_by = stream(byte_level(), bytewise("abx"), stop=["b", "abc"], min_tokens=3)
    assert ("".join(deltas), stopped_by) == ("abx", None)


def test_an_incomplete_character_is_held_and_released_as_one_at_the_end():
    token_ids = bytewise("é語")
    assert stream(byte_level(), token_ids)[0] == ["", "é", "", "", "語", ""]
    assert stream(byte_level(), token_ids[:-1])[0] == ["", "é", "", "", "\ufffd"]


def test_special_tokens_are_skipped_or_shown():
    tokenizer = byte_level()
    token_ids = [*encode(tokenizer, "a"), tokenizer.eos_token_id, *encode(tokenizer, "b")]
    assert "".join(stream(tokenizer, token_ids)[0]) == "ab"
    assert "".join(stream(tokenizer, token_ids, skip_special_tokens=False)[0]) == "a<|end|>b"


def test_a_special_token_between_the_bytes_of_a_character_does_not_break_it():
    first, second = bytewise("é")
    token_ids = [first, byte_level().eos_token_id, second]
    assert "".join(stream(byte_level(), token_ids)[0]) == "é"


def test_nothing_can_be_pushed_after_the_end():
    detokenizer = IncrementalDetokenizer(byte_level(), stop=["a"])
    detokenizer.push(bytewise("a"))
    with pytest.raises(ValueError, match="after the end"):
        detokenizer.push(bytewise("b"))
    assert detokenizer.finish() == ""
    other = IncrementalDetokenizer(byte_level())
    other.push(bytewise("b"))
    other.finish()
    assert other.finish() == ""
    with pytest.raises(ValueError, match="after the end"):
        other.push(bytewise("b"))


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="empty"):
        IncrementalDetokenizer(byte_level(), stop=[""])


class CountingTokenizer:
    """Counts the tokens it is asked to decode. Not byte-level by type, so the window is used."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self._tokenizer = tokenizer
        self.num_decoded = 0

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        self.num_decoded += len(token_ids)
        text = self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        assert isinstance(text, str)
        return text


@pytest.mark.parametrize("kind", ["text", "invalid", "special"])
def test_the_work_is_linear_in_the_number_of_tokens(kind: str):
    tokenizer = byte_level()
    lead_byte = bytewise("é")[0]
    token_ids = {
        "text": encode(tokenizer, "".join(SAMPLES) * 10),
        "invalid": [lead_byte] * 2000,
        "special": [tokenizer.eos_token_id] * 2000,
    }[kind]
    counting = CountingTokenizer(tokenizer)
    deltas, _ = stream(counting, token_ids)
    assert "".join(deltas) == tokenizer.decode(token_ids, skip_special_tokens=True)
    assert counting.num_decoded < 40 * len(token_ids)


def test_the_vocabulary_is_walked_once_per_tokenizer():
    first = text_decoder(byte_level(), True)
    second = text_decoder(byte_level(), True)
    assert first._token_bytes is second._token_bytes  # type: ignore[attr-defined]


def test_the_real_tokenizer_streams_what_it_decodes():
    from engine.checkpoints import load_tokenizer

    tokenizer = load_tokenizer("smollm2-135m-instruct")
    chooser = random.Random(0)
    token_lists = [encode(tokenizer, text) for text in SAMPLES]
    token_lists += [chooser.choices(range(len(tokenizer)), k=60) for _ in range(50)]
    for token_ids in token_lists:
        for skip in (True, False):
            deltas, _ = stream(tokenizer, token_ids, skip_special_tokens=skip)
            assert "".join(deltas) == tokenizer.decode(token_ids, skip_special_tokens=skip)


def test_python_and_rust_replace_the_same_invalid_bytes():
    """Every byte sequence class: overlong forms, surrogates, beyond U+10FFFF, truncated, stray."""
    tokenizer = byte_level()
    chooser = random.Random(0)
    edges = [0x00, 0x41, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC1, 0xC2, 0xDF, 0xE0, 0xE1]
    edges += [0xED, 0xEE, 0xEF, 0xF0, 0xF1, 0xF3, 0xF4, 0xF5, 0xFF]
    for _ in range(500):
        token_ids = [byte_ids()[byte] for byte in chooser.choices(edges, k=12)]
        assert "".join(stream(tokenizer, token_ids)[0]) == tokenizer.decode(token_ids)
