"""From a JSON schema as users write it to one that llguidance's grammar follows to the letter.

llguidance refuses by itself what it does not implement (`not`, `if`, `uniqueItems`, ...). Here is the rest:
what it would read more widely than JSON Schema 2020-12 does is spelled out where a pattern can say it, and
refused where none can. A refusal is a `RequestError`; an output that does not follow its schema would be an
error that nobody sees.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from fractions import Fraction
from math import lcm
from typing import Any, NoReturn

from engine.errors import RequestError

# Keywords whose value is a schema, a list of schemas, or a mapping of names to schemas.
_ONE = ("additionalProperties", "additionalItems", "items")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_COMBINING = ("allOf", "anyOf", "oneOf", "$ref")

# RFC 3339, section 5.6, in capitals and without leap seconds; years from 0001, as most date types have them.
_YEAR = "(?:[0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"
_LEAP_YEAR = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DATE = (
    f"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    f"|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP_YEAR}-02-29)"
)
_TIME = (
    r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,9})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
)
# llguidance's own have 29 February in every year, leap seconds in every minute, and the year 0000.
_EXACT_FORMATS = {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}T{_TIME}$"}
_MAX_EXACT, _MAX_DIGITS, _MAX_EXPONENT = 2**53, 15, 22
_UNWRITABLE = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")
_MAX_HOSTNAME_CHARS = 253
"""RFC 1123; llguidance holds the length of each label and not of them all."""

ANY_OBJECT = {"type": "object"}

COMPILE_OPTIONS = {
    # One space, or a line break with indentation: what printers of JSON write. Without a bound a weak model
    # may go on with spaces to its last token.
    "whitespace_pattern": r"\x20|\x0D?\x0A[\x20\x09]{0,64}",
    # Without \u: a key spelt with it would be another key to the grammar and the same one to who reads it.
    "json_allowed_escapes": 'nrbtf\\"',
    "coerce_one_of": False,
    "lenient": False,
}


def exact_schema(text: str) -> dict[str, Any]:
    """The schema to compile. Raises RequestError naming the place of what cannot be held."""
    schema: dict[str, Any] = json.loads(text)
    if "x-guidance" in schema:
        _refuse("#", "x-guidance changes how the schema is read: leave it out")
    parts = list(_subschemas(schema, "#"))
    is_draft_4 = "draft-04" in str(schema.get("$schema", ""))
    for part, where in parts:
        _check_numbers(part, where, is_draft_4)
        _check_texts(part, where)
        _check_counts(part, where)
    _check_multiples([part for part, _ in parts])
    for part, _ in parts:
        _spell_out(part)
    return schema


def _refuse(where: str, message: str) -> NoReturn:
    raise RequestError("bad_sampling", f"sampling.structured.json, {where}: {message}")


def _subschemas(schema: Any, where: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Every schema in a schema, itself first, with its JSON pointer; values that are no schemas are not."""
    if not isinstance(schema, dict):
        return
    yield schema, where
    for key, value in schema.items():
        at = f"{where}/{key}"
        if key in _ONE and isinstance(value, dict):
            yield from _subschemas(value, at)
        elif key in _LISTS and isinstance(value, list):
            for index, item in enumerate(value):
                yield from _subschemas(item, f"{at}/{index}")
        elif key in _MAPS and isinstance(value, dict):
            for name, item in value.items():
                yield from _subschemas(item, f"{at}/{name}")


def _check_numbers(schema: Mapping[str, Any], where: str, is_draft_4: bool) -> None:
    """llguidance reads numbers as doubles, and is sure to read them right within these bounds."""
    for key in (*_BOUNDS, "const", "enum"):
        for number in _values_in(schema.get(key), int | float):
            if abs(number) > _MAX_EXACT or not _is_short(number):
                _refuse(
                    f"{where}/{key}",
                    f"{number} may be read as another number: at most {_MAX_DIGITS} digits, and up to 2^53",
                )
    for key in ("exclusiveMinimum", "exclusiveMaximum"):
        if isinstance(schema.get(key), bool) and not is_draft_4:
            _refuse(f"{where}/{key}", "true and false are of draft 4: give the bound itself, or its $schema")


def _is_short(number: int | float) -> bool:
    """Whether a number that is no integer is read exactly, whatever reads it (Clinger 1990)."""
    if isinstance(number, int):
        return True
    _, digits, exponent = Decimal(repr(number)).normalize().as_tuple()
    return len(digits) <= _MAX_DIGITS and int(exponent) >= -_MAX_EXPONENT


def _check_texts(schema: Mapping[str, Any], where: str) -> None:
    """Of the escapes of JSON only those of one letter are written."""
    for key in ("const", "enum"):
        for text in _values_in(schema.get(key), str):
            if found := _UNWRITABLE.search(text):
                _refuse(f"{where}/{key}", f"the control character {found.group()!r} cannot be written")


def _values_in(value: Any, kind: Any) -> Iterator[Any]:
    """All values of a kind (true and false are no numbers) in a JSON value, keys included."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _values_in(key, kind)
            yield from _values_in(item, kind)
    elif isinstance(value, list):
        for item in value:
            yield from _values_in(item, kind)
    elif isinstance(value, kind) and not isinstance(value, bool):
        yield value


def _check_counts(schema: Mapping[str, Any], where: str) -> None:
    """Keys that no property names may come twice, and who reads the text keeps one of them."""
    least, required = schema.get("minProperties"), schema.get("required")
    num_named = len(set(map(str, required))) if isinstance(required, list) else 0
    if isinstance(least, int) and least > num_named + 1:
        _refuse(
            f"{where}/minProperties",
            f"{least} different keys cannot be held where {num_named} are required: require more by name",
        )
    if "additionalItems" in schema and any(key in schema for key in _COMBINING):
        _refuse(
            f"{where}/additionalItems", "beside allOf, anyOf, oneOf or $ref it is not held: use prefixItems"
        )


def _check_multiples(schemas: list[dict[str, Any]]) -> None:
    """Where schemas are combined, the least common multiple must fit llguidance's 32 bits."""
    if not any(key in schema for schema in schemas for key in _COMBINING):
        return
    multiples = [
        Fraction(str(schema["multipleOf"])) for schema in schemas if _is_number(schema, "multipleOf")
    ]
    scale = lcm(*(multiple.denominator for multiple in multiples))
    if lcm(*(int(multiple * scale) for multiple in multiples)) * scale >= 2**32:
        _refuse("#", "the values of multipleOf have too large a common multiple: use rounder ones")


def _is_number(schema: Mapping[str, Any], key: str) -> bool:
    return isinstance(schema.get(key), int | float) and not isinstance(schema[key], bool)


def _spell_out(schema: dict[str, Any]) -> None:
    """Write what llguidance reads too widely as something that it holds; and leave out what says nothing."""
    if schema.get("uniqueItems") is False:
        del schema["uniqueItems"]
    name = schema.get("format")
    if name == "hostname":
        longest = schema.get("maxLength")
        is_shorter = isinstance(longest, int) and longest <= _MAX_HOSTNAME_CHARS
        schema["maxLength"] = longest if is_shorter else _MAX_HOSTNAME_CHARS
    elif isinstance(name, str) and name in _EXACT_FORMATS:
        del schema["format"]
        if "pattern" not in schema:
            schema["pattern"] = _EXACT_FORMATS[name]
        elif isinstance(schema.setdefault("allOf", []), list):
            schema["allOf"] = [*schema["allOf"], {"pattern": _EXACT_FORMATS[name]}]
