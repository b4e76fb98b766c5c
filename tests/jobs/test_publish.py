"""The publish gate: a run is marked once, after a comparison with the last one, within the limits."""

from __future__ import annotations

import threading
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ConfigError
from jobs.publish import PublishSettings, exceeded, main, publish, published_as
from jobs.run_statistics import RepeatedTexts, RunStatistics
from jobs.sections import take_section
from pipeline.commits import parse_record
from pipeline.exit_codes import ExitCode
from pipeline.results import open_run
from pipeline.storage import Storage, open_storage
from tests.pipeline.input_helpers import lines, write_jsonl
from tests.pipeline.job_helpers import job_settings, run_fake, write_shards

USUAL = RunStatistics(
    rows=1000,
    samples=990,
    mean_length=100.0,
    finish_reasons={"stop": 0.9, "length": 0.1},
    duplicate_rate=0.01,
    empty_rate=0.0,
    reject_rate=0.01,
)


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "disk":
        return str(tmp_path / "out")
    return f"{request.getfixturevalue('s3_bucket')}/{uuid.uuid4().hex}"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "in")


def finished(shards: Path, output: str, **overrides: Any) -> Storage:
    assert run_fake(job_settings(shards, output, **overrides)) is ExitCode.DONE
    return open_storage(output)


def record(place: str, number: int) -> dict[str, Any]:
    return parse_record(open_storage(place).read(f"_published/{number:06d}.json") or b"", place)


def test_the_first_run_is_published_and_the_next_is_compared_with_it(shards: Path, place: str):
    first, second = finished(shards, f"{place}/1"), finished(shards, f"{place}/2")
    assert publish(first, PublishSettings()) is ExitCode.DONE
    assert publish(second, PublishSettings()) is ExitCode.DONE
    assert [record(place, n)["output"] for n in (1, 2)] == [first.url, second.url]
    assert record(place, 1)["compared_with"] is None
    assert record(place, 2)["compared_with"] == first.url
    assert published_as(first, PublishSettings()) == 1


def test_publishing_again_changes_nothing(shards: Path, place: str, capsys: pytest.CaptureFixture[str]):
    storage = finished(shards, f"{place}/1")
    other = finished(shards, f"{place}/2")
    for each in (storage, other, storage):
        assert publish(each, PublishSettings()) is ExitCode.DONE
    assert open_storage(place).list("_published") == ["000001.json", "000002.json"]
    assert "published already, as number 1" in capsys.readouterr().out


def test_of_runs_published_at_once_each_has_a_number_and_the_right_predecessor(shards: Path, place: str):
    storages = [finished(shards, f"{place}/{i}") for i in range(4)]
    codes: list[ExitCode] = []
    threads = [
        threading.Thread(target=lambda each=each: codes.append(publish(each, PublishSettings())))
        for each in storages
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [ExitCode.DONE] * 4
    records = [record(place, number) for number in range(1, 5)]
    assert {each["output"] for each in records} == {each.url for each in storages}
    assert [each["compared_with"] for each in records] == [None, *(each["output"] for each in records[:-1])]


def test_a_run_that_differs_is_refused_with_what_and_by_how_much(
    shards: Path, place: str, capsys: pytest.CaptureFixture[str]
):
    assert publish(finished(shards, f"{place}/1"), PublishSettings()) is ExitCode.DONE
    longer = finished(shards, f"{place}/2", sampling__max_tokens=60)
    assert publish(longer, PublishSettings()) is ExitCode.NOT_PUBLISHED
    assert open_storage(place).list("_published") == ["000001.json"]
    said = capsys.readouterr().err
    before, now = (RunStatistics.of(open_run(f"{place}/{i}")).mean_length for i in (1, 2))
    assert f"length: {now:.1f} tokens a sample after {before:.1f}" in said
    assert "publish.max_length_change=0.25" in said
    wide = PublishSettings(max_length_change=100.0, max_finish_change=1.0)
    assert publish(longer, wide) is ExitCode.DONE
    assert record(place, 2)["exceeded"] == []


def test_force_publishes_and_says_so(shards: Path, tmp_path: Path):
    place = str(tmp_path / "out")
    assert publish(finished(shards, f"{place}/1"), PublishSettings()) is ExitCode.DONE
    longer = finished(shards, f"{place}/2", sampling__max_tokens=60)
    assert publish(longer, PublishSettings(force=True)) is ExitCode.DONE
    assert any(each.startswith("length") for each in record(place, 2)["exceeded"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"mean_length": 126.0}, "length: 126.0 tokens a sample after 100.0, a change of 26.0%"),
        ({"mean_length": 74.0}, "length: 74.0"),
        ({"finish_reasons": {"stop": 0.79, "length": 0.21}}, "finish reason 'length': 21.0% after 10.0%"),
        ({"finish_reasons": {"stop": 0.75, "length": 0.1, "abort": 0.15}}, "finish reason 'abort'"),
        ({"duplicate_rate": 0.07}, "duplicate rate: 7.0% after 1.0%, 6.0 points apart"),
        ({"empty_rate": 0.03}, "empty rate: 3.0% after 0.0%"),
        ({"reject_rate": 0.04}, "reject rate: 4.0% after 1.0%"),
    ],
)
def test_each_limit_is_one_of_its_own(change: dict[str, Any], says: str):
    found = exceeded(replace(USUAL, **change), USUAL, PublishSettings())
    assert any(says in each for each in found)
    assert all(each.partition(":")[0].split()[0] == says.partition(":")[0].split()[0] for each in found)


