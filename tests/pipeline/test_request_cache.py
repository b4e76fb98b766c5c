"""Rows that were answered before are not computed: the output is the one without a cache, to the byte."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import pytest

from engine.errors import ConfigError, RetryLater
from engine.outputs import CompletionOutput, RequestMetrics, RequestOutput
from engine.sampling_params import SamplingParams
from pipeline import cache_index
from pipeline.cache_index import CacheIndex
from pipeline.cached_results import encode, row_key, to_json
from pipeline.exit_codes import ExitCode
from pipeline.local_storage import LocalStorage
from pipeline.request_cache import RequestCache
from pipeline.rows import Prompt
from pipeline.settings import Settings, result_part
from tests.pipeline.fake_engine import FakeEngine
from tests.pipeline.input_helpers import lines, write_jsonl
from tests.pipeline.job_helpers import final_bytes, job_settings, run_fake, write_shards

VARIED = {
    "sampling__n": 2,
    "sampling__logprobs": 2,
    "sampling__prompt_logprobs": 0,
    "sampling__temperature": 0.8,
}


class CountingEngine(FakeEngine):
    """Notes what it is asked to compute."""

    asked: list[tuple[int, ...]]

    def add_request(self, request_id: str, prompt_token_ids: Any = None, **options: Any) -> None:
        self.asked.append(tuple(prompt_token_ids))
        super().add_request(request_id, prompt_token_ids, **options)


def run(settings: Settings, crash_at: int | None = None) -> tuple[dict[str, bytes], int, Counter[str]]:
    """The output's bytes, how many rows were computed, and the metrics of the cache."""
    asked: list[tuple[int, ...]] = []

    def make(loaded: Any, settings: Settings) -> FakeEngine:
        engine = CountingEngine(max_num_seqs=settings.engine.max_num_seqs, seed=settings.engine.seed)
        engine.asked = asked
        return engine

    assert run_fake(settings, make) == ExitCode.DONE
    output = Path(str(settings.output.path))
    counts: Counter[str] = Counter()
    for file in (output / "metrics").glob("*.json"):
        shard = json.loads(file.read_bytes())
        counts.update({name: shard[f"request_cache_{name}"] for name in ("hits", "stored", "damaged")})
    return final_bytes(output), len(asked), counts


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("input"))


def objects(cache: Path) -> list[Path]:
    return sorted(cache.glob("*/objects/*.json"))


@pytest.mark.parametrize("sampling", [{}, VARIED, VARIED | {"sampling__seed": 3}])
def test_a_second_run_computes_nothing_and_gives_the_same_bytes(shards, tmp_path, sampling):
    plain, num_plain, _ = run(job_settings(shards, tmp_path / "plain", **sampling))
    cached = {"cache__path": str(tmp_path / "cache")} | sampling
    first = run(job_settings(shards, tmp_path / "first", **cached))
    assert first == (plain, num_plain, Counter(hits=0, stored=24, damaged=0))
    assert len(objects(tmp_path / "cache")) == 9, "one object a chunk"
    second = run(job_settings(shards, tmp_path / "second", **cached))
    assert second == (plain, 0, Counter(hits=24, stored=0, damaged=0))
    assert len(objects(tmp_path / "cache")) == 9, "what was found is not kept again"


def test_only_rows_that_are_new_are_computed(shards, tmp_path):
    cached = {"cache__path": str(tmp_path / "cache"), "output__chunk_rows": 5}
    run(job_settings(shards, tmp_path / "first", cache__path=str(tmp_path / "cache")))
    folder = write_shards(tmp_path / "more", num_shards=4)
    wanted, _, _ = run(job_settings(folder, tmp_path / "plain", output__chunk_rows=5))
    got, num_computed, counts = run(job_settings(folder, tmp_path / "second", **cached))
    assert got == wanted
    assert num_computed == 8 == counts["stored"]
    assert counts["hits"] == 24, "though they were in other chunks"


@pytest.mark.parametrize(
    ("changes", "num_computed"),
    [
        ({"sampling__top_k": 5}, 0),  # it means nothing to a greedy row
        ({"sampling__seed": 9}, 0),
        ({"sampling__max_tokens": 5}, 24),
        ({"sampling__temperature": 1.0}, 24),
        ({"engine__seed": 1}, 24),
        ({"engine__dtype": "bfloat16"}, 24),
        ({"output__format": "jsonl", "output__chunk_rows": 7}, 0),
    ],
)
def test_what_tokens_depend_on_is_in_the_key_and_nothing_else(shards, tmp_path, changes, num_computed):
    cached = {"cache__path": str(tmp_path / "cache"), "sampling__temperature": 0.0}
    run(job_settings(shards, tmp_path / "first", **cached))
    assert run(job_settings(shards, tmp_path / "second", **(cached | changes)))[1] == num_computed


