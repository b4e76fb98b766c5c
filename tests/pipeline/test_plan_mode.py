"""A plan counts exactly what a run would do, writes it as JSON, and generates nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import OutputError
from engine.sampling_params import SamplingParams
from pipeline.exit_codes import ExitCode
from pipeline.plan_mode import plan_job
from pipeline.plan_report import MAX_BINS, RowsPlan
from pipeline.prefix_hashes import UNIT
from pipeline.rows import Prompt
from pipeline.settings import Settings
from pipeline.shared_prefixes import SharedPrefixes
from tests.pipeline.fake_engine import FakeEngine
from tests.pipeline.input_helpers import lines, write_jsonl
from tests.pipeline.job_helpers import fake_engine, fake_model, job_settings

PROMPTS = [{"id": str(i), "prompt": f"the same beginning of every prompt, then {i}"} for i in range(20)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    bad = lines([{"id": "0", "prompt": "twice"}, {"id": "b"}, {"id": "c", "prompt": "x" * 1000}])
    write_jsonl(tmp_path / "in" / "a.jsonl", lines(PROMPTS[:12]) + b"{\n" + bad)
    write_jsonl(tmp_path / "in" / "b.jsonl", lines(PROMPTS[12:]))
    return tmp_path / "in"


def plan(settings: Settings, make_engine: Any = fake_engine) -> dict[str, Any]:
    code = plan_job(settings, load_model=fake_model, load_text_side=fake_model, make_engine=make_engine)
    assert code == ExitCode.DONE
    assert settings.plan.json is not None
    return json.loads(Path(settings.plan.json).read_bytes())


def test_a_plan_counts_what_a_run_would_meet(folder: Path, tmp_path: Path, capsys: Any) -> None:
    settings = job_settings(
        folder, tmp_path / "out", mode="plan", plan__json=str(tmp_path / "plan.json"), engine__page_size=8
    )
    found = plan(settings)
    assert found["shards"] == [
        {"name": "a.jsonl", "rows": 16, "rejected": 4},
        {"name": "b.jsonl", "rows": 8, "rejected": 0},
    ]
    assert (found["rows"], found["prompts"], found["over_long_rows"]) == (24, 20, 1)
    assert found["rejected_by_reason"] == {
        "duplicate_id": 1,
        "missing_column": 1,
        "not_json": 1,
        "prompt_too_long": 1,
    }
    assert sum(each["rows"] for each in found["prompt_length_histogram"]) == 20
    assert found["max_generated_tokens"] == 20 * 6
    tokenizer = fake_model(settings).tokenizer
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in PROMPTS]
    assert found["prompt_tokens"] == sum(map(len, prompts))
    # Less a token where a prompt is all that others begin with: whichever runs second computes its last one.
    assert shared_by_search(prompts) - 20 <= found["shared_prefix_tokens"] <= shared_by_search(prompts)
    assert [each["rows"] for each in found["templates"]] == [12, 8]  # a shard each
    assert all(each["text"].startswith("the same beginning of every") for each in found["templates"])
    assert found["measured"]["num_pages"] == 1024
    assert found["estimate"]["steps"] > 0
    assert not (tmp_path / "out").exists()
    shown = capsys.readouterr().out
    assert "Plan: 2 shards, 24 rows. Nothing was generated." in shown
    assert "20 can run" in shown
    assert "at most about" in shown


def test_a_plan_for_an_absent_accelerator_has_no_estimate(folder: Path, tmp_path: Path, capsys: Any) -> None:
    def no_engine(loaded: Any, settings: Settings) -> FakeEngine:
        raise AssertionError("there is nothing to run it on")

    path = str(tmp_path / "plan.json")
    found = plan(
        job_settings(folder, tmp_path, mode="plan", plan__json=path, engine__platform="tpu"), no_engine
    )
    assert (found["measured"], found["estimate"], found["prompts"]) == (None, None, 20)
    assert "not estimated: engine.platform=tpu" in capsys.readouterr().out


def test_a_plan_file_that_cannot_be_written_is_named(folder: Path, tmp_path: Path) -> None:
    settings = job_settings(folder, tmp_path, mode="plan", plan__json=str(tmp_path / "no" / "plan.json"))
    with pytest.raises(OutputError, match=r"plan\.json=.*cannot be written"):
        plan(settings)


def shared_by_search(prompts: list[list[int]]) -> int:
    """The same count by comparing every prompt with all before it."""
    shared = 0
    for i, prompt in enumerate(prompts):
        common = [0]
        for other in prompts[:i]:
            same = 0
            while same < min(len(prompt), len(other)) and prompt[same] == other[same]:
                same += 1
            common.append(same if prompt == other else same // UNIT * UNIT)
        shared += min(max(common), len(prompt) - 1)
    return shared


# None is all that others begin with: then it would matter by a token which of them is first.
prompt_lists = st.lists(
    st.lists(st.integers(0, 1), min_size=1, max_size=30).filter(lambda tokens: len(tokens) % UNIT),
    max_size=12,
)


def shared_prefixes(shards: list[list[list[int]]]) -> SharedPrefixes:
    shared = SharedPrefixes()
    for number, prompts in enumerate(shards):
        for position, tokens in enumerate(prompts):
            shared.add(Prompt("", number, position, tuple(tokens), "text", SamplingParams(), {}, False))
        shared.end_shard()
    return shared


@given(prompt_lists, prompt_lists)
def test_shared_prefixes_are_what_a_search_finds(first: list[list[int]], second: list[list[int]]) -> None:
    shared = shared_prefixes([first, second])
    assert shared.num_tokens == sum(map(len, first + second))
    assert shared.num_shared == shared_by_search(first + second)
    assert shared.is_exact


def test_the_templates_that_save_most_come_first() -> None:
    few, many = [[1] * 40 + [i] for i in range(8)], [[2] * 24 + [i] for i in range(30)]
    found = shared_prefixes([few + many, few]).templates
    assert [(template.rows, template.num_tokens) for template in found] == [(30, 24), (8, 40), (8, 40)]


@given(st.lists(st.integers(1, 5000), max_size=50))
def test_the_length_histogram_holds_every_prompt_in_its_bin(lengths: list[int]) -> None:
    rows = RowsPlan()
    for length in lengths:
        rows.add(Prompt("", 0, 0, (1,) * length, "", SamplingParams(), {}, False))
    bins = rows.length_histogram()
    assert len(bins) <= MAX_BINS
    assert [count for _, _, count in bins] == [
        sum(start <= length < stop for length in lengths) for start, stop, _ in bins
    ]
    assert sum(count for _, _, count in bins) == len(lengths)
