"""What structured output may be asked for, and what a schema becomes before it is compiled."""

from __future__ import annotations

import json
import re
from datetime import date, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import RequestError
from engine.sampling_params import SamplingParams
from engine.structured.json_schemas import exact_schema
from engine.structured.spec import MAX_SCHEMA_DEPTH, StructuredOutput

OBJECT = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "null"}}}


def test_a_schema_is_the_same_as_text_and_as_mapping():
    as_text = StructuredOutput(json=json.dumps(OBJECT, indent=2))
    as_mapping = StructuredOutput.of({"json": OBJECT})
    assert as_text == as_mapping
    assert hash(as_text) == hash(as_mapping)
    assert as_text.json == '{"type":"object","properties":{"b":{"type":"integer"},"a":{"type":"null"}}}'
    assert StructuredOutput.of(as_text) is as_text


def test_the_order_of_properties_is_part_of_what_is_asked():
    other = {"type": "object", "properties": dict(reversed(OBJECT["properties"].items()))}
    assert StructuredOutput.of({"json": other}) != StructuredOutput.of({"json": OBJECT})


def test_sampling_takes_it_under_both_names():
    params = SamplingParams.from_dict({"structured": {"regex": "a+"}})
    assert params.structured == StructuredOutput(regex="a+")
    assert SamplingParams.from_dict({"guided_decoding": {"regex": "a+"}}) == params
    assert params.replace(n=2).structured == params.structured
    assert StructuredOutput.of({"choice": ["x", "y", "x"]}) == StructuredOutput(choice=("x", "y"))
    with pytest.raises(RequestError, match="twice"):
        SamplingParams.from_dict({"structured": {"regex": "a"}, "guided_decoding": {"regex": "a"}})


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({}, "has none of json"),
        ({"regex": "a", "json_object": True}, "regex and json_object"),
        ({"regexp": "a"}, "nearest name is 'regex'"),
        ("a+", "must be a mapping"),
        ({"regex": ""}, "1 to"),
        ({"regex": "a" * 20_000}, "20000 characters long"),
        ({"choice": []}, "a list of 1 to"),
        ({"choice": "ab"}, "a list of 1 to"),
        ({"choice": ["a", 3]}, "sampling.structured.choice is 3"),
        ({"choice": [str(i) * 12 for i in range(4000)]}, "characters together"),
        ({"grammar": "start: " + "(" * 5000 + '"a"' + ")" * 5000}, "brackets more than"),
        ({"json": "{"}, "not JSON at character 2"),
        ({"json": "[]"}, "must be a JSON schema, an object"),
        ({"json": '{"a": 1, "a": 2}'}, "twice"),
        ({"json": '{"const": NaN}'}, "does not fit a double"),
        ({"json": '{"const": 1e999}'}, "does not fit a double"),
        ({"json": '{"const": "\\ud800"}'}, "lone surrogate"),
        ({"json": '{"const": ' + "9" * 5000 + "}"}, "5000 digits"),
        ({"json": '{"items":' * 5000 + "{}" + "}" * 5000}, "nested deeper"),
        ({"json": {"const": {1: 2}}}, "keys are texts"),
        ({"json": {"const": object()}}, "give JSON values"),
        ({"json": {"description": "x" * 300_000}}, "characters: at most"),
        ({"json_object": "yes"}, "true or false"),
    ],
)
def test_what_it_cannot_be_is_refused_by_name(value, said):
    with pytest.raises(RequestError, match=re.escape(said)) as refused:
        SamplingParams.from_dict({"structured": value})
    assert refused.value.reason == "bad_sampling"


def test_brackets_in_a_text_of_a_schema_are_no_nesting():
    deep = {"const": "[" * 1000, "title": '"{' * 500}
    assert StructuredOutput.of({"json": json.dumps(deep)}) == StructuredOutput.of({"json": deep})
    nested: dict = {}
    for _ in range(MAX_SCHEMA_DEPTH - 1):
        nested = {"items": nested}
    assert StructuredOutput.of({"json": json.dumps(nested)}) == StructuredOutput.of({"json": nested})
    for one_more in ({"items": nested}, json.dumps({"items": nested})):
        with pytest.raises(RequestError, match="nested deeper"):
            StructuredOutput.of({"json": one_more})


