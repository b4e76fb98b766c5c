"""Tokenizers: llama.cpp's ids for the embedded model, chats with one BOS, and vocabularies of other kinds."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import checkpoints
from engine.checkpoints import encode_text, render_chat, render_chat_text
from engine.errors import ModelError, RequestError
from tests.engine.gguf_maker import make_tiny_gguf, model_metadata, tokenizer_metadata, write_gguf
from tests.parity.cases import CHATS, DATA
from tests.tiny_model import make_tiny_checkpoint, make_tokenizer, tiny_config

MARK = "\u2581"
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
KNOWN_TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"], max_codepoint=0x1FFFF), max_size=60)
"""SmolLM2's vocabulary has no token for some bytes: a few control characters, the start of a rare plane."""


@pytest.fixture(scope="module")
def smollm2() -> Any:
    return checkpoints.load_tokenizer(checkpoints.DEFAULT_MODEL)


def reference_lines() -> list[dict[str, Any]]:
    return [
        json.loads(line) for line in (DATA / "smollm2_tokenizer_reference.jsonl").read_text().splitlines()
    ]


def test_ids_are_those_of_llama_cpp(smollm2: Any) -> None:
    lines = reference_lines()
    assert len(lines) == 1000
    wrong = [line["text"] for line in lines if encode_text(smollm2, line["text"]) != line["ids"]]
    assert wrong == []


def test_ids_decode_to_the_text(smollm2: Any) -> None:
    for line in reference_lines():
        assert smollm2.decode(line["ids"], skip_special_tokens=False) == line["text"]


@given(text=KNOWN_TEXT)
@settings(max_examples=100, deadline=None)
def test_any_text_the_vocabulary_can_hold_round_trips(smollm2: Any, text: str) -> None:
    assert smollm2.decode(encode_text(smollm2, text), skip_special_tokens=False) == text


def test_digits_stand_alone(smollm2: Any) -> None:
    assert len(encode_text(smollm2, "2024")) == 4


def test_a_chat_is_the_models_own_template(smollm2: Any) -> None:
    """The stored prompts were rendered by transformers, the template coming from the same file."""
    for item in json.loads((DATA / "smollm2_greedy_reference.json").read_text())["items"]:
        chat = [{"role": "user", "content": item["question"]}]
        assert render_chat(smollm2, chat) == item["prompt_token_ids"]
        assert render_chat_text(smollm2, chat) == item["prompt"]


@pytest.mark.parametrize("chat", CHATS)
def test_a_chat_has_one_bos_a_message_and_no_other(smollm2: Any, chat: list[dict[str, str]]) -> None:
    """SmolLM2 opens every message with its BOS token, so any extra one would show."""
    ids = render_chat(smollm2, chat)
    system = 0 if chat[0]["role"] == "system" else 1
    assert ids.count(smollm2.bos_token_id) == len(chat) + system + 1
    without = render_chat(smollm2, chat, add_generation_prompt=False)
    assert ids[: len(without)] == without
    assert ids.count(smollm2.bos_token_id) == without.count(smollm2.bos_token_id) + 1


def test_a_template_and_variables_can_be_given(smollm2: Any) -> None:
    chat = [{"role": "user", "content": "hi"}]
    template = "{{ tone }}: {{ messages[0]['content'] }}"
    assert render_chat_text(smollm2, chat, template=template, variables={"tone": "dry"}) == "dry: hi"


def test_special_tokens_can_be_skipped(smollm2: Any) -> None:
    ids = render_chat(smollm2, [{"role": "user", "content": "hi"}])
    assert "<|im_start|>" in smollm2.decode(ids, skip_special_tokens=False)
    assert "<|" not in smollm2.decode(ids, skip_special_tokens=True)


