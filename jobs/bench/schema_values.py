"""Schemas of single values for `schema_cases`, and what its other parts are made of."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]
Make = Callable[[random.Random], Schema]

WORDS = ("name", "age", "city", "price", "kind", "tags", "notes", "owner", "count", "rank", "unit", "label")
UNICODE_WORDS = (
    "größe",
    "名前",
    "città",
    "имя",
    "δ",
    "emoji 🎉",
    "naïve key",
    'quote"key',
    "back\\slash",
    "a b",
)
PATTERNS = (
    "^[A-Z]{2}[0-9]{4}$",
    "^(red|green|blue)-[0-9]+$",
    "^[a-z]+(_[a-z]+)*$",
    "^\\d{3}-\\d{4}$",
    "^#[0-9a-fA-F]{6}$",
    "ab+c",
    "^x",
    "y$",
    "^[^aeiou\\s]{3,8}$",
    "^\\w+@\\w+\\.(com|org)$",
    "^(?:a|b)(?:c|d)?e*$",
    "^$|^[0-9]$",
)
LOOKAROUND_PATTERNS = ("^(?=.*[0-9])[a-z0-9]+$", "^(?!no)[a-z]+$")
FORMATS = ("date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
OTHER_FORMATS = ("regex", "json-pointer", "iri", "idn-email")


def scalar(chance: random.Random) -> Schema:
    return chance.choice(
        (
            {"type": "string", "maxLength": chance.randint(1, 24)},
            {"type": "integer", "minimum": -1000, "maximum": 1000},
            {"type": "number", "minimum": 0, "maximum": 100},
            {"type": "boolean"},
            {"type": "null"},
            {"enum": chance.sample(WORDS, 3)},
        )
    )


def some_names(chance: random.Random, most: int = 5) -> list[str]:
    return chance.sample(WORDS, chance.randint(1, most))


def _types(chance: random.Random) -> Schema:
    types = chance.sample(("string", "integer", "number", "boolean", "null"), chance.randint(1, 3))
    return {"type": types if chance.random() < 0.7 else types[0], "maxLength": 20}


def _string_lengths(chance: random.Random) -> Schema:
    least = chance.randint(0, 12)
    return {"type": "string", "minLength": least, "maxLength": least + chance.randint(0, 20)}


def _pattern(chance: random.Random) -> Schema:
    schema: Schema = {"type": "string", "pattern": chance.choice(PATTERNS), "maxLength": 24}
    if chance.random() < 0.3:
        del schema["maxLength"]
    return schema


def _pattern_with_lookaround(chance: random.Random) -> Schema:
    return {"type": "string", "pattern": chance.choice(LOOKAROUND_PATTERNS)}


def _format(chance: random.Random) -> Schema:
    name = chance.choice(FORMATS if chance.random() < 0.85 else OTHER_FORMATS)
    schema: Schema = {"type": "string", "format": name}
    if name in ("email", "hostname", "uri") or chance.random() < 0.2:
        schema["maxLength"] = 40
    return schema


def _formats_in_an_object(chance: random.Random) -> Schema:
    names = chance.sample(("date", "time", "date-time", "ipv4", "uuid"), 2)
    properties: Schema = {f"{name}_value": {"type": "string", "format": name} for name in names}
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _integer_bounds(chance: random.Random) -> Schema:
    low = chance.choice((-(10**9), -517, -10, -1, 0, 1, 7, 99, 1000))
    high = low + chance.choice((0, 1, 9, 90, 12345))
    schema: Schema = {"type": "integer", "minimum": low, "maximum": high}
    if chance.random() < 0.3 and high > low:
        schema = {"type": "integer", "exclusiveMinimum": low - 1, "exclusiveMaximum": high + 1}
    return schema


def _number_bounds(chance: random.Random) -> Schema:
    low = round(chance.uniform(-100, 100), chance.randint(0, 4))
    high = round(low + chance.uniform(0.5, 300), chance.randint(0, 3))
    bounds = chance.choice(
        (
            {"minimum": low, "maximum": high},
            {"exclusiveMinimum": low, "exclusiveMaximum": high},
            {"minimum": low, "exclusiveMaximum": high},
            {"minimum": low},
            {"exclusiveMaximum": high},
        )
    )
    return {"type": "number", **bounds}


def _multiple_of(chance: random.Random) -> Schema:
    multiple = chance.choice((2, 3, 5, 7, 10, 25, 0.5, 0.25, 0.1, 0.01, 1.5))
    kind = "integer" if isinstance(multiple, int) else "number"
    return {"type": kind, "multipleOf": multiple, "minimum": 0, "maximum": 10_000}


def _beyond_numbers(chance: random.Random) -> Schema:
    return chance.choice(
        (
            {"const": 2**60 + 1},
            {"type": "integer", "minimum": 2**53 + 1},
            {"allOf": [{"multipleOf": 65537}, {"multipleOf": 65539}], "type": "integer"},
            {"type": "integer", "minimum": 10, "maximum": 5},
        )
    )


def _enum(chance: random.Random) -> Schema:
    values: list[Any] = [
        "a",
        "a b",
        "",
        'q"',
        "\n",
        "é",
        "🎉",
        0,
        1,
        -7,
        2.5,
        1e-3,
        True,
        False,
        None,
        [1, "x"],
        {},
    ]
    values += [{"k": 1}, {"b": [None], "a": {"c": "d"}}]
    return {"enum": chance.sample(values, chance.randint(1, 8))}


def _large_enum(chance: random.Random) -> Schema:
    number = chance.choice((50, 200, 500, 1000))
    if chance.random() < 0.3:
        return {"enum": chance.sample(range(-5000, 5000), number)}
    return {"enum": [f"{chance.choice(WORDS)}_{index:04d}" for index in range(number)]}


def _const(chance: random.Random) -> Schema:
    values: tuple[Any, ...] = (
        "fixed",
        "ünï\tcode",
        42,
        -0.25,
        True,
        None,
        [],
        [1, [2, [3]]],
        {"a": {"b": "c"}},
    )
    return {"const": chance.choice(values)}


VALUE_KINDS: dict[str, Make] = {
    "type": _types,
    "string length": _string_lengths,
    "pattern": _pattern,
    "pattern with look-around": _pattern_with_lookaround,
    "format": _format,
    "formats in an object": _formats_in_an_object,
    "integer bounds": _integer_bounds,
    "number bounds": _number_bounds,
    "multipleOf": _multiple_of,
    "numbers beyond range": _beyond_numbers,
    "enum": _enum,
    "large enum": _large_enum,
    "const": _const,
}
