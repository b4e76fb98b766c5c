"""Schemas of objects and lists for `schema_cases`."""

from __future__ import annotations

import random
from typing import Any

from jobs.bench.schema_values import WORDS, Make, Schema, scalar, some_names


def object_of(properties: Schema, chance: random.Random, **more: Any) -> Schema:
    required = [name for name in properties if chance.random() < 0.7]
    return {"type": "object", "properties": properties, "required": required, **more}


def flat_object(chance: random.Random) -> Schema:
    closed = {"additionalProperties": False} if chance.random() < 0.8 else {}
    return object_of({name: scalar(chance) for name in some_names(chance)}, chance, **closed)


def _nested_object(chance: random.Random, depth: int = 3) -> Schema:
    if depth == 0:
        return scalar(chance)
    properties = {
        name: _nested_object(chance, depth - 1) if chance.random() < 0.5 else scalar(chance)
        for name in some_names(chance, 3)
    }
    return object_of(properties, chance, additionalProperties=False)


def _deep_nesting(chance: random.Random) -> Schema:
    schema = scalar(chance)
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


def _optional_properties(chance: random.Random) -> Schema:
    properties = {name: scalar(chance) for name in chance.sample(WORDS, chance.randint(2, 9))}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _open_object(chance: random.Random) -> Schema:
    schema: Schema = {
        "type": "object",
        "properties": {
            name: {"type": "integer", "minimum": 0, "maximum": 99} for name in some_names(chance, 3)
        },
        "additionalProperties": scalar(chance),
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
        names = some_names(chance, 4)
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


def array_of(chance: random.Random) -> Schema:
    least = chance.randint(0, 3)
    return {
        "type": "array",
        "items": scalar(chance),
        "minItems": least,
        "maxItems": least + chance.randint(0, 3),
    }


def _array_of_objects(chance: random.Random) -> Schema:
    items = object_of(
        {name: scalar(chance) for name in some_names(chance, 3)}, chance, additionalProperties=False
    )
    return {"type": "array", "items": items, "minItems": 1, "maxItems": 2}


def _tuple(chance: random.Random) -> Schema:
    members = [scalar(chance) for _ in range(chance.randint(1, 4))]
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


CONTAINER_KINDS: dict[str, Make] = {
    "flat object": flat_object,
    "nested object": _nested_object,
    "deep nesting": _deep_nesting,
    "optional properties": _optional_properties,
    "additionalProperties": _open_object,
    "min/maxProperties": _property_counts,
    "patternProperties": _pattern_properties,
    "propertyNames": _property_names,
    "array": array_of,
    "array of objects": _array_of_objects,
    "prefixItems": _tuple,
    "uniqueItems": _unique_items,
    "contains": _contains,
}
