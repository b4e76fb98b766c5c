"""Chunks add up to shards exactly, and percentiles survive the sum."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.outputs import CompletionOutput, RequestMetrics, RequestOutput
from engine.sampling_params import SamplingParams
from pipeline.engine_meter import EngineMeter
from pipeline.hints import Template
from pipeline.histogram import SMALLEST, Histogram
from pipeline.metrics import MAX_TEMPLATES, ChunkFacts, Metrics, TemplateCounts, merge_chunks, summarise
from tests.pipeline.fake_engine import FakeEngine

values = st.lists(st.floats(min_value=0, max_value=1e6, allow_nan=False), max_size=60)


def histogram_of(numbers: list[float]) -> Histogram:
    histogram = Histogram()
    for number in numbers:
        histogram.add(number)
    return histogram


@given(values, values)
def test_merging_histograms_equals_counting_everything_in_one(one: list[float], other: list[float]) -> None:
    merged = histogram_of(one)
    merged.merge(histogram_of(other))
    whole = histogram_of(one + other)
    assert (merged.counts, merged.least, merged.greatest) == (whole.counts, whole.least, whole.greatest)
    assert math.isclose(merged.total, whole.total, abs_tol=1e-6)


@given(values, st.sampled_from([0.01, 0.5, 0.9, 0.95, 0.99, 1.0]))
def test_a_quantile_is_within_a_bucket_of_the_nearest_rank(numbers: list[float], q: float) -> None:
    quantile = histogram_of(numbers).quantile(q)
    if not numbers:
        assert quantile is None
        return
    exact = sorted(numbers)[max(1, math.ceil(q * len(numbers))) - 1]
    assert quantile is not None
    assert quantile == pytest.approx(exact, rel=0.08, abs=2 * SMALLEST)


@given(values)
def test_a_histogram_survives_json(numbers: list[float]) -> None:
    histogram = histogram_of(numbers)
    assert Histogram.from_json(json.loads(json.dumps(histogram.to_json()))) == histogram


@pytest.mark.parametrize("bad", [-1.0, float("nan")])
def test_a_histogram_refuses_what_is_no_amount(bad: float) -> None:
    with pytest.raises(ValueError, match="from 0 up"):
        Histogram().add(bad)


def output(num_tokens: int, reason: str = "stop", samples: int = 1) -> RequestOutput:
    return RequestOutput(
        request_id="r",
        prompt=None,
        prompt_token_ids=(1, 2, 3, 4),
        outputs=tuple(
            CompletionOutput(index=i, text="", token_ids=(7,) * num_tokens, finish_reason=reason)
            for i in range(samples)
        ),
        finished=True,
        metrics=RequestMetrics(10.0, 11.0, 12.0, 12.0 + 0.5 * (num_tokens - 1), num_preemptions=1),
        num_cached_tokens=2,
    )


def chunk_metrics(*outputs: RequestOutput, rejects: tuple[str, ...] = ()) -> Metrics:
    metrics = Metrics()
    for each in outputs:
        metrics.complete(each)
    for reason in rejects:
        metrics.reject(reason)
    return metrics


def test_a_completed_row_is_counted_with_its_times() -> None:
    metrics = chunk_metrics(output(5), output(1, "length", samples=2), rejects=("null_value",))
    assert (metrics.rows_in, metrics.rows_ok, metrics.rows_rejected, metrics.samples) == (3, 2, 1, 3)
    assert (metrics.prompt_tokens, metrics.cached_tokens, metrics.generated_tokens) == (8, 4, 7)
    assert metrics.finish_reasons == {"stop": 1, "length": 2}
    assert metrics.hit_rate == 0.5
    assert metrics.preempted_rows == 2
    assert (metrics.queue_seconds.total, metrics.first_token_seconds.total) == (2.0, 4.0)
    assert (metrics.token_seconds.count, metrics.token_seconds.total) == (4, 2.0)


def test_a_sum_of_chunks_equals_counting_their_rows_together() -> None:
    parts = [chunk_metrics(output(5), rejects=("a",)), chunk_metrics(output(3, "length"), rejects=("a", "b"))]
    whole = chunk_metrics(output(5), output(3, "length"), rejects=("a", "a", "b"))
    assert Metrics.sum(parts) == whole
    assert Metrics.sum(Metrics.from_json(json.loads(json.dumps(part.to_json()))) for part in parts) == whole


def test_a_shard_lists_the_attempts_that_made_it() -> None:
    first = ChunkFacts("a1", "cpu", {"jax": "1"}, "f").to_json()
    second = ChunkFacts("a2", "tpu", {"jax": "2"}, "f").to_json()
    chunk = chunk_metrics(output(5)).to_json()
    shard = merge_chunks([chunk | first, chunk | first, chunk | second])
    assert [(made["attempt"], made["device"], made["chunks"]) for made in shard["attempts"]] == [
        ("a1", "cpu", 2),
        ("a2", "tpu", 1),
    ]
    assert shard["rows_ok"] == 3


def test_a_summary_of_nothing_has_no_rates() -> None:
    summary = summarise(Metrics())
    assert summary["generated_tokens_per_second"] is None
    assert summary["prefix_hit_rate"] is None
    assert summary["step_seconds"]["p99"] is None
    json.dumps(summary, allow_nan=False)


def test_achieved_and_achievable_add_up_over_chunks_and_templates() -> None:
    first, second = Metrics(), Metrics()
    first.complete(output(3), 100, Template("a", 90, "begins"))
    second.complete(output(3), 50, Template("a", 90, "begins"))
    second.complete(output(3), 7, None)
    again = Metrics.from_json(json.loads(json.dumps(first.to_json())))
    assert again.to_json() == first.to_json()
    total = Metrics.sum([again, second])
    shown = summarise(total)
    assert shown["achievable_tokens"] == 157
    assert shown["achieved_share"] == total.cached_tokens / 157
    [template] = shown["templates"]
    assert (template["rows"], template["num_tokens"], template["text"]) == (2, 90, "begins")
    assert template["achievable_tokens"] == 150
    assert summarise(Metrics())["achieved_share"] is None
    assert first.templates["a"].rows == 1, "a sum leaves its parts as they were"


def test_of_many_templates_the_most_rewarding_are_kept() -> None:
    total = Metrics()
    for number in range(5 * MAX_TEMPLATES):
        part = Metrics(templates={str(number): TemplateCounts(16, "", rows=1, achievable_tokens=number)})
        total.merge(part)
    assert len(total.templates) <= 2 * MAX_TEMPLATES
    shown = summarise(total)["templates"]
    assert [each["achievable_tokens"] for each in shown] == list(range(319, 309, -1))


def test_the_tail_is_of_steps_less_than_half_full_with_nothing_waiting() -> None:
    now = iter(range(1000))
    engine = FakeEngine(max_num_seqs=4)
    meter = EngineMeter(engine, 4, clock=lambda: float(next(now)))
    for number, length in enumerate([2, 2, 3, 7, 3]):
        sampling = SamplingParams(max_tokens=length, ignore_eos=True)
        engine.add_request(str(number), [1, 2], sampling=sampling)
    while engine.has_unfinished:
        meter.step()
    metrics = Metrics()
    meter.settle(metrics)
    # Four run for two steps, three for one, two for two (half is not less than half), one for the last two.
    assert metrics.num_steps == 7
    assert metrics.tail_seconds == 2.0
    assert metrics.computed_tokens == engine.stats().num_computed_tokens