# Bad input is the row's fault, by name.


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "wrong_type"),
        ("hi", "wrong_type"),
        (None, "wrong_type"),
        ({"role": "user"}, "wrong_type"),
        (["hi"], "wrong_type"),
        ([{"content": "no role"}], "wrong_type"),
        ([{"role": 3, "content": "x"}], "wrong_type"),
        ([{"role": "user"}], "template_error"),
        ([{"role": "user", "content": None}], "template_error"),
        ([{"role": "user", "content": 5}], "template_error"),
        ([{"role": "user", "content": "\ud800"}], "lone_surrogate"),
    ],
)
def test_messages_that_do_not_fit_are_a_request_error(smollm2: Any, messages: Any, reason: str) -> None:
    with pytest.raises(RequestError) as caught:
        render_chat(smollm2, messages)
    assert caught.value.reason == reason
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason"), [("a\udfffb", "lone_surrogate"), (7, "wrong_type"), (b"x", "wrong_type")]
)
def test_a_prompt_that_is_not_text_is_a_request_error(smollm2: Any, text: Any, reason: str) -> None:
    with pytest.raises(RequestError) as caught:
        encode_text(smollm2, text)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append({'role': 'x', 'content': 'y'}) }}",
        "{{ cycler.__init__.__globals__.os.popen('true') }}",
        "{% for i in range(1000000000) %}{% endfor %}",
        "{{ raise_exception('no\nsystem role') }}",
        "{{ nothing.here }}",
        "{% if %}",
        "{{ 1 / 0 }}",
    ],
)
def test_a_template_reaches_nothing_and_its_failure_is_one_line(smollm2: Any, template: str) -> None:
    with pytest.raises(RequestError) as caught:
        render_chat_text(smollm2, [{"role": "user", "content": "hi"}], template=template)
    assert caught.value.reason == "template_error"
    assert "\n" not in str(caught.value)


def test_a_model_without_a_template_says_so(tmp_path: Path) -> None:
    folder = Path(make_tiny_checkpoint(tmp_path))
    values = json.loads((folder / "tokenizer_config.json").read_text())
    del values["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    tokenizer = checkpoints.load_tokenizer(str(folder))
    assert not checkpoints.has_chat_template(tokenizer)
    with pytest.raises(ModelError, match="no chat template"):
        render_chat(tokenizer, [{"role": "user", "content": "hi"}])


# Other tokenizers a GGUF file may hold.


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "in 12345", ["in", "Ġ", "1", "2", "3", "4", "5"]),
        ("smollm", "in 12345", ["in", "Ġ", "1", "2", "3", "4", "5"]),
        ("llama-bpe", "the\n\n and", ["the", "Ċ", "Ċ", "Ġand"]),
        ("qwen2", "THE'LL in", ["T", "H", "E", "'", "L", "L", "Ġ", "in"]),
    ],
)
def test_pre_tokenizers_split_before_merging(pre: str, text: str, pieces: list[str], tmp_path: Path) -> None:
    tokenizer = checkpoints.load_tokenizer(str(make_tiny_gguf(tmp_path / "tiny.gguf", pre=pre)))
    assert tokenizer.convert_ids_to_tokens(encode_text(tokenizer, text)) == pieces


def pre_tokens(pre: str, text: str, folder: Path) -> list[str]:
    tokenizer = checkpoints.load_tokenizer(str(make_tiny_gguf(folder / f"{pre}.gguf", pre=pre)))
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    return [text[start:stop] for _, (start, stop) in split]


def test_digit_runs_split_as_each_rule_says(tmp_path: Path) -> None:
    assert pre_tokens("gpt-2", "x 12345", tmp_path) == ["x", " 12345"]
    assert pre_tokens("smollm", "x 12345", tmp_path) == ["x", " ", "1", "2", "3", "4", "5"]
    assert pre_tokens("llama-bpe", "x 12345", tmp_path) == ["x", " ", "123", "45"]
    assert pre_tokens("qwen2", "x 12345", tmp_path) == ["x", " ", "1", "2", "3", "4", "5"]
    assert pre_tokens("llama-bpe", "we'LL go.\n\nso", tmp_path) == ["we", "'LL", " go", ".\n\n", "so"]
    assert pre_tokens("gpt-2", "we'll  go", tmp_path) == ["we", "'ll", " ", " go"]


def test_a_file_that_names_no_pre_tokenizer_is_refused(tmp_path: Path) -> None:
    metadata = model_metadata(tiny_config(10)) | {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["a", "b"],
        "tokenizer.ggml.merges": ["a b"],
    }
    with pytest.raises(ModelError, match="does not name its pre-tokenizer"):
        checkpoints.load_tokenizer(str(write_gguf(tmp_path / "old.gguf", metadata, {})))