@pytest.mark.parametrize(("temperature", "num_computed"), [(0.0, 0), (1.0, 4)])
def test_a_rows_id_counts_where_its_draws_descend_from_it(tmp_path, temperature, num_computed):
    for name in ("a", "b"):
        rows = [{"id": f"{name}{i}", "prompt": f"p {i}"} for i in range(4)]
        write_jsonl(tmp_path / name / "0.jsonl", lines(rows))
    cached = {"cache__path": str(tmp_path / "cache"), "sampling__temperature": temperature}
    run(job_settings(tmp_path / "a", tmp_path / "first", **cached))
    assert run(job_settings(tmp_path / "b", tmp_path / "second", **cached))[1] == num_computed


def test_the_cache_is_no_part_of_what_a_run_is(shards, tmp_path):
    with_cache = job_settings(shards, tmp_path / "out", cache__path=str(tmp_path / "cache"))
    assert result_part(with_cache) == result_part(job_settings(shards, tmp_path / "out"))


def flip(data: bytes) -> bytes:
    at = len(data) // 2
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def say_other_words(data: bytes) -> bytes:
    """Still JSON, and of the right form."""
    return data.replace(b'"text":"', b'"text":"other words', 1)


@pytest.mark.parametrize("damage", [flip, say_other_words, lambda data: data[:-9], lambda data: b"\xff"])
def test_damaged_objects_are_passed_over_and_counted(shards, tmp_path, damage):
    cached = {"cache__path": str(tmp_path / "cache")}
    wanted, *_ = run(job_settings(shards, tmp_path / "first", **cached))
    for path in objects(tmp_path / "cache")[:2]:
        path.write_bytes(damage(path.read_bytes()))
    got, num_computed, counts = run(job_settings(shards, tmp_path / "second", **cached))
    assert got == wanted
    assert 4 <= num_computed <= 6, "the rows of two chunks of three or two"
    assert counts["damaged"] == 2
    assert counts["hits"] == 24 - num_computed


def test_what_is_no_result_of_the_row_is_passed_over(tmp_path):
    """The hash of an object says that it is whole, not that what it says fits."""
    storage, prompt = LocalStorage(tmp_path), a_prompt(3)
    result = to_json(an_output(4))
    assert result is not None
    (sample,) = result["samples"]
    wrongs = [
        {},
        [1],
        None,
        result | {"num_prompt_tokens": 3},
        result | {"samples": []},
        result | {"samples": [sample, sample]},
        result | {"samples": [sample | {"finish_reason": "abort"}]},
        result | {"samples": [sample | {"token_ids": ["4"]}]},
        result | {"samples": [sample | {"text": None}]},
    ]
    for number, wrong in enumerate(wrongs):
        cache = RequestCache(storage, {"n": number})
        cache.store({row_key(prompt): wrong})
        cache.close()
        again = RequestCache(storage, {"n": number})
        assert len(again) == 1
        assert again.find(prompt, "r") is None
        assert again.take_damaged() == 1


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(flip(path.read_bytes()))])
def test_a_lost_index_is_made_again(shards, tmp_path, damage):
    cached = {"cache__path": str(tmp_path / "cache")}
    run(job_settings(shards, tmp_path / "first", **cached))
    (index,) = (tmp_path / "cache").glob("*/indexes/*.json")
    damage(index)
    _, num_computed, counts = run(job_settings(shards, tmp_path / "second", **cached))
    assert num_computed == 0
    assert counts["hits"] == 24
    assert index.exists()


def a_prompt(number: int) -> Prompt:
    return Prompt(f"row {number}", 0, number, (number, 5), None, SamplingParams(temperature=0.0), {}, False)


def an_output(number: int, reason: str | None = "stop") -> RequestOutput:
    sample = CompletionOutput(0, (number, 7), reason, text=f"answer {number}")
    times = RequestMetrics(0.0, None, None, None)
    return RequestOutput("r", None, (number, 5), (sample,), reason is not None, times)


class Counted(LocalStorage):
    """Counts what a store would be asked."""

    requests: ClassVar[Counter[str]] = Counter()

    def subfolder(self, name: str) -> Counted:
        return Counted(self._root / name)

    def read(self, path: str) -> bytes | None:
        self.requests["read"] += 1
        return super().read(path)

    def list(self, folder: str) -> list[str]:
        self.requests["list"] += 1
        return super().list(folder)

    def create(self, path: str, data: bytes) -> Any:
        self.requests["create"] += 1
        return super().create(path, data)


