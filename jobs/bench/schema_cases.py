"""JSON schemas of many kinds, the same ones on every machine: what structured output's coverage is measured
on.

In the manner of JSONSchemaBench (Geng et al. 2025): what people write by hand, what tools generate, and one
keyword after another, alone and combined, those that cannot be followed included.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from jobs.bench.schema_containers import CONTAINER_KINDS, array_of, flat_object
from jobs.bench.schema_values import UNICODE_WORDS, VALUE_KINDS, WORDS, Make, Schema, scalar, some_names


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


def _any_of(chance: random.Random) -> Schema:
    return {
        "anyOf": [chance.choice((scalar, flat_object, array_of))(chance) for _ in range(chance.randint(2, 4))]
    }


def _one_of(chance: random.Random) -> Schema:
    names = chance.sample(WORDS, chance.randint(2, 4))
    tagged = [
        {
            "type": "object",
            "properties": {"type": {"const": name}, "value": scalar(chance)},
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
        "item": scalar(chance),
        "pair": {"$ref": "#/$defs/pair_of"},
        "pair_of": flat_object(chance),
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
    return {**flat_object(chance), "unevaluatedProperties": False}


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
            "function": {"type": "string", "enum": [f"get_{word}" for word in some_names(chance)]},
            "arguments": flat_object(chance),
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


_COMBINED_KINDS: dict[str, Make] = {
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

KINDS: dict[str, Make] = {**VALUE_KINDS, **CONTAINER_KINDS, **_COMBINED_KINDS}
