"""What structured output asks for, compiled once, and a sample's place in it.

llguidance compiles and follows grammars; nothing of a request runs as code. A grammar is tried in a process
of its own first (`trials`), which may die of it. What it may cost is bounded by counts that do not depend
on the machine. A compile takes half a second at the very worst, without Python's lock, and a trial
TRIAL_SECONDS: a thread that calls `Grammars.compiled` before it hands a request over spares the thread that
steps. A mask past its bounds ends its sample, with the finish reason "error".
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Collection, Sequence
from functools import lru_cache
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.errors import MissingExtraError, RequestError
from engine.structured.json_schemas import ANY_OBJECT, COMPILE_OPTIONS, exact_schema
from engine.structured.spec import StructuredOutput
from engine.structured.trials import Trials

if TYPE_CHECKING:
    from engine.request import Request
    from engine.sampling_params import SamplingParams

MAX_KEPT = 64
"""Compiled grammars that are kept beyond those of running requests."""
LIMITS = {
    "initial_lexer_fuel": 1_000_000,
    "max_grammar_size": 250_000,
    "max_lexer_states": 50_000,  # one to two kB each
    "max_items_in_row": 2_000,
    "step_lexer_fuel": 200_000,  # 14 ms or so
    "step_max_items": 50_000,  # 3 ms or so
    "verbose_errors": False,
}
_MAX_MESSAGE_CHARS = 300


class Grammars:
    """The compiled grammars of one engine. Thread-safe.

    tokenizer: a transformers fast tokenizer. vocab_size: the model's. eos_token_ids: what ends its texts.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: Collection[int]):
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(sorted(eos_token_ids))
        self._lock = Lock()
        self._kept: OrderedDict[StructuredOutput, CompiledGrammar | RequestError] = OrderedDict()
        self._vocabulary: Any = None
        self._trials = Trials(LIMITS)

    def compiled(self, sampling: SamplingParams) -> CompiledGrammar | None:
        """What the sampling asks for; None where it asks for nothing.

        Raises RequestError ("bad_sampling") for what cannot be compiled, MissingExtraError where llguidance
        is not installed.
        """
        asked = sampling.structured
        if asked is None:
            return None
        with self._lock:
            found = self._kept.get(asked)
            if found is not None:
                self._kept.move_to_end(asked)
        if found is None:
            try:
                found = self.compile(asked)
            except RequestError as error:
                found = error
            with self._lock:
                self._kept[asked] = found
                if len(self._kept) > MAX_KEPT:
                    self._kept.popitem(last=False)
        if isinstance(found, RequestError):
            raise RequestError(found.reason, str(found))
        return found

    def compile(self, asked: StructuredOutput) -> CompiledGrammar:
        """Compile, whatever is kept. Raises as `compiled`."""
        text = _grammar_text(asked)
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary, self._trials = self._read_vocabulary()
        if asked.grammar is None:
            check_structured(asked)
        elif error := self._trials.error_of(text):
            raise _not_compiled(error)
        matcher = _llguidance().LLMatcher(self._vocabulary, text, log_level=0, limits=_limits())
        if not matcher.is_error():
            # The first mask is the dearest, and what it finds out is shared with all samples.
            matcher.compute_bitmask()
        if matcher.is_error():
            raise _not_compiled(matcher.get_error())
        return CompiledGrammar(matcher, self._vocab_size)

    def _read_vocabulary(self) -> tuple[Any, Trials]:
        """As llguidance has it; and where grammars are tried that name its tokens."""
        if not self._eos_token_ids:
            raise RequestError(
                "bad_sampling", "sampling.structured needs a model that names its end-of-sequence token"
            )
        text = self._tokenizer.backend_tokenizer.to_str()
        ends = list(self._eos_token_ids)
        vocabulary = _llguidance().LLTokenizer(text, n_vocab=self._vocab_size, eos_token=ends)
        return vocabulary, Trials(LIMITS, text, self._vocab_size, self._eos_token_ids)


