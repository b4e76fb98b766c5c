"""The tokenizer of a GGUF file, built from its metadata, so that it gives the ids llama.cpp gives.

Two models: `gpt2` (byte-level BPE with a merge list; the text is first split by the pre-tokenizer the file
names) and `llama` (SentencePiece BPE: pieces merge by score, unknown characters fall back to bytes).
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from engine.checkpoints.gguf_file import GgufFile
from engine.checkpoints.reading import one_line
from engine.errors import ModelError

# Token types of llama.cpp (LLAMA_TOKEN_TYPE_*).
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4

_SPACE = "\u2581"
"""SentencePiece's mark for a space."""


def _byte_level(*, use_regex: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, _byte_level(use_regex=False)])


def _modern_pattern(digits: str) -> str:
    """The splitting rule tiktoken's cl100k began, with the length of a run of digits as its parameter."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return _byte_level(use_regex=True)


def _single_digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), _byte_level(use_regex=True)]
    )


_PRE_TOKENIZERS = {
    "gpt-2": _gpt2,
    "mpt": _gpt2,
    "olmo": _gpt2,
    "smollm": _single_digits,
    "starcoder": _single_digits,
    "refact": _single_digits,
    "command-r": _single_digits,
    "llama-bpe": lambda: _split(_modern_pattern(r"\p{N}{1,3}")),
    "llama3": lambda: _split(_modern_pattern(r"\p{N}{1,3}")),
    "llama-v3": lambda: _split(_modern_pattern(r"\p{N}{1,3}")),
    "smaug-bpe": lambda: _split(_modern_pattern(r"\p{N}{1,3}")),
    "qwen2": lambda: _split(_modern_pattern(r"\p{N}")),
}
"""How text is split before merging, by the name in `tokenizer.ggml.pre`."""

_WHOLE_WORDS_FIRST = frozenset({"llama-bpe", "llama3", "llama-v3"})
"""These look a whole word up before they merge, and begin a text with BOS unless told not to."""


def gguf_tokenizer(file: GgufFile) -> Any:
    """A transformers fast tokenizer with the file's vocabulary, special tokens and chat template.

    ModelError where the model or the pre-tokenizer is not one of ours, by name, or the vocabulary is
    inconsistent.
    """
    model = file.require("tokenizer.ggml.model", str)
    tokens = _strings(file, "tokenizer.ggml.tokens")
    types = file.get("tokenizer.ggml.token_type", list, [_NORMAL] * len(tokens))
    if len(types) != len(tokens):
        raise ModelError(f"{file.path}: {len(types)} token types for {len(tokens)} tokens")
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise ModelError(f"{file.path}: {len(tokens) - len(vocab)} tokens of the vocabulary appear twice")
    try:
        if model == "gpt2":
            tokenizer, adds_bos = _byte_level_bpe(file, vocab)
        elif model == "llama":
            tokenizer, adds_bos = _sentencepiece_bpe(file, tokens, types)
        else:
            raise ModelError(
                f"{file.path}: the tokenizer model {model!r} is not implemented: we have gpt2, llama"
            )
        _add_added_tokens(tokenizer, tokens, types)
        _add_template(file, tokenizer, tokens, adds_bos)
    except ModelError:
        raise
    except Exception as error:  # The tokenizers library raises plain Exception for a vocabulary it refuses.
        raise ModelError(f"{file.path}: the tokenizer cannot be built ({one_line(error)})") from error
    return _wrap(file, tokenizer, tokens)


def _strings(file: GgufFile, key: str) -> list[str]:
    values = file.require(key, list)
    if not values or not all(isinstance(value, str) for value in values):
        raise ModelError(f"{file.path}: metadata {key} must be a list of strings")
    return values


def _byte_level_bpe(file: GgufFile, vocab: dict[str, int]) -> tuple[Tokenizer, bool]:
    name = file.get("tokenizer.ggml.pre", str)
    if name not in _PRE_TOKENIZERS:
        said = (
            "does not name its pre-tokenizer" if name is None else f"has the unknown pre-tokenizer {name!r}"
        )
        raise ModelError(
            f"{file.path}: {said}, so text would be split wrongly: we have {', '.join(_PRE_TOKENIZERS)}"
        )
    merges = []
    for merge in _strings(file, "tokenizer.ggml.merges"):
        cut = merge.find(" ", 1)  # From 1: a piece may itself begin with a space.
        if cut < 0:
            raise ModelError(f"{file.path}: the merge {merge[:40]!r} is not a pair")
        merges.append((merge[:cut], merge[cut + 1 :]))
    whole_words_first = name in _WHOLE_WORDS_FIRST
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=whole_words_first))
    if name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()  # What these models were trained with.
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[name]()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, whole_words_first


def _sentencepiece_bpe(file: GgufFile, tokens: list[str], types: list[int]) -> tuple[Tokenizer, bool]:
    scores = file.require("tokenizer.ggml.scores", list)
    if len(scores) != len(tokens):
        raise ModelError(f"{file.path}: {len(scores)} scores for {len(tokens)} tokens")
    unknown = next((tokens[i] for i, kind in enumerate(types) if kind == _UNKNOWN), None)
    vocab = {token: index for index, token in enumerate(tokens)}
    bpe = models.BPE(
        vocab=vocab,
        merges=_merges_by_score(vocab, scores, types),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(bpe)
    marks: list[Any] = [normalizers.Replace(" ", _SPACE)]
    shown: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if file.get("tokenizer.ggml.add_space_prefix", bool, True):
        marks.insert(0, normalizers.Prepend(_SPACE))
        shown.append(decoders.Strip(content=" ", left=1))
    tokenizer.normalizer = normalizers.Sequence(marks)
    tokenizer.decoder = decoders.Sequence(shown)
    return tokenizer, True


def _merges_by_score(vocab: dict[str, int], scores: list[float], types: list[int]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, best score first: SentencePiece merges in that order."""
    merges: list[tuple[float, int, int, tuple[str, str]]] = []
    for piece, index in vocab.items():
        if types[index] != _NORMAL:
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                merges.append((-scores[index], vocab[left], vocab[right], (left, right)))
    merges.sort()
    return [pair for *_, pair in merges]