def fill(storage: LocalStorage, numbers: range, chunk: int, is_closed: bool = True) -> None:
    cache = RequestCache(storage, {})
    for start in range(numbers.start, numbers.stop, chunk):
        rows = range(start, min(start + chunk, numbers.stop))
        assert cache.store({row_key(a_prompt(n)): to_json(an_output(n)) for n in rows}) == len(rows)
    if is_closed:
        cache.close()


def test_requests_to_a_store_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_index, "OBJECTS_PER_INDEX", 10)
    Counted.requests.clear()
    storage = Counted(tmp_path)
    fill(storage, range(200), chunk=8)
    assert Counted.requests == Counter(list=1, create=25 + 3), "an object a chunk, an index for ten"
    Counted.requests.clear()
    cache = RequestCache(storage, {})
    assert Counted.requests == Counter(list=3, read=3)
    for number in range(200):
        found = cache.find(a_prompt(number), "r")
        assert found is not None
        assert found.outputs == an_output(number).outputs
    assert Counted.requests == Counter(list=3, read=3 + 25), "an object is read once for its rows"
    assert cache.find(a_prompt(200), "r") is None
    assert Counted.requests["read"] == 28, "what is not there is known without asking"


def test_many_indexes_become_one(tmp_path):
    storage = Counted(tmp_path)
    for number in range(cache_index.MAX_INDEXES + 1):  # as many small runs
        fill(storage, range(number, number + 1), chunk=1)
    cache = RequestCache(storage, {})
    assert len(cache) == 65
    Counted.requests.clear()
    again = RequestCache(storage, {})
    assert Counted.requests == Counter(list=3, read=1)
    assert again.find(a_prompt(64), "r") is not None


def test_what_a_dead_worker_stored_is_found(tmp_path, monkeypatch):
    storage = Counted(tmp_path)
    fill(storage, range(40), chunk=4, is_closed=False)
    monkeypatch.setattr(cache_index, "MAX_UNINDEXED", 6)
    assert [len(RequestCache(storage, {})) for _ in range(3)] == [24, 40, 40], "some at each start"


def test_a_run_finds_what_was_there_when_it_began(tmp_path):
    cache = RequestCache(LocalStorage(tmp_path), {})
    cache.store({row_key(a_prompt(1)): to_json(an_output(1))})
    assert cache.find(a_prompt(1), "r") is None


@pytest.mark.parametrize("reason", ["abort", "timeout", None])
def test_only_complete_results_are_kept(reason):
    assert to_json(an_output(1, reason)) is None
    assert to_json(an_output(1, "length")) is not None


def test_a_number_that_json_has_not_is_not_kept(tmp_path):
    cache = RequestCache(LocalStorage(tmp_path), {})
    assert cache.store({row_key(a_prompt(1)): {"x": float("nan")}}) == 0
    with pytest.raises(ValueError, match="JSON"):
        encode({"x": float("inf")})


@pytest.mark.parametrize("method", ["create", "read"])
def test_a_store_that_fails_meanwhile_costs_hits_and_not_the_run(shards, tmp_path, monkeypatch, method):
    cached = {"cache__path": str(tmp_path / "cache")}
    wanted, *_ = run(job_settings(shards, tmp_path / "first", **cached))
    if method == "create":
        for path in (tmp_path / "cache").glob("*/*/*"):
            path.unlink()
    real = getattr(LocalStorage, method)

    def failing(self: LocalStorage, path: str, *rest: Any) -> Any:
        if path.startswith("objects/"):
            raise RetryLater("the store is gone")
        return real(self, path, *rest)

    monkeypatch.setattr(LocalStorage, method, failing)
    got, num_computed, counts = run(job_settings(shards, tmp_path / "second", **cached))
    assert got == wanted
    assert num_computed == 24
    assert counts["hits"] == 0


def test_a_cache_that_cannot_be_used_is_refused_by_its_name(shards, tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (str(tmp_path / "file" / "cache"), "ftp://host/cache"):
        with pytest.raises(ConfigError, match=r"cache\.path"):
            run(job_settings(shards, tmp_path / "out", cache__path=path))


def test_an_index_ignores_objects_that_are_gone(tmp_path):
    storage = LocalStorage(tmp_path)
    fill(storage, range(6), chunk=2)
    (folder,) = tmp_path.iterdir()
    next(iter((folder / "objects").iterdir())).unlink()
    assert len(CacheIndex(storage.subfolder(folder.name))) == 4