def test_a_text_that_must_follow_something_cannot_ignore_its_end():
    with pytest.raises(RequestError, match="ignore_eos"):
        SamplingParams(structured=StructuredOutput(regex="a"), ignore_eos=True)


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"x-guidance": {"lenient": True}}, "x-guidance"),
        ({"properties": {"a": {"const": [1, {"b": 2**53 + 1}]}}}, "#/properties/a/const: 9007199254740993"),
        ({"anyOf": [{"maximum": 1e300}]}, "#/anyOf/0/maximum"),
        ({"exclusiveMinimum": True, "minimum": 1}, "draft 4"),
        ({"minProperties": 2}, "2 different keys"),
        ({"items": {"minProperties": 3, "required": ["a"]}}, "#/items/minProperties"),
        ({"anyOf": [{"enum": [1, 0.30000000000000004]}]}, "#/anyOf/0/enum: 0.30000000000000004"),
        ({"minimum": 1.5e-40}, "#/minimum"),
        ({"const": {"a": ["tab \t and \x01"]}}, "control character '\\x01'"),
        ({"allOf": [{"multipleOf": 65537}, {"multipleOf": 65539}]}, "common multiple"),
        ({"items": [{}], "additionalItems": False, "anyOf": [{}]}, "additionalItems"),
    ],
)
def test_what_would_be_read_too_widely_is_refused_at_its_place(schema, said):
    with pytest.raises(RequestError, match=re.escape(said)):
        exact_schema(json.dumps(schema))


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"x-guidance": {}, "minProperties": {"type": "integer"}, "$id": {"type": "string"}}},
        {"const": {"minProperties": 9, "$ref": "%", "format": "date", "uniqueItems": False}},
        {"minProperties": 1, "required": ["a"]},
        {"minProperties": 2, "required": ["a"]},
        {
            "$schema": "http://json-schema.org/draft-04/schema#",
            "items": {"minimum": 1, "exclusiveMinimum": True},
        },
        {"allOf": [{"multipleOf": 0.01}, {"multipleOf": 25}]},
        {"properties": {"a": {"multipleOf": 65537}, "b": {"multipleOf": 65539}}},
        {"enum": [2**53 - 1, -(10**15), 0.1, True, "\t\b\f\r\n/"], "minimum": 1e-20},
    ],
)
def test_what_is_no_keyword_or_can_be_held_is_left_as_it_is(schema):
    assert exact_schema(json.dumps(schema)) == schema


def test_formats_are_spelled_out_beside_what_is_there():
    plain = exact_schema('{"type":"string","format":"date"}')
    assert set(plain) == {"type", "pattern"}
    both = exact_schema('{"format":"time","pattern":"^1","allOf":[{"minLength":3}]}')
    assert both["pattern"] == "^1"
    assert len(both["allOf"]) == 2
    assert set(both["allOf"][1]) == {"pattern"}
    assert exact_schema('{"format":"hostname"}') == {"format": "hostname", "maxLength": 253}
    assert exact_schema('{"format":"hostname","maxLength":9}')["maxLength"] == 9
    assert exact_schema('{"format":"uuid","uniqueItems":false}') == {"format": "uuid"}


def pattern_of(name: str) -> re.Pattern[str]:
    return re.compile(exact_schema(json.dumps({"format": name}))["pattern"], re.ASCII)


def test_the_pattern_of_dates_has_every_day_there_is_and_no_other():
    pattern = pattern_of("date")
    for year in (1, 4, 96, 100, 399, 400, 999, 1000, 1900, 1999, 2000, 2023, 2024, 2100, 4000, 9999):
        for month in range(14):
            for day in range(33):
                text = f"{year:04d}-{month:02d}-{day:02d}"
                try:
                    is_day = bool(date.fromisoformat(text))
                except ValueError:
                    is_day = False
                assert bool(pattern.fullmatch(text)) == is_day, text
    for text in ("0000-01-01", "999-01-01", "2024-1-01", "2024-01-01 ", "12024-01-01"):
        assert not pattern.fullmatch(text), text


@given(st.datetimes(), st.integers(-23 * 60 - 59, 23 * 60 + 59))
def test_the_pattern_of_moments_has_every_moment(moment, offset):
    pattern = pattern_of("date-time")
    sign, minutes = "+" if offset >= 0 else "-", abs(offset)
    zone = f"{sign}{minutes // 60:02d}:{minutes % 60:02d}"
    for text in (f"{moment.isoformat()}Z", f"{moment.isoformat()}{zone}"):
        assert pattern.fullmatch(text), text
        assert datetime.fromisoformat(text).utcoffset() == timedelta(minutes=offset if text[-1] != "Z" else 0)
        assert pattern_of("time").fullmatch(text.partition("T")[2])
    assert not pattern.fullmatch(moment.isoformat())


@given(st.from_regex(pattern_of("date-time"), fullmatch=True))
def test_what_the_pattern_of_moments_matches_is_a_moment(text):
    assert datetime.fromisoformat(text).tzinfo is not None
