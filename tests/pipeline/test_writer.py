"""One attempt at a chunk: every row once, in order, typed, whole or not at all."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import RequestError, RetryLater
from engine.sampling_params import SamplingParams
from pipeline.commits import sha256_file
from pipeline.rows import Prompt, Reject
from pipeline.schema import (
    CarriedColumn,
    agree,
    carried_from_arrow,
    carried_from_values,
    carried_value,
    data_schema,
    json_text_column,
)
from pipeline.writer import BalanceError, ChunkWriter
from tests.pipeline.fake_engine import FakeEngine
from tests.pipeline.small_run import make_row


def writer_of(spool: Path, stop: int = 5, **options: Any) -> ChunkWriter:
    return ChunkWriter(
        spool,
        shard=0,
        source="in-0",
        chunk=0,
        start=0,
        positions=range(stop),
        order="o",
        attempt="a1",
        clock=lambda: 0.0,
        **options,
    )


def run(prompt: Prompt) -> Any:
    engine = FakeEngine()
    engine.add_request(prompt.row_id, prompt.token_ids, sampling=prompt.sampling)
    while engine.has_unfinished:
        for output in engine.step():
            return output
    raise AssertionError("it did not finish")


def prompt_at(position: int, **changes: Any) -> Prompt:
    row = make_row(0, position if position % 5 != 4 else 0)
    assert isinstance(row, Prompt)
    return dataclasses.replace(row, row_id=f"0-{position}", position=position, **changes)


def reject_at(position: int) -> Reject:
    return Reject(0, position, None, "not_json", "bad", "in-0", "{")


def test_rows_come_out_in_order_whatever_order_they_finish_in(tmp_path: Path):
    writer = writer_of(tmp_path / "spool", with_token_ids=True)
    writer.add_reject(reject_at(4))
    for position in (3, 0, 2, 1):
        prompt = prompt_at(position)
        output = run(prompt)
        shuffled = dataclasses.replace(output, outputs=tuple(reversed(output.outputs)))
        assert writer.add_completion(prompt, shuffled) is None
    files = writer.close({"steps": 3})
    table = pq.read_table(files.data.path)
    assert table.schema.equals(data_schema(), check_metadata=True)
    assert list(zip(table["row_id"].to_pylist(), table["sample_index"].to_pylist(), strict=True)) == [
        ("0-0", 0), ("0-1", 0), ("0-1", 1), ("0-2", 0), ("0-3", 0), ("0-3", 1),
    ]  # fmt: skip
    assert table["num_generated_tokens"].to_pylist() == [len(ids) for ids in table["token_ids"].to_pylist()]
    assert set(table["status"].to_pylist()) == {"ok"}
    assert table["seed"].to_pylist() == [None, 1, 1, 2, None, None]
    assert files.counts == {
        "rows": 5,
        "ok": 4,
        "rejected": 1,
        "duplicates": 0,
        "samples": 6,
        "prompt_tokens": 10 + 11 + 12 + 13,
        "generated_tokens": sum(table["num_generated_tokens"].to_pylist()),
    }
    assert files.metrics == {"steps": 3}
    for file in files.by_kind.values():
        assert (sha256_file(file.path), file.path.stat().st_size) == (file.sha256, file.num_bytes)
    trace = pq.read_table(files.trace.path)
    assert trace["row_id"].to_pylist() == table["row_id"].to_pylist()
    assert set(trace["attempt"].to_pylist()) == {"a1"}
    first = trace.to_pylist()[0]
    assert first["arrival_s"] <= first["first_scheduled_s"] <= first["first_token_s"] <= first["finished_s"]
    files.remove()
    files.remove()
    assert not list((tmp_path / "spool").iterdir())


def test_token_ids_and_logprobs_are_null_unless_asked_for(tmp_path: Path):
    plain, asked = writer_of(tmp_path, 1), writer_of(tmp_path / "asked", 1, with_token_ids=True)
    prompt = prompt_at(0)
    plain.add_completion(prompt, run(prompt))
    row = pq.read_table(plain.close({}).data.path).to_pylist()[0]
    names = (
        "token_ids",
        "logprobs",
        "top_logprobs",
        "prompt_logprobs",
        "prompt_top_logprobs",
        "cumulative_logprob",
    )
    assert {name: row[name] for name in names} == dict.fromkeys(names)

    prompt = prompt_at(
        0, sampling=SamplingParams(max_tokens=4, logprobs=1, prompt_logprobs=1, ignore_eos=True)
    )
    output = run(prompt)
    asked.add_completion(prompt, output)
    row = pq.read_table(asked.close({}).data.path).to_pylist()[0]
    tokens = output.outputs[0].token_ids
    assert row["token_ids"] == list(tokens)
    assert row["logprobs"] == pytest.approx([-token / 256 for token in tokens])
    assert [[top["token_id"] for top in entry] for entry in row["top_logprobs"]] == [[t] for t in tokens]
    assert row["prompt_logprobs"][0] is None, "nothing comes before the first token"
    assert len(row["prompt_logprobs"]) == len(row["prompt_top_logprobs"]) == row["num_prompt_tokens"]
    assert row["cumulative_logprob"] == pytest.approx(sum(row["logprobs"]))


def test_an_error_of_the_engine_becomes_a_reject_with_its_reason(tmp_path: Path):
    writer = writer_of(tmp_path, 1)
    reject = writer.add_completion(prompt_at(0), None, RequestError("prompt_too_long", "needs 9 of 8 tokens"))
    assert reject is not None
    assert (reject.reason, reject.message) == ("prompt_too_long", "in-0 row 0: needs 9 of 8 tokens")
    files = writer.close({})
    assert files.rejects is not None
    assert json.loads(files.rejects.path.read_text())["row_id"] == "0-0"
    assert pq.read_table(files.data.path).num_rows == 0
    assert files.counts["ok"] == 0


def test_a_reject_line_is_one_line_of_utf_8_whatever_it_says(tmp_path: Path):
    writer = writer_of(tmp_path, 1)
    writer.add_reject(dataclasses.replace(reject_at(0), excerpt="a\n\u2028\ud800é", line=7))
    files = writer.close({})
    assert files.rejects is not None
    (line,) = files.rejects.path.read_bytes().split(b"\n")[:-1]
    content = json.loads(line)
    assert content["excerpt"] == "a\n\u2028\\ud800é"
    assert (content["shard"], content["position"], content["line"]) == (0, 0, 7)


def test_every_row_must_come_out_once(tmp_path: Path):
    writer = writer_of(tmp_path, 2)
    writer.add_reject(reject_at(0))
    with pytest.raises(BalanceError, match="twice"):
        writer.add_reject(reject_at(0))
    with pytest.raises(BalanceError, match="twice"):
        writer.add_completion(prompt_at(0), run(prompt_at(0)))
    with pytest.raises(BalanceError, match="is not of chunk 0"):
        writer.add_reject(reject_at(2))
    with pytest.raises(BalanceError, match=r"\[1\] of shard 0 came out neither"):
        writer.close({})
    assert writer.missing == [1]
    assert not list(tmp_path.iterdir())


def test_a_row_that_asks_for_what_another_does_is_counted_apart(tmp_path: Path):
    writer = writer_of(tmp_path, 4)
    greedy = SamplingParams(temperature=0, max_tokens=6)
    alike = {"token_ids": (1, 2), "sampling": greedy}
    for prompt in (
        prompt_at(2, **alike),
        prompt_at(1, token_ids=(1, 3), sampling=greedy),
        prompt_at(0, **alike),
    ):
        writer.add_completion(prompt, run(prompt))
    writer.add_reject(reject_at(3))
    files = writer.close({})
    assert [files.counts[name] for name in ("rows", "ok", "duplicates", "rejected")] == [4, 2, 1, 1]
    keys = files.duplicate_keys
    assert keys[:8] == keys[16:] != keys[8:16], "in input order"


def test_a_full_spool_is_for_later_and_leaves_nothing(tmp_path: Path):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    for kind in ("data", "trace"):
        spool = tmp_path / kind
        spool.mkdir()
        (spool / f"00000-00000-a1.{kind}.parquet").symlink_to("/dev/full")
        writer = writer_of(spool, 1)
        writer.add_completion(prompt_at(0), run(prompt_at(0)))
        with pytest.raises(RetryLater, match=rf"the disk of {spool} is full: .* needs \d+ bytes"):
            writer.close({})
        assert not list(spool.iterdir())


TYPED = [
    ("text", pa.string(), "é", 5),
    ("count", pa.int64(), 2**40, "5"),
    ("flag", pa.bool_(), True, 1),
    ("tags", pa.list_(pa.string()), ["a", "b"], [1]),
    ("point", pa.struct([("x", pa.float64())]), {"x": 1.5}, 3),
]


@pytest.mark.parametrize(("name", "kind", "good", "bad"), TYPED)
def test_carried_columns_keep_their_type_and_a_misfit_is_a_reject(
    tmp_path: Path, name: str, kind: pa.DataType, good: Any, bad: Any
):
    (column,) = carried_from_arrow([name], [pa.schema([(name, kind)])])
    assert CarriedColumn.from_json(json.loads(json.dumps(column.to_json()))) == column
    writer = writer_of(tmp_path, 3, carried=[column])
    values = [good, None, bad]
    rejects = [
        writer.add_completion(prompt, run(prompt))
        for prompt in (prompt_at(i, carried={name: value}) for i, value in enumerate(values))
    ]
    assert [reject and reject.reason for reject in rejects] == [None, None, "wrong_type"]
    assert rejects[2] is not None
    assert f"column {name!r} holds {type(bad).__name__}" in rejects[2].message
    table = pq.read_table(writer.close({}).data.path)
    assert table.schema.field(f"input_{name}").type == kind
    assert table[f"input_{name}"].to_pylist() == [good, None, None]  # row 1 has two samples


def test_mixed_values_are_carried_as_json_text(tmp_path: Path):
    rows = [{"a": 1, "b": "x", "c": 1, "e": [1]}, {"a": "1", "b": None, "c": 2.5, "e": "x"}]
    columns = carried_from_values(["a", "b", "c", "d", "e"], rows)
    assert [(column.name, str(column.type), column.kind) for column in columns] == [
        ("a", "string", "json"),
        ("b", "string", "arrow"),
        ("c", "double", "arrow"),
        ("d", "string", "json"),
        ("e", "string", "json"),
    ]
    assert carried_value(columns[0], {"k": ["é", "\ud800"]}) == '{"k": ["\\u00e9", "\\ud800"]}'
    with pytest.raises(ValueError, match="surrogate"):
        carried_value(columns[1], "\ud800")


def test_files_that_disagree_on_a_type_give_json_text():
    ints, texts = pa.schema([("a", pa.int64())]), pa.schema([("a", pa.string())])
    assert carried_from_arrow(["a"], [ints, ints])[0].type == pa.int64()
    assert carried_from_arrow(["a"], [ints, texts]) == (json_text_column("a"),)
    assert agree([carried_from_arrow(["a"], [ints]), carried_from_arrow(["a"], [texts])]) == (
        json_text_column("a"),
    )
    encoded = pa.schema([("a", pa.dictionary(pa.int32(), pa.large_string()))])
    assert (
        agree([carried_from_arrow(["a"], [encoded]), carried_from_arrow(["a"], [texts])])[0].type
        == pa.string()
    )


@given(st.lists(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
), max_size=8))  # fmt: skip
def test_what_was_seen_when_deciding_always_fits(values: list[Any]):
    (column,) = carried_from_values(["v"], [{"v": value} for value in values])
    for value in values:
        stored = carried_value(column, value) if _is_storable(value) else None
        pa.array([stored], type=column.type)
        if column.kind == "json" and stored is not None:
            assert json.loads(stored) == value


def _is_storable(value: Any) -> bool:
    """Integers past 64 bits have no Arrow type: their row is rejected."""
    return not isinstance(value, int) or isinstance(value, bool) or -(2**63) <= value < 2**63
