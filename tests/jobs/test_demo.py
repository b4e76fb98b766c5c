"""The demo's prompts: what the generator makes is shipped, and the spoilt rows are rejected as announced."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from engine.sampling_params import SamplingParams
from jobs.demo.shards import NUM_ROWS, ROWS_PER_SHARD, write_shards
from pipeline.id_index import IdIndex
from pipeline.prompts import PromptBuilder, PromptSettings
from pipeline.rows import Prompt, Reject, SourceRow
from pipeline.shards import InputSettings, list_shards, read_rows

NAMES = ["docstrings-0.parquet", "docstrings-1.jsonl", "docstrings-2.parquet", "docstrings-3.jsonl.gz"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    write_shards(folder)
    return folder


def rows_of(folder: Path) -> list[list[SourceRow | Reject]]:
    settings = InputSettings(path=str(folder), id_column="id")
    return [list(read_rows(shard, settings, 0, None)) for shard in list_shards(settings)]


def announced_rejects(repository: Path) -> set[tuple[str, int, str]]:
    """(shard, row, reason) of the table in the demo's README."""
    table = (repository / "jobs/demo/README.md").read_text()
    cells = re.findall(r"^\| `(docstrings[^`]*)` \| (\d+) \|.*\| `(\w+)` \|$", table, re.MULTILINE)
    return {(shard, int(row), reason) for shard, row, reason in cells}


@pytest.mark.parametrize("which", ["made", "shipped"])
def test_four_shards_of_64_rows(which: str, made: Path, repository: Path):
    folder = made if which == "made" else repository / "jobs/demo/prompts"
    assert sorted(path.name for path in folder.iterdir()) == NAMES
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1_000_000
    shards = rows_of(folder)
    assert [len(rows) for rows in shards] == [ROWS_PER_SHARD] * 4
    assert sum(map(len, shards)) == NUM_ROWS == 256


def test_making_them_twice_gives_the_same_bytes(made: Path, tmp_path: Path):
    again = write_shards(tmp_path)
    assert [path.read_bytes() for path in again] == [(made / path.name).read_bytes() for path in again]


@pytest.mark.parametrize("which", ["made", "shipped"])
def test_exactly_the_announced_rows_are_rejected(which: str, made: Path, repository: Path, tmp_path: Path):
    from engine.checkpoints import load_tokenizer

    folder = made if which == "made" else repository / "jobs/demo/prompts"
    input_settings = InputSettings(path=str(folder), id_column="id", carry_columns=("module", "docstring"))
    settings = PromptSettings(template_file=str(repository / "jobs/demo/template.jinja"), chat=True)
    shards = list_shards(input_settings)
    tokenizer = load_tokenizer("smollm2-135m-instruct")
    with IdIndex.build(tmp_path / "ids.sqlite", shards, input_settings) as index:
        builder = PromptBuilder(
            settings, input_settings, tokenizer, SamplingParams(max_tokens=48), 1024, id_index=index
        )
        built = [builder.build_many(list(read_rows(shard, input_settings, 0, None))) for shard in shards]

    results = [result for results in built for result in results]
    rejected = {
        (NAMES[result.shard_index], result.position, result.reason)
        for result in results
        if isinstance(result, Reject)
    }
    assert rejected == announced_rejects(repository)
    assert len(rejected) == 8

    prompts = [result.token_ids for result in results if isinstance(result, Prompt)]
    shared = next(i for i, tokens in enumerate(zip(*prompts, strict=False)) if len(set(tokens)) > 1)
    assert 200 <= shared <= 400, "the template is to be long enough for sharing it to pay"
    assert max(map(len, prompts)) < 700
