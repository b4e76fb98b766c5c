"""Structured output's coverage: its cases are schemas, its judge finds faults, nothing invalid comes out."""

from __future__ import annotations

import json

import pytest
from jsonschema import Draft202012Validator
from jsonschema.validators import validator_for

from jobs.bench.schema_cases import KINDS, make_cases
from jobs.bench.schema_checks import violation
from jobs.bench.schemas import RESULTS, counts, host_seconds, run_cases, table
from tests.engine.engines import tiny_engine

SAMPLE = 30


def test_cases_are_schemas_and_always_the_same() -> None:
    cases = make_cases(500)
    assert len({case.name for case in cases}) == 500
    assert {case.kind for case in cases} == set(KINDS)
    assert make_cases(40) == cases[:40]
    assert make_cases(40, seed=1) != cases[:40]
    assert len({json.dumps(case.schema) for case in cases}) > 350
    for case in cases:
        validator_for(case.schema, Draft202012Validator).check_schema(case.schema)


@pytest.mark.parametrize(
    ("text", "schema"),
    [
        ("{", {}),
        ("NaN", {}),
        ('{"a": 1}', {"properties": {"a": {"type": "string"}}}),
        ("0.35", {"multipleOf": 0.1}),
        *(
            (f'"{text}"', {"format": name})
            for name, text in {
                "date": "2023-02-29",
                "time": "25:00:00Z",
                "date-time": "2023-02-28 10:00:00Z",
                "duration": "P",
                "email": "a@",
                "hostname": "-a",
                "ipv4": "1.2.3.256",
                "ipv6": ":::",
                "uuid": "1234",
                "uri": "a b",
            }.items()
        ),
    ],
)
def test_the_judge_finds_what_is_wrong(text: str, schema: dict) -> None:
    assert violation(text, schema)


def test_the_judge_lets_pass_what_is_right() -> None:
    assert violation("0.3", {"multipleOf": 0.1}) is None
    for name, text in {
        "date": "2024-02-29",
        "time": "23:00:00.25+01:00",
        "date-time": "2023-02-28T10:00:00Z",
        "duration": "P1Y2M3DT4H",
        "email": "a.b@c",
        "hostname": "a-b.c",
        "ipv4": "1.2.3.255",
        "ipv6": "::1",
        "uuid": "12345678-1234-1234-1234-1234567890ab",
        "uri": "https://example.com/a?b#c",
    }.items():
        assert violation(f'"{text}"', {"format": name}) is None, name


def test_no_output_of_random_weights_is_invalid() -> None:
    engine = tiny_engine(max_model_len=192)
    cases = make_cases(SAMPLE)
    outcomes = run_cases(engine, cases, max_tokens=100)
    assert [outcome.name for outcome in outcomes] == [case.name for case in cases]
    found = counts(outcomes)
    assert found["all"]["INVALID"] == 0, [each for each in outcomes if each.result == "INVALID"]
    assert found["all"]["error"] == 0
    assert found["all"]["valid"] >= SAMPLE // 3, found["all"]
    refused = {outcome.kind for outcome in outcomes if outcome.result == "refused"}
    assert "pattern with look-around" in refused
    assert "flat object" not in refused
    assert table(found).count("\n") == 1 + len(found)
    assert set(found["all"]) == set(RESULTS)
    seconds = host_seconds(engine, cases[:3], outcomes[:3])
    assert 0 < seconds["mask"]["p50"] < 0.1
    assert 0 < seconds["compile"]["p50"] < 1