class CompiledGrammar:
    """A grammar at its beginning; samples of any number of requests begin with it."""

    def __init__(self, matcher: Any, vocab_size: int):
        self._matcher = matcher
        self._vocab_size = vocab_size

    def begin(self) -> GrammarState:
        """A sample's place before its first token."""
        return GrammarState(self._matcher.deep_copy(), -(-self._vocab_size // 32))


class GrammarState:
    """Where one sample is in its grammar.

    It moves by the sample's tokens when it is asked for a mask, so it is right after a preemption, and for a
    sample that begins with tokens of an earlier engine.
    """

    def __init__(self, matcher: Any, num_words: int):
        self._matcher = matcher
        self._num_words = num_words
        self._num_followed = 0
        self.failure: str | None = None
        """Why the sample cannot go on: following its grammar costs more than one may."""

    def accepts(self, token_ids: Sequence[int]) -> bool:
        """Whether a sample may begin with these tokens; it has then moved past them."""
        self._num_followed = len(token_ids)
        return not token_ids or self._matcher.consume_tokens(list(token_ids))

    def next_mask(self, request: Request) -> np.ndarray:
        """uint32[ceil(vocab_size / 32)], a bit a token: what may come after the sample's tokens.

        End-of-sequence tokens are among them where the text is complete, alone where nothing else may come,
        or where the sample has to end for `failure`.
        """
        self._follow(request)
        mask = np.zeros(self._num_words, np.uint32)
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        self._see_failure()
        return mask

    def draft_masks(self, request: Request, draft: Sequence[int]) -> np.ndarray:
        """The masks after the sample's tokens and after each token of `draft` that may come there: as many as
        can be, uint32[1 + accepted, ceil(vocab_size / 32)]. The sample stays where it is."""
        masks = [self.next_mask(request)]
        for token in draft:
            is_allowed = masks[-1][token // 32] >> np.uint32(token % 32) & np.uint32(1)
            if self.failure is not None or not is_allowed or token in request.end_token_ids:
                break
            self._matcher.consume_token(token)
            self._num_followed += 1
            mask = np.zeros(self._num_words, np.uint32)
            self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
            masks.append(mask)
        num_accepted = len(masks) - 1
        if num_accepted:
            self._matcher.rollback(num_accepted)
            self._num_followed -= num_accepted
        return np.stack(masks)

    def _follow(self, request: Request) -> None:
        start = request.prompt_len + self._num_followed
        if start < request.num_tokens:
            tokens = request.token_ids(start, request.num_tokens)
            self._matcher.consume_tokens(tokens)
            self._num_followed += len(tokens)

    def _see_failure(self) -> None:
        if self.failure is None and self._matcher.is_error():
            self.failure = _first_line(self._matcher.get_error())


@lru_cache(maxsize=1024)
def check_structured(asked: StructuredOutput | None) -> None:
    """Try whether it can be compiled, for whoever has no engine. Raises as `Grammars.compiled`; a grammar,
    which may name tokens of a vocabulary, is left to that."""
    if asked is None or asked.grammar is not None:
        return
    _llguidance()
    if error := _TRIALS.error_of(_grammar_text(asked)):
        raise _not_compiled(error)


_TRIALS = Trials(LIMITS)


def _grammar_text(asked: StructuredOutput) -> str:
    """The same as llguidance takes it. Raises RequestError."""
    matcher = _llguidance().LLMatcher
    if asked.regex is not None:
        return matcher.grammar_from_regex(asked.regex)
    if asked.choice is not None:
        return "start: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in asked.choice)
    if asked.grammar is not None:
        return asked.grammar
    schema = ANY_OBJECT if asked.json is None else exact_schema(asked.json)
    return matcher.grammar_from_json_schema(
        json.dumps(schema, ensure_ascii=False), overrides=json.dumps(COMPILE_OPTIONS)
    )


def _not_compiled(message: str) -> RequestError:
    if message.startswith("NoExtension"):
        message = "no text can follow it"
    return RequestError("bad_sampling", f"sampling.structured cannot be compiled: {_first_line(message)}")


def _first_line(message: str) -> str:
    # Without what it says of its own state and options.
    line = " ".join(message.partition("<non-verbose")[0].partition(" Enable '")[0].split())
    return line if len(line) <= _MAX_MESSAGE_CHARS else line[: _MAX_MESSAGE_CHARS - 1] + "…"


def _limits() -> Any:
    return _llguidance().LLParserLimits(**LIMITS)


def require_llguidance(purpose: str) -> Any:
    """The package; MissingExtraError where it is not installed, which says what `purpose` needs."""
    try:
        import llguidance
    except ImportError as error:
        raise MissingExtraError("llguidance", "structured", purpose) from error
    return llguidance


def _llguidance() -> Any:
    return require_llguidance("sampling.structured")