def _add_added_tokens(tokenizer: Tokenizer, tokens: list[str], types: list[int]) -> None:
    """Control and unknown tokens are special; user-defined ones are matched in text, and shown."""
    special, plain = [], []
    for token, kind in zip(tokens, types, strict=True):
        if kind in (_CONTROL, _UNKNOWN) and token:
            special.append(AddedToken(token, special=True, normalized=False))
        elif kind == _USER_DEFINED and token:
            plain.append(AddedToken(token, special=False, normalized=False))
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)


def _special(file: GgufFile, tokens: list[str], name: str) -> str | None:
    index = file.get(f"tokenizer.ggml.{name}_token_id", int)
    if index is None:
        return None
    if not 0 <= index < len(tokens):
        raise ModelError(f"{file.path}: {name}_token_id {index} is outside the vocabulary of {len(tokens)}")
    return tokens[index]


def _add_template(file: GgufFile, tokenizer: Tokenizer, tokens: list[str], adds_bos: bool) -> None:
    """BOS before and EOS after a text, as the file says (or the tokenizer's model, where it is silent)."""
    bos, eos = _special(file, tokens, "bos"), _special(file, tokens, "eos")
    pieces, used = ["$A"], []
    if bos is not None and file.get("tokenizer.ggml.add_bos_token", bool, adds_bos):
        pieces.insert(0, bos)
        used.append(bos)
    if eos is not None and file.get("tokenizer.ggml.add_eos_token", bool, False):
        pieces.append(eos)
        used.append(eos)
    if used:
        tokenizer.post_processor = TemplateProcessing(
            single=pieces, special_tokens=[(token, tokens.index(token)) for token in dict.fromkeys(used)]
        )


def _wrap(file: GgufFile, tokenizer: Tokenizer, tokens: list[str]) -> Any:
    from transformers import PreTrainedTokenizerFast

    named = {
        "bos_token": _special(file, tokens, "bos"),
        "eos_token": _special(file, tokens, "eos"),
        "unk_token": _special(file, tokens, "unknown"),
        "pad_token": _special(file, tokens, "padding"),
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=file.get("tokenizer.chat_template", str),
        clean_up_tokenization_spaces=False,
        model_max_length=file.require("llama.context_length", int),
        **{name: token for name, token in named.items() if token is not None},
    )
