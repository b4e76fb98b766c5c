"""Duplicates are counted by what rows ask for: chunks, orders, crashes and timing do not change how many."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.duplicates import duplicate_key as engine_key
from engine.errors import OutputError
from engine.packed_tokens import pack_tokens
from engine.sampling_params import SamplingParams
from pipeline.commits import CommitRecord, FileRef, pack_metrics
from pipeline.exact_duplicates import KEY_BYTES, duplicate_key, num_duplicates
from pipeline.exit_codes import ExitCode
from pipeline.results import open_run
from pipeline.rows import Prompt
from pipeline.settings import Settings
from tests.pipeline.fake_engine import FakeEngine
from tests.pipeline.input_helpers import lines, write_jsonl
from tests.pipeline.job_helpers import commits, job_settings, run_fake
from tests.pipeline.small_run import Crash


def prompt_of(token_ids: list[int], sampling: SamplingParams) -> Prompt:
    return Prompt("id", 0, 0, tuple(token_ids), None, sampling, {}, False)


samplings = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1.0]),
    seed=st.sampled_from([None, 1, 2]),
    top_k=st.sampled_from([0, 5]),
    max_tokens=st.sampled_from([4, 5]),
    stop=st.sampled_from([(), ("a",), ("a", "b"), ("ab",)]),
)
rows = st.lists(st.tuples(st.lists(st.integers(0, 300), min_size=1, max_size=2), samplings), max_size=8)


@given(rows)
def test_rows_are_duplicates_when_the_engine_would_run_them_once(
    asked: list[tuple[list[int], SamplingParams]],
):
    asked += [(tokens, dataclasses.replace(sampling, top_k=5)) for tokens, sampling in asked]
    keys = [duplicate_key(prompt_of(*each)) for each in asked]
    theirs = [engine_key(pack_tokens(tokens), None, sampling) for tokens, sampling in asked]
    for key, their_key in zip(keys, theirs, strict=True):
        assert len(key) == (0 if their_key is None else KEY_BYTES)
    counts = Counter(key for key in theirs if key is not None)
    assert num_duplicates(keys) == counts.total() - len(counts)
    assert num_duplicates([b"".join(keys[:3]), b"".join(keys[3:])]) == num_duplicates(keys)


def test_a_key_is_the_same_in_every_process_and_on_every_machine():
    key = duplicate_key(prompt_of([1, 70_000], SamplingParams(temperature=0)))
    # Of two attempts at a shard one may have been made elsewhere. When keys change, COMMIT_VERSION has to.
    assert key.hex() == "460ec39581ce89bb"


# What the rows of two shards ask for: of 24 rows each every fifth is bad, and the others ask for 3 things.
NUM_ROWS, NUM_KINDS = 24, 3
NUM_GOOD = NUM_ROWS - len(range(0, NUM_ROWS, 5))


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for shard in range(2):
        asked = [f"say {i % NUM_KINDS} aloud" if i % 5 else 7 for i in range(NUM_ROWS)]
        found = [{"id": f"{shard}-{i}", "prompt": prompt} for i, prompt in enumerate(asked)]
        write_jsonl(tmp_path / "in" / f"{shard}.jsonl", lines(found))
    return tmp_path / "in"


def settings_of(shards: Path, output: Path, **overrides: Any) -> Settings:
    options = {"max_reject_fraction": 0.9, "sampling__temperature": 0.0, "output__chunk_rows": 5}
    return job_settings(shards, output, **(options | overrides))


def counts_of(output: Path) -> list[dict[str, int]]:
    """The run's, then each shard's."""
    manifest = json.loads((output / "manifest.json").read_bytes())
    return [manifest["totals"], *(shard["counts"] for shard in manifest["shards"])]


def test_a_shard_counts_all_rows_that_ask_for_what_an_earlier_one_did(shards: Path, tmp_path: Path):
    made = []
    for order in ("input", "prefix"):
        for chunk_rows in (1, 5, 100):
            output = tmp_path / f"{order}-{chunk_rows}"
            options = {"input__order": order, "output__chunk_rows": chunk_rows}
            assert run_fake(settings_of(shards, output, **options)) == ExitCode.DONE
            made.append(counts_of(output))
            inside = [record["counts"]["duplicates"] for record in commits(output).values()]
            assert sum(inside) <= made[-1][0]["duplicates"]
            assert any(inside) == (chunk_rows > 1), "a chunk counts those inside it"
            assert open_run(output).counts() == made[-1][0]
    run, *each = made[0]
    assert all(counts == made[0] for counts in made)
    for counts in each:
        assert counts["duplicates"] == NUM_GOOD - NUM_KINDS
        assert (counts["ok"], counts["rejected"]) == (NUM_KINDS, NUM_ROWS - NUM_GOOD)
    assert run["duplicates"] == 2 * (NUM_GOOD - NUM_KINDS), "the same prompts in another shard are its own"


@pytest.mark.parametrize("order", ["input", "prefix"])
@pytest.mark.parametrize("row", ["0:6", "0:17", "1:22"])
def test_a_run_that_is_killed_and_resumed_counts_the_same(shards: Path, tmp_path: Path, order: str, row: str):
    assert run_fake(settings_of(shards, tmp_path / "whole", input__order=order)) == ExitCode.DONE
    settings = settings_of(shards, tmp_path / "out", input__order=order)

    def crash(request_id: str) -> None:
        raise Crash(request_id)

    with pytest.raises(Crash):
        run_fake(settings, lambda *_: FakeEngine(max_num_seqs=4, crash_on={row}, crash=crash))
    kept = commits(tmp_path / "out")
    assert run_fake(settings) == ExitCode.DONE
    assert kept.items() <= commits(tmp_path / "out").items()
    assert counts_of(tmp_path / "out") == counts_of(tmp_path / "whole")
    assert counts_of(tmp_path / "out")[0]["duplicates"] > 0


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        ({"sampling__temperature": 1.0}, 0),
        ({"sampling__temperature": 1.0, "sampling__seed": 3}, NUM_GOOD - NUM_KINDS),
    ],
)
def test_draws_of_a_rows_own_make_no_duplicate(
    shards: Path, tmp_path: Path, sampling: dict[str, Any], expected: int
):
    assert run_fake(settings_of(shards, tmp_path / "out", **sampling)) == ExitCode.DONE
    assert [counts["duplicates"] for counts in counts_of(tmp_path / "out")[1:]] == [expected, expected]


def test_a_commit_record_keeps_its_keys_and_says_when_they_are_damaged():
    file = FileRef("a", "0" * 64, 1)
    record = CommitRecord(
        shard=0, chunk=0, attempt="a", start=0, stop=2, order="o", data=file, trace=file, rejects=None,
        counts={}, duplicate_keys=bytes(range(16)), input_version={}, packed_metrics=pack_metrics({}),
    )  # fmt: skip
    assert CommitRecord.from_bytes(record.to_bytes(), "place") == record
    value = json.loads(record.to_bytes())
    for damage in ("AAAA", "é", "AAAAAAAAAAA", 5):
        with pytest.raises(OutputError, match="place is damaged"):
            CommitRecord.from_bytes(json.dumps(value | {"duplicate_keys": damage}).encode(), "place")
