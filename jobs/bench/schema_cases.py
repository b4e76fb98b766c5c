"""JSON schemas of many kinds, the same ones on every machine: what structured output's coverage is measured
on.

In the manner of JSONSchemaBench (Geng et al. 2025): what people write by hand, what tools generate, and one
keyword after another, alone and combined, those that cannot be followed included.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class SchemaCase:
    name: str
    kind: str
    schema: Schema


def make_cases(number: int, seed: int = 0) -> list[SchemaCase]:
    """`number` cases, the kinds in turn; the first `k` are the same for any number from `k`."""
    kinds = list(KINDS)
    cases = []
    for index in range(number):
        kind, turn = kinds[index % len(kinds)], index // len(kinds)
        chance = random.Random(f"{seed}:{kind}:{turn}")
        cases.append(SchemaCase(f"{kind}-{turn}", kind, KINDS[kind](chance)))
    return cases


def _scalar(chance: random.Random) -> Schema:
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


def _names(chance: random.Random, most: int = 5) -> list[str]:
    return chance.sample(WORDS, chance.randint(1, most))


def _object_of(properties: Schema, chance: random.Random, **more: Any) -> Schema:
    required = [name for name in properties if chance.random() < 0.7]
    return {"type": "object", "properties": properties, "required": required, **more}


def _flat_object(chance: random.Random) -> Schema:
    closed = {"additionalProperties": False} if chance.random() < 0.8 else {}
    return _object_of({name: _scalar(chance) for name in _names(chance)}, chance, **closed)


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


def _nested_object(chance: random.Random, depth: int = 3) -> Schema:
    if depth == 0:
        return _scalar(chance)
    properties = {
        name: _nested_object(chance, depth - 1) if chance.random() < 0.5 else _scalar(chance)
        for name in _names(chance, 3)
    }
    return _object_of(properties, chance, additionalProperties=False)


def _deep_nesting(chance: random.Random) -> Schema:
    schema = _scalar(chance)
    for level in range(chance.choice((5, 10, 20, 30))):
        if level % 3 == 2:
            schema = {"type": "array", "items": schema, "minItems": 1, "maxItems": 1}
        else:
            name = WORDS[level % len(WORDS)]
            schema = {
                "type": "object",
                "properties": {name: schema},
                "required": [name],
                "additionalProperties": False,
            }
    return schema


def _array(chance: random.Random) -> Schema:
    least = chance.randint(0, 3)
    return {
        "type": "array",
        "items": _scalar(chance),
        "minItems": least,
        "maxItems": least + chance.randint(0, 3),
    }


def _array_of_objects(chance: random.Random) -> Schema:
    items = _object_of(
        {name: _scalar(chance) for name in _names(chance, 3)}, chance, additionalProperties=False
    )
    return {"type": "array", "items": items, "minItems": 1, "maxItems": 2}


def _tuple(chance: random.Random) -> Schema:
    members = [_scalar(chance) for _ in range(chance.randint(1, 4))]
    rest = chance.choice((False, {"type": "integer", "maximum": 9, "minimum": 0}))
    return {"type": "array", "prefixItems": members, "items": rest, "minItems": len(members), "maxItems": 6}


def _unique_items(chance: random.Random) -> Schema:
    return {
        "type": "array",
        "items": {"enum": chance.sample(WORDS, 4)},
        "maxItems": 3,
        "uniqueItems": chance.random() < 0.6,
    }


def _contains(chance: random.Random) -> Schema:
    return {
        "type": "array",
        "items": {"type": "integer"},
        "contains": {"const": chance.randint(0, 9)},
        "maxItems": 3,
    }


def _optional_properties(chance: random.Random) -> Schema:
    properties = {name: _scalar(chance) for name in chance.sample(WORDS, chance.randint(2, 9))}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _open_object(chance: random.Random) -> Schema:
    schema: Schema = {
        "type": "object",
        "properties": {name: {"type": "integer", "minimum": 0, "maximum": 99} for name in _names(chance, 3)},
        "additionalProperties": _scalar(chance),
    }
    if chance.random() < 0.5:
        schema["required"] = list(schema["properties"])
        schema["maxProperties"] = len(schema["properties"]) + chance.randint(0, 2)
    return schema


def _property_counts(chance: random.Random) -> Schema:
    least = chance.randint(0, 3)
    schema: Schema = {"type": "object", "minProperties": least, "maxProperties": least + chance.randint(0, 2)}
    schema["additionalProperties"] = {"type": "boolean"}
    if chance.random() < 0.3:
        names = _names(chance, 4)
        schema = {
            "type": "object",
            "properties": {name: {"type": "boolean"} for name in names},
            "minProperties": 1,
            "additionalProperties": False,
        }
    return schema


def _pattern_properties(chance: random.Random) -> Schema:
    patterns = {
        "^s_[a-z]{1,4}$": {"type": "string", "maxLength": 8},
        "^n[0-9]{1,2}$": {"type": "integer", "maximum": 9},
    }
    if chance.random() < 0.2:
        patterns["^[sn]"] = {"type": "boolean"}
    schema: Schema = {"type": "object", "patternProperties": patterns, "maxProperties": 3}
    schema["additionalProperties"] = chance.choice((False, {"type": "null"}))
    if chance.random() < 0.5:
        schema["properties"] = {"n1": {"type": "integer", "minimum": 5}}
        schema["required"] = ["n1"]
    return schema


def _property_names(chance: random.Random) -> Schema:
    return {"type": "object", "propertyNames": {"pattern": f"^{chance.choice('abc')}"}, "maxProperties": 2}


def _any_of(chance: random.Random) -> Schema:
    return {
        "anyOf": [chance.choice((_scalar, _flat_object, _array))(chance) for _ in range(chance.randint(2, 4))]
    }


def _one_of(chance: random.Random) -> Schema:
    names = chance.sample(WORDS, chance.randint(2, 4))
    tagged = [
        {
            "type": "object",
            "properties": {"type": {"const": name}, "value": _scalar(chance)},
            "required": ["type", "value"],
            "additionalProperties": False,
        }
        for name in names
    ]
    overlapping = [{"type": "integer", "minimum": 0}, {"type": "integer", "maximum": 10}]
    by_type = [
        {"type": "string", "maxLength": 9},
        {"type": "integer", "maximum": 9, "minimum": 0},
        {"type": "null"},
    ]
    return {"oneOf": chance.choice((tagged, tagged, overlapping, by_type))}


def _all_of(chance: random.Random) -> Schema:
    choices: tuple[list[Schema], ...] = (
        [{"type": "integer", "minimum": 3}, {"maximum": 30}, {"multipleOf": 3}],
        [{"type": "string", "minLength": 2}, {"maxLength": 6}, {"pattern": "^[a-f]+$"}],
        [
            {"type": "object", "properties": {"a": {"type": "integer", "minimum": 0}}, "required": ["a"]},
            {
                "properties": {"a": {"maximum": 9}, "b": {"type": "boolean"}},
                "required": ["b"],
                "maxProperties": 2,
            },
        ],
        [
            {"anyOf": [{"type": "string"}, {"type": "integer"}]},
            {"maxLength": 5},
            {"minimum": 0, "maximum": 50},
        ],
        [{"type": "string"}, {"type": "integer"}],
    )
    return {"allOf": chance.choice(choices)}


def _references(chance: random.Random) -> Schema:
    definitions = {
        "item": _scalar(chance),
        "pair": {"$ref": "#/$defs/pair_of"},
        "pair_of": _flat_object(chance),
    }
    properties = {"first": {"$ref": "#/$defs/item"}, "second": {"$ref": "#/$defs/pair"}}
    if chance.random() < 0.4:
        properties["second"]["description"] = "a sibling that says nothing"
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$defs": definitions,
        "type": "object",
        "properties": properties,
        "required": ["first", "second"],
        "additionalProperties": False,
    }


def _recursion(chance: random.Random) -> Schema:
    node: Schema = {
        "type": "object",
        "properties": {
            "value": {"type": "integer", "minimum": 0, "maximum": 9},
            "children": {
                "type": "array",
                "items": {"$ref": "#/$defs/node"},
                "maxItems": chance.randint(1, 2),
            },
        },
        "required": ["value"],
        "additionalProperties": False,
    }
    if chance.random() < 0.3:
        node["properties"]["next"] = {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}
    return {"$ref": "#/$defs/node", "$defs": {"node": node}}


def _remote_reference(chance: random.Random) -> Schema:
    return {
        "type": "object",
        "properties": {"x": {"$ref": f"https://example.com/{chance.choice(WORDS)}.json"}},
    }


def _negation(chance: random.Random) -> Schema:
    return {"type": "string", "maxLength": 8, "not": {"const": chance.choice(WORDS)}}


def _conditional(chance: random.Random) -> Schema:
    name = chance.choice(WORDS)
    return {
        "type": "object",
        "properties": {name: {"type": "boolean"}, "extra": {"type": "string", "maxLength": 5}},
        "if": {"properties": {name: {"const": True}}},
        "then": {"required": ["extra"]},
    }


def _dependencies(chance: random.Random) -> Schema:
    key = chance.choice(("dependentRequired", "dependentSchemas"))
    dependent: Any = ["b"] if key == "dependentRequired" else {"required": ["b"]}
    return {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        key: {"a": dependent},
        "additionalProperties": False,
    }


def _unevaluated(chance: random.Random) -> Schema:
    return {**_flat_object(chance), "unevaluatedProperties": False}


def _unicode(chance: random.Random) -> Schema:
    names = chance.sample(UNICODE_WORDS, chance.randint(1, 4))
    properties: Schema = {name: {"enum": chance.sample(UNICODE_WORDS, 2)} for name in names}
    properties[names[0]] = {"type": "string", "pattern": "^[\u0430-\u044f]{1,6}$"}
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


def _old_draft(chance: random.Random) -> Schema:
    if chance.random() < 0.5:
        return {
            "$schema": "http://json-schema.org/draft-04/schema#",
            "type": "object",
            "properties": {"n": {"type": "integer", "minimum": 0, "exclusiveMinimum": True, "maximum": 20}},
            "required": ["n"],
            "additionalProperties": False,
        }
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "definitions": {"word": {"type": "string", "maxLength": 6}},
        "type": "array",
        "items": [{"$ref": "#/definitions/word"}, {"type": "boolean"}],
        "additionalItems": False,
        "minItems": 1,
    }


def _tool_call(chance: random.Random) -> Schema:
    return {
        "title": "call",
        "description": "A call of a function, as agents make them.",
        "type": "object",
        "properties": {
            "function": {"type": "string", "enum": [f"get_{word}" for word in _names(chance)]},
            "arguments": _flat_object(chance),
            "confidence": {"type": "number", "minimum": 0, "maximum": 1},
        },
        "required": ["function", "arguments"],
        "additionalProperties": False,
    }


def _record(chance: random.Random) -> Schema:
    text: Schema = {"type": "string", "minLength": 1, "maxLength": 16}
    address = {
        "street": text,
        "zip": {"type": "string", "pattern": "^[0-9]{5}$"},
        "country": {"enum": ["DE", "FR", "IT"]},
    }
    properties: Schema = {
        "id": {"type": "string", "format": "uuid"},
        "name": text,
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "born": {"type": "string", "format": "date"},
        "address": {
            "type": "object",
            "properties": address,
            "required": ["zip"],
            "additionalProperties": False,
        },
        "tags": {"type": "array", "items": {"enum": list(WORDS[:4])}, "maxItems": 2},
        "nickname": {"type": ["string", "null"], "maxLength": 8},
    }
    kept = {name: schema for name, schema in properties.items() if chance.random() < 0.6 or name == "name"}
    return {"type": "object", "properties": kept, "required": list(kept), "additionalProperties": False}


def _any_value(chance: random.Random) -> Schema:
    return chance.choice(
        ({}, {"type": "object"}, {"title": "anything", "default": 3}, {"type": "array", "maxItems": 2})
    )


def _beyond_numbers(chance: random.Random) -> Schema:
    return chance.choice(
        (
            {"const": 2**60 + 1},
            {"type": "integer", "minimum": 2**53 + 1},
            {"allOf": [{"multipleOf": 65537}, {"multipleOf": 65539}], "type": "integer"},
            {"type": "integer", "minimum": 10, "maximum": 5},
        )
    )


KINDS: dict[str, Make] = {
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
    "flat object": _flat_object,
    "nested object": _nested_object,
    "deep nesting": _deep_nesting,
    "optional properties": _optional_properties,
    "additionalProperties": _open_object,
    "min/maxProperties": _property_counts,
    "patternProperties": _pattern_properties,
    "propertyNames": _property_names,
    "array": _array,
    "array of objects": _array_of_objects,
    "prefixItems": _tuple,
    "uniqueItems": _unique_items,
    "contains": _contains,
    "anyOf": _any_of,
    "oneOf": _one_of,
    "allOf": _all_of,
    "$ref": _references,
    "recursion": _recursion,
    "remote $ref": _remote_reference,
    "not": _negation,
    "if/then": _conditional,
    "dependent...": _dependencies,
    "unevaluatedProperties": _unevaluated,
    "unicode": _unicode,
    "older drafts": _old_draft,
    "tool call": _tool_call,
    "record": _record,
    "anything": _any_value,
}
