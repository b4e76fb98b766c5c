"""What a completion must look like, as a value: checked for its form here, compiled in `grammars`."""

from __future__ import annotations

import dataclasses
import difflib
import json as json_text
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from engine.errors import RequestError

MAX_SCHEMA_CHARS = 262_144
MAX_SCHEMA_DEPTH = 96
"""Objects and lists inside one another; llguidance itself reads 128."""
MAX_REGEX_CHARS = 16_384
MAX_GRAMMAR_CHARS = 65_536
MAX_GRAMMAR_DEPTH = 96
MAX_CHOICES = 4_096
MAX_CHOICE_CHARS = 65_536
"""Of all choices together."""

_BRACKETS = {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutput:
    """Exactly one of these. Raises `RequestError("bad_sampling", ...)` for what cannot be one.

    Equal if it asks for the same; the order of a schema's keys counts, for an object's properties come in it.
    """

    json: str | None = None
    """A JSON schema as JSON text; a mapping is accepted too."""
    regex: str | None = None
    """The whole text matches it: Rust's syntax, without look-around and back-references."""
    choice: tuple[str, ...] | None = None
    """The text is one of these."""
    grammar: str | None = None
    """In Lark's notation, as llguidance reads it."""
    json_object: bool = False
    """Any JSON object."""

    def __post_init__(self) -> None:
        put = object.__setattr__
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        given = [name for name, value in fields.items() if value is not None and value is not False]
        if len(given) != 1:
            names = "json, regex, choice, grammar, json_object"
            shown = " and ".join(given) or "none"
            _refuse(f"sampling.structured has {shown} of {names}: give one")
        if not isinstance(self.json_object, bool):
            _refuse(f"sampling.structured.json_object is {self.json_object!r}: it must be true or false")
        if self.json is not None:
            put(self, "json", _schema_text(self.json))
        if self.regex is not None:
            put(self, "regex", _text("regex", self.regex, MAX_REGEX_CHARS))
        if self.choice is not None:
            put(self, "choice", _choices(self.choice))
        if self.grammar is not None:
            put(self, "grammar", _grammar(self.grammar))

    @classmethod
    def of(cls, value: object) -> StructuredOutput:
        """One as it is, or made of plain values (a config, a row's column, a request's body)."""
        if isinstance(value, StructuredOutput):
            return value
        if not isinstance(value, Mapping):
            _refuse(
                f"sampling.structured is a {type(value).__name__}: it must be a mapping with one of "
                f"{', '.join(_NAMES)}"
            )
        for name in value:
            if name not in _NAMES:
                near = difflib.get_close_matches(str(name), _NAMES, n=1, cutoff=0.0)
                _refuse(f"sampling.structured.{name} does not exist: the nearest name is {near[0]!r}")
        return cls(**value)


_NAMES = tuple(field.name for field in dataclasses.fields(StructuredOutput))


def _refuse(message: str) -> NoReturn:
    raise RequestError("bad_sampling", message)


def _text(name: str, value: object, most: int) -> str:
    if not isinstance(value, str) or not 1 <= len(value) <= most:
        shown = f"{len(value)} characters long" if isinstance(value, str) else repr(value)[:80]
        _refuse(f"sampling.structured.{name} is {shown}: it must be text of 1 to {most} characters")
    if any("\ud800" <= character <= "\udfff" for character in value):
        _refuse(f"sampling.structured.{name} is not valid Unicode: it has a lone surrogate")
    return value


def _choices(value: object) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence) or not 1 <= len(value) <= MAX_CHOICES:
        _refuse(
            f"sampling.structured.choice is {repr(value)[:80]}: it must be a list of 1 to {MAX_CHOICES} texts"
        )
    choices = tuple(dict.fromkeys(_text("choice", each, MAX_CHOICE_CHARS) for each in value))
    if sum(map(len, choices)) > MAX_CHOICE_CHARS:
        _refuse(
            f"sampling.structured.choice: its texts have more than {MAX_CHOICE_CHARS} characters together"
        )
    return choices


def _grammar(value: object) -> str:
    text = _text("grammar", value, MAX_GRAMMAR_CHARS)
    depth = deepest = 0
    for character in text:  # those in strings count too: a parser that recurses must not be led too deep
        depth = max(0, depth + _BRACKETS.get(character, 0))
        deepest = max(deepest, depth)
    if deepest > MAX_GRAMMAR_DEPTH:
        _refuse(f"sampling.structured.grammar has brackets more than {MAX_GRAMMAR_DEPTH} deep")
    return text


def _schema_text(value: object) -> str:
    """A schema's JSON without spaces, its keys in the order given."""
    if isinstance(value, str):
        if len(value) > MAX_SCHEMA_CHARS:
            _refuse_size(len(value))
        if value.count("[") + value.count("{") > MAX_SCHEMA_DEPTH:
            _check_depth_of_text(value)
        try:
            value = _DECODER.decode(value)
        except json_text.JSONDecodeError as error:
            _refuse(
                f"sampling.structured.json is not JSON at character {error.pos + 1}: {error.msg}; mend it"
            )
    if not isinstance(value, Mapping):
        _refuse(f"sampling.structured.json is a {type(value).__name__}: it must be a JSON schema, an object")
    _check_values(value, 1)
    text = json_text.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    if len(text) > MAX_SCHEMA_CHARS:
        _refuse_size(len(text))
    return text


def _refuse_size(num_chars: int) -> NoReturn:
    _refuse(f"sampling.structured.json has {num_chars:,} characters: at most {MAX_SCHEMA_CHARS:,}")


def _refuse_depth() -> NoReturn:
    _refuse(f"sampling.structured.json is nested deeper than {MAX_SCHEMA_DEPTH} levels")


def _check_depth_of_text(text: str) -> None:
    """Before it is parsed, by a parser that recurses. Raises RequestError."""
    depth, is_string, characters = 0, False, iter(text)
    for character in characters:
        if is_string:
            if character == "\\":
                next(characters, None)
            is_string = character != '"'
        elif character == '"':
            is_string = True
        else:
            depth += _BRACKETS.get(character, 0)
            if depth > MAX_SCHEMA_DEPTH:
                _refuse_depth()


def _check_values(value: Any, depth: int) -> None:
    """Raises RequestError for what no JSON text could hold as it is."""
    if depth > MAX_SCHEMA_DEPTH:
        _refuse_depth()
    if isinstance(value, str):
        if any("\ud800" <= character <= "\udfff" for character in value):
            _refuse("sampling.structured.json has a lone surrogate in a text: mend the schema")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                _refuse(f"sampling.structured.json has the key {key!r}: keys are texts")
            _check_values(key, depth)
            _check_values(item, depth + 1)
    elif isinstance(value, list | tuple):
        for item in value:
            _check_values(item, depth + 1)
    elif isinstance(value, float):
        if not float("-inf") < value < float("inf"):
            _refuse(f"sampling.structured.json has the number {value}: it does not fit a double")
    elif not (value is None or isinstance(value, bool | int)):
        _refuse(f"sampling.structured.json has a {type(value).__name__}: give JSON values")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            _refuse(
                f"sampling.structured.json has the key {key[:80]!r} twice in one object: keep one of them"
            )
        found[key] = value
    return found


def _integer(digits: str) -> int:
    if len(digits) > 640:  # Python's least limit on what it reads, whatever the environment says
        _refuse(f"sampling.structured.json has an integer of {len(digits)} digits: at most 640")
    return int(digits)


_DECODER = json_text.JSONDecoder(object_pairs_hook=_unique, parse_int=_integer)
