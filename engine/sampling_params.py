"""How one prompt is sampled. Every field is honoured by the engine or refused here, none is ignored."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, NoReturn, get_args

from engine.errors import RequestError
from engine.stop_pattern import StopPattern
from engine.structured.spec import StructuredOutput

MAX_N = 16_384
MAX_TOKENS = 2**31 - 1
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 300
MAX_STOP_STRINGS = 64
MAX_BAD_WORDS = 256
MAX_STRING_LEN = 1_024
MAX_STOP_TOKEN_IDS = 1_024
MAX_TOKEN_ID = 2**31 - 1
MAX_SEED = 2**63 - 1
MIN_TEMPERATURE = 1e-5
"""Below this, dividing float32 logits loses their order; 0 asks for greedy by name."""

OutputKind = Literal["cumulative", "delta", "final_only"]
ExtraValue = str | int | float | bool | None
ALIASES = {"max_new_tokens": "max_tokens", "guided_decoding": "structured"}
"""Names that may be used in the place of the fields that they mean."""


def _refuse(name: str, value: object, expected: str) -> NoReturn:
    shown = repr(value)
    if len(shown) > 80:
        shown = shown[:77] + "..."
    raise RequestError("bad_sampling", f"sampling.{name} is {shown}: it must be {expected}", param=name)


def _integer(name: str, value: object, low: int, high: int, expected: str | None = None) -> int:
    expected = expected or f"a whole number from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, Integral):
        _refuse(name, value, expected)
    number = int(value)
    if not low <= number <= high:
        _refuse(name, value, expected)
    return number


def _real(name: str, value: object, low: float, high: float, expected: str | None = None) -> float:
    expected = expected or f"a number from {low:g} to {high:g}"
    if isinstance(value, bool) or not isinstance(value, Real):
        _refuse(name, value, expected)
    # Compared before it is made a float: an integer may be too large for one. NaN fails every comparison.
    number = int(value) if isinstance(value, Integral) else float(value)
    if not low <= number <= high:
        _refuse(name, value, expected)
    return float(number)


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        _refuse(name, value, "true or false")
    return value


def _sequence(name: str, value: object, expected: str) -> tuple[Any, ...]:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        _refuse(name, value, expected)
    return tuple(value)


def _strings(name: str, value: object, most: int) -> tuple[str, ...]:
    expected = f"at most {most} strings of 1 to {MAX_STRING_LEN} characters each"
    items = (value,) if isinstance(value, str) else _sequence(name, value, expected)
    if len(items) > most:
        _refuse(name, value, expected)
    for item in items:
        if not isinstance(item, str) or not 1 <= len(item) <= MAX_STRING_LEN:
            _refuse(name, item, expected)
        if any("\ud800" <= character <= "\udfff" for character in item):
            _refuse(name, item, "valid Unicode, without a lone surrogate")
    return tuple(dict.fromkeys(items))


def _token_ids(name: str, value: object, most: int) -> tuple[int, ...]:
    """Sorted and without repeats, so that equal sets make equal parameters."""
    expected = f"at most {most} token ids from 0 to {MAX_TOKEN_ID}"
    items = _sequence(name, value, expected)
    if len(items) > most:
        _refuse(name, value, expected)
    return tuple(sorted({_integer(name, item, 0, MAX_TOKEN_ID, expected) for item in items}))


def _logit_bias(value: object) -> tuple[tuple[int, float], ...]:
    """Pairs sorted by token id. JSON spells the ids as strings, so digits are accepted as keys."""
    expected = f"at most {MAX_LOGIT_BIAS} pairs of a token id and a number from -100 to 100"
    pairs = tuple(value.items()) if isinstance(value, Mapping) else _sequence("logit_bias", value, expected)
    if len(pairs) > MAX_LOGIT_BIAS:
        _refuse("logit_bias", value, expected)
    biases: dict[int, float] = {}
    for pair in pairs:
        if isinstance(pair, str) or not isinstance(pair, Iterable) or len(entry := tuple(pair)) != 2:
            _refuse("logit_bias", pair, expected)
        token, bias = entry
        if isinstance(token, str) and token.isascii() and token.isdigit() and len(token) <= 10:
            token = int(token)
        token = _integer("logit_bias", token, 0, MAX_TOKEN_ID, expected)
        if token in biases:
            _refuse("logit_bias", token, "named once")
        biases[token] = _real("logit_bias", bias, -100.0, 100.0, expected)
    return tuple(sorted(biases.items()))


def _extra_args(value: object) -> tuple[tuple[str, ExtraValue], ...]:
    """Pairs sorted by name."""
    expected = "a mapping of names to text, numbers, true, false or null"
    if value is None:
        return ()
    pairs = tuple(value.items()) if isinstance(value, Mapping) else _sequence("extra_args", value, expected)
    for pair in pairs:
        if not isinstance(pair, tuple) or len(pair) != 2 or not isinstance(pair[0], str):
            _refuse("extra_args", pair, expected)
        if not isinstance(pair[1], (str, int, float, bool, type(None))):
            _refuse("extra_args", pair, expected)
    return tuple(sorted(pairs, key=lambda pair: pair[0]))


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling of one prompt: validated and normalised on construction, hashable, equal if it means the same.

    Lists are accepted where tuples are declared, a mapping for `logit_bias`, one string for `stop` and
    `bad_words`. Raises `RequestError("bad_sampling", ...)` naming the field, the value and the range.
    """

    n: int = 1
    """Completions per prompt; they share the prompt's pages."""
    max_tokens: int = 16
    min_tokens: int = 0
    """Nothing stops a completion before this many tokens."""
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """0 is off."""
    top_p: float = 1.0
    min_p: float = 0.0
    """Tokens less likely than `min_p` times the likeliest are dropped."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    """Given, draws depend on it and the sample index alone; else on the run's seed and the row's id."""
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_words: tuple[str, ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    logprobs: int | None = None
    """How many of the likeliest alternatives to report with each token; 0 reports the drawn token alone."""
    prompt_logprobs: int | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    structured: StructuredOutput | None = None
    """What the text must follow; a mapping is accepted. It ends where it is complete, before `min_tokens`
    if nothing may follow. `max_tokens`, a stop string and a stop token that the text needs cut it where
    they come."""

    stop_pattern: str | None = None
    """A regular expression that ends a completion as a stop string does; which: `engine.stop_pattern`."""
    detokenize: bool = True
    """False: token ids alone, every text is empty."""
    spaces_between_special_tokens: bool = False
    """With `skip_special_tokens` off: a space between a special token and what is next to it."""
    best_of: int | None = None
    """So many completions are drawn and the `n` likeliest returned, by cumulative log-probability."""
    output_kind: OutputKind | None = None
    """Of a streamed request: each output has the whole text so far ("cumulative"), what is new ("delta"), or
    there is one at the end alone ("final_only"); given, `add_request` streams or not accordingly."""
    truncate_prompt_tokens: int | None = None
    """Cut the prompt to so many tokens, its last ones unless the engine's `truncate_mode` says otherwise."""
    extra_args: tuple[tuple[str, ExtraValue], ...] = ()
    """Values by name for the engine's `sampling_params_callback`; refused where there is none."""

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "n", _integer("n", self.n, 1, MAX_N))
        put(self, "max_tokens", _integer("max_tokens", self.max_tokens, 1, MAX_TOKENS))
        put(self, "min_tokens", _integer("min_tokens", self.min_tokens, 0, MAX_TOKENS))
        if self.min_tokens > self.max_tokens:
            _refuse("min_tokens", self.min_tokens, f"no more than max_tokens ({self.max_tokens})")
        expected = f"0 (greedy) or a number from {MIN_TEMPERATURE:g} to 1000"
        put(self, "temperature", _real("temperature", self.temperature, 0.0, 1000.0, expected))
        if 0.0 < self.temperature < MIN_TEMPERATURE:
            _refuse("temperature", self.temperature, expected)
        put(self, "top_k", _integer("top_k", self.top_k, 0, MAX_TOKEN_ID, "a whole number, 0 turning it off"))
        put(self, "top_p", _real("top_p", self.top_p, 0.0, 1.0, "a number above 0 and up to 1"))
        if self.top_p == 0.0:
            _refuse("top_p", self.top_p, "a number above 0 and up to 1")
        put(self, "min_p", _real("min_p", self.min_p, 0.0, 1.0))
        put(self, "presence_penalty", _real("presence_penalty", self.presence_penalty, -2.0, 2.0))
        put(self, "frequency_penalty", _real("frequency_penalty", self.frequency_penalty, -2.0, 2.0))
        put(self, "repetition_penalty", _real("repetition_penalty", self.repetition_penalty, 0.01, 100.0))
        if self.seed is not None:
            put(self, "seed", _integer("seed", self.seed, 0, MAX_SEED))
        put(self, "stop", _strings("stop", self.stop, MAX_STOP_STRINGS))
        put(self, "stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS))
        put(self, "ignore_eos", _flag("ignore_eos", self.ignore_eos))
        put(self, "logit_bias", _logit_bias(self.logit_bias))
        put(self, "bad_words", _strings("bad_words", self.bad_words, MAX_BAD_WORDS))
        if self.allowed_token_ids is not None:
            allowed = _token_ids("allowed_token_ids", self.allowed_token_ids, MAX_TOKEN_ID)
            if not allowed:
                _refuse("allowed_token_ids", self.allowed_token_ids, "absent, or at least one token id")
            put(self, "allowed_token_ids", allowed)
        if self.logprobs is not None:
            put(self, "logprobs", _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS))
        if self.prompt_logprobs is not None:
            put(self, "prompt_logprobs", _integer("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS))
        include = _flag("include_stop_str_in_output", self.include_stop_str_in_output)
        put(self, "include_stop_str_in_output", include)
        put(self, "skip_special_tokens", _flag("skip_special_tokens", self.skip_special_tokens))
        if self.structured is not None:
            put(self, "structured", StructuredOutput.of(self.structured))
            if self.ignore_eos:
                _refuse(
                    "ignore_eos", True, "false with sampling.structured, whose text ends where it is complete"
                )
        for name in ("detokenize", "spaces_between_special_tokens"):
            put(self, name, _flag(name, getattr(self, name)))
        self._check_later_fields(put)

    def _check_later_fields(self, put: Callable[[Any, str, Any], None]) -> None:
        if self.stop_pattern is not None:
            if not isinstance(self.stop_pattern, str):
                _refuse("stop_pattern", self.stop_pattern, "a regular expression, as text")
            StopPattern.of(self.stop_pattern)
        if not self.detokenize and (self.stop or self.stop_pattern is not None):
            _refuse(
                "detokenize", False, "true where stop strings or a stop_pattern are looked for in the text"
            )
        if self.best_of is not None:
            put(self, "best_of", _integer("best_of", self.best_of, self.n, MAX_N))
        if self.output_kind is not None:
            kind = str(getattr(self.output_kind, "value", self.output_kind)).lower()
            if kind not in get_args(OutputKind):
                _refuse("output_kind", self.output_kind, "one of cumulative, delta, final_only")
            put(self, "output_kind", kind)
        if self.truncate_prompt_tokens is not None:
            most = _integer("truncate_prompt_tokens", self.truncate_prompt_tokens, 1, MAX_TOKENS)
            put(self, "truncate_prompt_tokens", most)
        put(self, "extra_args", _extra_args(self.extra_args))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SamplingParams:
        """Parameters from plain values (a config, a row's column); `max_new_tokens` means `max_tokens`,
        `guided_decoding` `structured`."""
        return cls(**_known_names(values))

    def replace(self, **overrides: Any) -> SamplingParams:
        """A copy with some fields changed and everything validated again; names as in `from_dict`."""
        return dataclasses.replace(self, **_known_names(overrides))

    def as_dict(self) -> dict[str, Any]:
        """Its fields, to be compared with those of another run. Fields that came after runs had been made
        without them are left out at their default, so that these runs go on."""
        return {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if name not in _LATER_DEFAULTS or value != _LATER_DEFAULTS[name]
        }

    @property
    def num_samples(self) -> int:
        """Completions that are drawn: `best_of`, or `n`."""
        return self.best_of or self.n

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    def check_vocab(self, vocab_size: int) -> None:
        """Raises RequestError when a token id named here does not exist in a vocabulary of `vocab_size`."""
        # The tuples are sorted, so the last id is the largest.
        for name, last in (
            ("stop_token_ids", self.stop_token_ids[-1:]),
            ("logit_bias", self.logit_bias[-1][:1] if self.logit_bias else ()),
            ("allowed_token_ids", (self.allowed_token_ids or ())[-1:]),
        ):
            if last and last[0] >= vocab_size:
                _refuse(name, last[0], f"a token id below the vocabulary's size, {vocab_size}")


_LATER = ("structured", "stop_pattern", "detokenize", "spaces_between_special_tokens")
INTERACTIVE_FIELDS: Mapping[str, str] = {
    "best_of": "keeps every sample: ask for n, and choose by cumulative_logprob afterwards",
    "output_kind": "has one output a row",
    "truncate_prompt_tokens": "cuts prompts by prompt.over_long",
    "extra_args": "has no callback that would read them",
}
"""What only a caller of the engine can ask for, and what a job, which refuses it by name, does instead."""
_LATER_DEFAULTS = {
    field.name: field.default
    for field in dataclasses.fields(SamplingParams)
    if field.name in (*_LATER, *INTERACTIVE_FIELDS)
}
_FIELD_NAMES = tuple(field.name for field in dataclasses.fields(SamplingParams))
_KNOWN = frozenset(_FIELD_NAMES)
_init = SamplingParams.__init__


@functools.wraps(_init)
def _init_by_any_name(self: SamplingParams, **values: Any) -> None:
    _init(self, **_known_names(values))


# The constructor takes the names that `from_dict` does, which a dataclass's own cannot.
SamplingParams.__init__ = _init_by_any_name  # type: ignore[method-assign]


def _known_names(values: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise RequestError(
            "bad_sampling", f"sampling is a {type(values).__name__}: it must be a mapping of names to values"
        )
    if values.keys() <= _KNOWN:
        return dict(values)
    known: dict[str, Any] = {}
    for given, value in values.items():
        name = ALIASES.get(given, given)
        if name not in _FIELD_NAMES:
            near = difflib.get_close_matches(str(given), (*_FIELD_NAMES, *ALIASES), n=1, cutoff=0.0)
            raise RequestError(
                "bad_sampling", f"sampling.{given} does not exist: the nearest name is {near[0]!r}"
            )
        if name in known:
            raise RequestError("bad_sampling", f"sampling.{name} is given twice, also as {given!r}")
        known[name] = value
    return known