@pytest.mark.parametrize("adds_bos", [True, False])
def test_bos_is_added_once_where_the_file_asks_for_it(adds_bos: bool, tmp_path: Path) -> None:
    path = make_tiny_gguf(tmp_path / "tiny.gguf", extra={"tokenizer.ggml.add_bos_token": adds_bos})
    tokenizer = checkpoints.load_tokenizer(str(path))
    assert encode_text(tokenizer, "the").count(1) == adds_bos
    assert encode_text(tokenizer, "<|im_start|>the").count(1) == 1
    chat = render_chat(tokenizer, [{"role": "user", "content": "the"}])
    assert chat.count(1) == 2, "one a message and one for the answer, none added in front"


def test_a_llama3_file_that_is_silent_adds_bos(tmp_path: Path) -> None:
    metadata = model_metadata(tiny_config(298)) | tokenizer_metadata("llama-bpe")
    del metadata["tokenizer.ggml.add_bos_token"]
    tokenizer = checkpoints.load_tokenizer(str(write_gguf(tmp_path / "a.gguf", metadata, {})))
    assert encode_text(tokenizer, "the")[0] == 1


# SentencePiece.

PIECES = ["<unk>", "<s>", "</s>"]
WORDS = [
    MARK,
    "a",
    "b",
    "c",
    "ab",
    "bc",
    "abc",
    MARK + "a",
    MARK + "ab",
    MARK + MARK,
    "ca",
    "cab",
    "é",
    "<b>",
]


def sentencepiece_metadata(**extra: Any) -> dict[str, Any]:
    tokens = [*PIECES, *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    scores = [0.0] * (3 + 256) + [-float(i) for i in (9, 10, 11, 12, 3, 2, 4, 5, 1, 6, 8, 7, 13, 0)]
    types = [2, 3, 3, *[6] * 256, *[1] * (len(WORDS) - 1), 4]
    return model_metadata(tiny_config(len(tokens))) | {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **extra,
    }


def merge_by_score(text: str, metadata: dict[str, Any]) -> list[str]:
    """SentencePiece's rule, one merge at a time: the best-scoring neighbours, the leftmost of equals."""
    scores = dict(zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"], strict=True))
    normal = set(WORDS) - {"<b>"}
    symbols = list(MARK + text.replace(" ", MARK))
    while True:
        pairs = [(scores[a + b], -i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in normal]
        if not pairs:
            break
        at = -max(pairs)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    pieces = []
    for symbol in symbols:
        pieces += [symbol] if symbol in normal else [f"<0x{byte:02X}>" for byte in symbol.encode()]
    return pieces


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("spm") / "spm.gguf"
    return checkpoints.load_tokenizer(str(write_gguf(path, sentencepiece_metadata(), {})))


@given(text=st.text("abc é\n漢\U0001f600", min_size=1, max_size=24))
@settings(max_examples=150, deadline=None)
def test_sentencepiece_merges_by_score_and_falls_back_to_bytes(sentencepiece: Any, text: str) -> None:
    ids = encode_text(sentencepiece, text)
    assert ids[0] == 1, "a SentencePiece model begins with BOS unless its file says otherwise"
    pieces = sentencepiece.convert_ids_to_tokens(ids[1:])
    assert pieces == merge_by_score(text, sentencepiece_metadata())
    assert sentencepiece.decode(ids, skip_special_tokens=True) == text


def test_user_defined_tokens_are_found_in_text_and_shown(sentencepiece: Any) -> None:
    ids = encode_text(sentencepiece, "ab<b>c")
    assert "<b>" in sentencepiece.convert_ids_to_tokens(ids)
    assert "<b>" in sentencepiece.decode(ids, skip_special_tokens=True)


def test_the_space_prefix_can_be_off(tmp_path: Path) -> None:
    metadata = sentencepiece_metadata(**{"tokenizer.ggml.add_space_prefix": False})
    tokenizer = checkpoints.load_tokenizer(str(write_gguf(tmp_path / "a.gguf", metadata, {})))
    ids = encode_text(tokenizer, "ab ab")
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "ab", MARK + "ab"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab ab"


def test_scores_must_match_the_vocabulary(tmp_path: Path) -> None:
    metadata = sentencepiece_metadata(**{"tokenizer.ggml.scores": [0.0, 1.0]})
    with pytest.raises(ModelError, match="2 scores"):
        checkpoints.load_tokenizer(str(write_gguf(tmp_path / "a.gguf", metadata, {})))


# The tiny checkpoint's own.


@given(text=ANY_TEXT)
@settings(max_examples=100, deadline=None)
def test_the_tiny_tokenizer_round_trips_any_text(text: str) -> None:
    tokenizer = make_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