@pytest.mark.parametrize(
    "change",
    [
        {"mean_length": 125.0},
        {"finish_reasons": {"stop": 0.99, "length": 0.01}},
        {"duplicate_rate": 0.0},
        {"reject_rate": 0.0, "empty_rate": 0.02},
    ],
)
def test_what_is_within_the_limits_or_better_passes(change: dict[str, Any]):
    assert exceeded(replace(USUAL, **change), USUAL, PublishSettings()) == []


def test_the_numbers_of_a_run_are_those_of_its_rows(tmp_path: Path):
    rows = [{"id": f"a{i}", "prompt": f"greedy {i % 3}", "own": {"temperature": 0}} for i in range(9)]
    rows += [{"id": f"b{i}", "prompt": f"drawn {i}", "own": {"temperature": 1.0}} for i in range(10)]
    write_jsonl(tmp_path / "in" / "0.jsonl", lines(rows) + b"no json\n")
    finished(tmp_path / "in", str(tmp_path / "out"), prompt__sampling_column="own", sampling__max_tokens=40)
    run = open_run(tmp_path / "out")
    table = run.to_pandas()
    found = RunStatistics.of(run)
    assert (found.rows, found.samples) == (20, 19)
    assert found.mean_length == pytest.approx(table["num_generated_tokens"].mean())
    assert found.finish_reasons == pytest.approx(dict(table["finish_reason"].value_counts(normalize=True)))
    assert found.duplicate_rate == pytest.approx(table["text"].duplicated().mean()) == pytest.approx(6 / 19)
    assert found.empty_rate == 0.0
    assert found.reject_rate == pytest.approx(1 / 20)
    assert RunStatistics(**found.to_json()) == found


@given(st.lists(st.integers(0, 60), max_size=300), st.integers(20, 80))
def test_repeated_texts_are_counted_exactly_while_they_fit(texts: list[int], max_kept: int):
    found = RepeatedTexts(max_kept)
    for text in texts:
        found.add(str(text))
    wanted = 1 - len(set(texts)) / len(texts) if texts else 0.0
    if len(set(texts)) <= max_kept:
        assert found.rate == pytest.approx(wanted)
    assert 0.0 <= found.rate < 1.0


def test_the_rate_of_very_many_texts_is_found_in_bounded_memory():
    found = RepeatedTexts(max_kept=2000)
    for i in range(60_000):
        found.add(f"text {i % 45_000}")
    assert len(found._counts) <= 2000
    assert found.rate == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["output.path={nothing}"], "holds no manifest.json"),
        (["output.path={nothing}", "publish.max_empty_rise=-0.1"], "must be 0 or more"),
        (["output.path={nothing}", "publish.max_length=1"], "did you mean"),
        ([], "output.path is missing"),
    ],
)
def test_what_cannot_be_published_is_said_in_one_line(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    given_arguments = [each.replace("{nothing}", str(tmp_path / "nothing")) for each in arguments]
    assert main(given_arguments) == ExitCode.BAD_CONFIG
    assert says in capsys.readouterr().err


def test_the_command_publishes(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    finished(shards, str(tmp_path / "out" / "1"))
    series = tmp_path / "series"
    assert main([f"output.path={tmp_path}/out/1", f"publish.series={series}"]) == ExitCode.DONE
    assert "is published as number 1." in capsys.readouterr().out
    assert (series / "_published" / "000001.json").exists()


def test_limits_are_read_from_the_command_line():
    settings, rest = take_section(["publish.max_empty_rise=0.5", "output.path=a"], "publish", PublishSettings)
    assert (settings.max_empty_rise, rest) == (0.5, ["output.path=a"])
    with pytest.raises(ConfigError, match="expected a number"):
        take_section(["publish.max_empty_rise=lots"], "publish", PublishSettings)
