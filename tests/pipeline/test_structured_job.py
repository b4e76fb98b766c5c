"""A job whose outputs must follow something, by its settings or a column: the same bytes after a stop."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ConfigError, MissingExtraError
from engine.structured import grammars
from jobs.bench.schema_checks import violation
from pipeline.exit_codes import ExitCode
from pipeline.fingerprint import Fingerprint
from pipeline.results import open_run
from pipeline.rows import Prompt
from tests.pipeline.input_helpers import lines, write_jsonl
from tests.pipeline.job_helpers import final_bytes, job_settings
from tests.pipeline.prompt_helpers import build, make_builder, ok, refused
from tests.pipeline.test_partials import run_model

POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 99}, "y": {"enum": ["a", "bc", None]}},
    "required": ["x", "y"],
    "additionalProperties": False,
}
WORD = {"type": "string", "pattern": "^[a-f]{2,5}$"}
UNHELD: dict[str, Any] = {"type": "array", "uniqueItems": True}
OPTIONS: dict[str, Any] = {
    "sampling__max_tokens": 40,
    "sampling__temperature": 1.0,
    "output__chunk_rows": 6,
    "output__include_token_ids": True,
    "engine__max_num_seqs": 8,
    "engine__max_model_len": 128,
}


def rows_of(output: Path) -> list[dict[str, Any]]:
    return list(open_run(str(output)).rows())


def rejects_of(output: Path) -> list[dict[str, Any]]:
    return list(open_run(str(output)).rejects())


def test_rows_with_schemas_of_their_own_resume_to_the_same_bytes(tmp_path: Path) -> None:
    schemas = [POINT, json.dumps(WORD), None, UNHELD, "{"]
    rows = [
        {"id": str(i), "prompt": f"in the beginning {i} was", "schema": schemas[i % len(schemas)]}
        for i in range(20)
    ]
    write_jsonl(tmp_path / "in" / "a.jsonl", lines(rows))
    options = OPTIONS | {
        "prompt__schema_column": "schema",
        "sampling__structured": {"choice": ["yes", "no"]},
        "sampling__n": 2,
        "max_reject_fraction": 0.5,
    }
    alone = job_settings(tmp_path / "in", tmp_path / "alone", **options)
    assert run_model(alone)[0] is ExitCode.DONE
    data = rows_of(tmp_path / "alone")
    assert len(data) == 2 * 12
    for row in data:
        schema = schemas[int(row["row_id"]) % len(schemas)]
        if row["finish_reason"] == "length":
            continue
        if schema is None:
            assert row["text"] in ("yes", "no")
        else:
            assert violation(row["text"], json.loads(schema) if isinstance(schema, str) else schema) is None
    assert sum(row["finish_reason"] == "stop" for row in data) > 12, "nothing was tested"
    rejects = rejects_of(tmp_path / "alone")
    assert {row["reason"] for row in rejects} == {"bad_schema"}
    assert sorted(int(row["row_id"]) % 5 for row in rejects) == [3] * 4 + [4] * 4
    assert all("uniqueItems" in row["message"] for row in rejects if int(row["row_id"]) % 5 == 3)

    settings = job_settings(tmp_path / "in", tmp_path / "out", **options)
    codes, num_given = [], 0
    for at_step in (4, 11, 6, 1_000_000):
        code, given_now = run_model(settings, at_step)
        codes.append(code)
        num_given += given_now
        if code is ExitCode.DONE:
            break
    assert codes[-1] is ExitCode.DONE
    assert codes.count(ExitCode.DRAINED) >= 2
    assert num_given > 10, "rows went on from what they had drawn"
    assert final_bytes(tmp_path / "out") == final_bytes(tmp_path / "alone")


def test_a_row_that_costs_too_much_to_follow_is_a_reject(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(grammars.LIMITS, "step_max_items", 10)
    schema = {"type": "array", "title": "of no other test, whose compiled grammar would be taken"}
    rows = [{"id": str(i), "prompt": "in", "schema": schema if i == 1 else None} for i in range(4)]
    write_jsonl(tmp_path / "in" / "a.jsonl", lines(rows))
    options = OPTIONS | {"prompt__schema_column": "schema", "max_reject_fraction": 0.5}
    assert run_model(job_settings(tmp_path / "in", tmp_path / "out", **options))[0] is ExitCode.DONE
    [reject] = rejects_of(tmp_path / "out")
    assert (reject["row_id"], reject["reason"]) == ("1", "generation_failed")
    assert "could not go on" in reject["message"]
    assert [row["row_id"] for row in rows_of(tmp_path / "out")] == ["0", "2", "3"]


def test_what_outputs_follow_is_part_of_what_the_run_is(tmp_path: Path) -> None:
    def parts(structured: Any, **options: Any) -> Any:
        settings = job_settings(tmp_path, tmp_path / "out", sampling__structured=structured, **options)
        return Fingerprint.of({"sampling": asdict(settings.sampling)})

    schema = {"type": "object", "properties": {"a": {}, "b": {}}}
    turned = {"type": "object", "properties": {"b": {}, "a": {}}}
    ids = [parts(each).id for each in (None, {"json": schema}, {"json": turned}, {"regex": "a"})]
    assert len(set(ids)) == 4
    assert parts({"json": json.dumps(schema)}).id == ids[1], "as text and as a mapping"
    assert "structured" in parts({"regex": "b"}).difference(parts({"regex": "a"}).to_json())


def test_a_column_of_schemas_is_read_as_text_and_as_mappings() -> None:
    settings = {"schema_column": "shape"}
    prompts: list[Prompt] = [
        ok(build({"prompt": "a", "shape": shape}, settings)) for shape in (POINT, json.dumps(POINT, indent=1))
    ]
    assert prompts[0].sampling == prompts[1].sampling
    structured = prompts[0].sampling.structured
    assert structured is not None
    assert json.loads(structured.json or "") == POINT
    assert ok(build({"prompt": "a", "shape": None}, settings)).sampling.structured is None
    builder = make_builder(settings)
    assert builder.columns_needed is not None
    assert "shape" in builder.columns_needed


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ("not json", "not JSON"),
        (7, "must be a JSON schema"),
        ([POINT], "must be a JSON schema"),
        ({"type": "strnig"}, "Invalid type"),
        ({"not": {}}, "Unimplemented keys"),
        ({"$ref": "https://example.com/x.json"}, "not fetch"),
        ({"pattern": "(?=a)"}, "look"),
        ({"allOf": [{"type": "string"}, {"type": "null"}]}, "nsatisfiable"),
        ({"minProperties": 5}, "different keys"),
        ('{"items":' * 300 + "{}" + "}" * 300, "nested deeper"),
    ],
)
def test_a_bad_schema_is_the_reject_of_its_row(schema: Any, says: str) -> None:
    reject = refused(build({"prompt": "a", "shape": schema}, {"schema_column": "shape"}), "bad_schema", says)
    assert "column 'shape'" in reject.message


def test_a_column_that_is_not_there_is_told() -> None:
    refused(build({"prompt": "a"}, {"schema_column": "shape"}), "missing_column", "prompt.schema_column")


def test_the_column_of_sampling_may_say_it_too() -> None:
    settings = {"sampling_column": "own"}
    for own in ({"structured": {"json": POINT}}, json.dumps({"guided_decoding": {"json": POINT}})):
        structured = ok(build({"prompt": "a", "own": own}, settings)).sampling.structured
        assert structured is not None
        assert structured.json is not None
    refused(
        build({"prompt": "a", "own": {"structured": {"regex": "("}}}, settings), "bad_sampling", "compiled"
    )


@pytest.mark.parametrize(
    "structured", [{"regex": "(a"}, {"json": {"uniqueItems": True}}, {"choices": ["a"]}, "a"]
)
def test_what_no_row_could_follow_is_refused_before_anything_runs(structured: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in" / "a.jsonl", lines([{"id": "1", "prompt": "in"}]))
    with pytest.raises(ConfigError, match=r"sampling\.structured"):
        run_model(job_settings(tmp_path / "in", tmp_path / "out", sampling__structured=structured))
    assert not (tmp_path / "out" / "data").exists()


def test_a_missing_package_is_told_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingExtraError, match=r"prompt\.schema_column.*tidemill\[structured\]"):
        make_builder({"schema_column": "shape"})
