"""What is exposed equals what was done, to the request and the token."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.engine import Engine
from engine.errors import ConfigError, MissingExtraError
from engine.monitoring import PREFIX, Metrics, metrics_text
from engine.monitoring.definitions import ENGINE_METRICS
from engine.monitoring.engine_watch import RATE_SECONDS, EngineWatch
from engine.monitoring.histogram import Histogram
from engine.monitoring.history import History, percentile
from engine.monitoring.key_usage import KeyUsage
from engine.outputs import RequestOutput
from engine.sampling_params import SamplingParams
from tests.engine.engines import tiny_engine, varied_model

GREEDY = SamplingParams(temperature=0.0, max_tokens=7, ignore_eos=True)
TEMPLATE = "the answer in the region is an ion on the "  # longer than a page of 16 tokens

Exposed = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def exposed(metrics: Metrics) -> Exposed:
    """Samples by their name without prefix, and their labels."""
    found: Exposed = {}
    for family in text_string_to_metric_families(metrics_text(metrics.registry).decode()):
        for sample in family.samples:
            key = (sample.name.removeprefix(PREFIX), tuple(sorted(sample.labels.items())))
            assert key not in found, f"{key} is exposed twice"
            found[key] = sample.value
    return found


def value(samples: Exposed, name: str, engine: str = "model", **labels: str) -> float:
    return samples[name, tuple(sorted({"engine": engine, **labels}.items()))]


@pytest.fixture
def engine() -> Engine:
    return tiny_engine()


@pytest.fixture
def metrics(engine: Engine) -> Iterator[Metrics]:
    made = Metrics()
    made.watch(engine)
    yield made
    made.unwatch(engine)
    assert not engine.observers


def growth(metrics: Metrics, run: Any) -> tuple[Any, Any]:
    """What `run` returns, and a function that says how much a sample grew meanwhile."""
    before = exposed(metrics)
    result = run()
    after = exposed(metrics)

    def grew(name: str, **labels: str) -> float:
        return value(after, name, **labels) - before.get(
            (name, tuple(sorted({"engine": "model", **labels}.items()))), 0.0
        )

    return result, grew


def test_counts_are_exactly_what_was_generated(engine: Engine, metrics: Metrics):
    prompts = [f"{TEMPLATE}{number} er" for number in range(5)] + ["on"]
    samplings = [GREEDY] * 5 + [SamplingParams(temperature=0.8, n=3, max_tokens=4, seed=1)]
    outputs, grew = growth(metrics, lambda: engine.generate(prompts, samplings))
    samples = [sample for output in outputs for sample in output.outputs]
    num_generated = sum(len(sample.token_ids) for sample in samples)

    assert grew("requests_received_total") == grew("requests_total", status="completed") == 6
    assert grew("requests_total", status="aborted") == grew("requests_total", status="timeout") == 0
    for reason in ("stop", "length"):
        expected = sum(sample.finish_reason == reason for sample in samples)
        assert grew("completions_total", finish_reason=reason) == expected
    assert grew("tokens_generated_total") == grew("request_generated_tokens_sum") == num_generated
    prompt_tokens = [len(output.prompt_token_ids) for output in outputs]
    assert grew("prompt_tokens_total") == sum(prompt_tokens[:5]) + 3 * prompt_tokens[5]
    assert grew("request_prompt_tokens_sum") == sum(prompt_tokens)
    assert grew("request_duration_seconds_count") == grew("time_to_first_token_seconds_count") == 6
    assert grew("request_queue_seconds_count") == 6
    assert grew("inter_token_latency_seconds_count") == num_generated - len(samples)
    seconds = sum(output.metrics.finished_time - output.metrics.arrival_time for output in outputs)
    assert grew("request_duration_seconds_sum") == pytest.approx(seconds)
    assert grew("request_duration_seconds_bucket", le="+Inf") == 6


def test_steps_are_counted_as_the_engine_counts_them(engine: Engine, metrics: Metrics):
    engine.stats()
    _, grew = growth(metrics, lambda: engine.generate([TEMPLATE, "er"], GREEDY))
    stats = engine.stats()
    assert grew("steps_total") == grew("model_execution_duration_seconds_count") == len(stats.step_seconds)
    assert grew("model_execution_duration_seconds_sum") == pytest.approx(sum(stats.step_seconds))
    assert grew("step_sequences_total") == sum(stats.batch_occupancy)
    assert grew("schedule_duration_seconds_count") >= grew("steps_total")


def test_the_hit_rate_is_that_of_tokens_found(engine: Engine, metrics: Metrics):
    prompt = f"an unheard-of beginning {TEMPLATE}"
    first, grew = growth(metrics, lambda: engine.generate(prompt, GREEDY))
    assert grew("prefix_cached_tokens_total") == first[0].num_cached_tokens < 8
    again, grew = growth(metrics, lambda: engine.generate([prompt, prompt + "er"], GREEDY))
    cached = sum(output.num_cached_tokens for output in again)
    assert cached >= 2 * (len(first[0].prompt_token_ids) - 1)
    assert grew("prefix_cached_tokens_total") == cached
    assert grew("prompt_tokens_total") == sum(len(output.prompt_token_ids) for output in again)
    samples, totals = exposed(metrics), engine.totals()
    assert value(samples, "cache_hit_rate") == totals.num_cached_tokens / totals.num_prompt_tokens


def test_gauges_say_how_things_stand(engine: Engine, metrics: Metrics):
    for number in range(9):  # one more than run at once
        engine.add_request(f"{number}", prompt=f"{number} er", sampling=GREEDY)
    engine.step()
    samples, stats = exposed(metrics), engine.totals()
    assert value(samples, "running_requests") == stats.running == 8
    assert value(samples, "waiting_requests") == stats.waiting == 1
    assert value(samples, "cache_pages_used") == stats.pages_held > 0
    assert value(samples, "cache_pages_total") == engine.num_pages
    (info,) = [dict(labels) for name, labels in samples if name == "system_info"]
    assert info["model"] == "model"
    assert info["device"] == stats.device
    for number in range(9):
        engine.abort_request(f"{number}")
    assert value(exposed(metrics), "requests_total", status="aborted") == 9
    while engine.has_unfinished:
        engine.step()
    assert value(exposed(metrics), "cache_pages_used") == 0


def test_nothing_is_exposed_that_is_not_defined_and_the_other_way_round(engine: Engine, metrics: Metrics):
    """Devices that say nothing of their memory (CPUs) are the only gap."""
    engine.generate("er", GREEDY)
    defined = {name.removeprefix(PREFIX) for each in ENGINE_METRICS for name in each.sample_names}
    found = {name for name, _ in exposed(metrics)}
    assert defined - found == {"device_memory_used_bytes", "device_memory_limit_bytes"}
    assert not found - defined


def test_help_and_type_are_those_of_the_definitions(metrics: Metrics):
    families = {
        family.name: family
        for family in text_string_to_metric_families(metrics_text(metrics.registry).decode())
    }
    for definition in ENGINE_METRICS:
        name = definition.full_name
        family = families.get(name.removesuffix("_total") if definition.kind == "counter" else name)
        if family is None or definition.name.startswith("process_"):  # the library's own words
            continue
        assert family.documentation == definition.help
        assert family.type == ("gauge" if definition.kind == "info" else definition.kind)


def test_two_engines_are_told_apart(engine: Engine, metrics: Metrics):
    other = tiny_engine(num_pages=40)
    with pytest.raises(ConfigError, match="two monitored engines are called 'model'"):
        metrics.watch(other)
    metrics.watch(other, "other")
    try:
        before = exposed(metrics)
        other.generate(["er", "on"], GREEDY)
        after = exposed(metrics)
    finally:
        metrics.unwatch(other)
    for name, grown in (("requests_received_total", 2), ("tokens_generated_total", 14)):
        assert value(after, name, "other") - value(before, name, "other") == grown
        assert value(after, name, "model") == value(before, name, "model")
    assert value(after, "cache_pages_total", "other") == 40
    assert not [labels for _, labels in exposed(metrics) if ("engine", "other") in labels]


class Ticking:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_tokens_per_second_are_those_of_the_window(engine: Engine):
    clock = Ticking()
    watch = EngineWatch(engine, "model", clock)
    engine.add_observer(watch)
    try:
        engine.generate(["er", "on", "is"], GREEDY)
        clock.now += 4.0
        assert watch.now().tokens_per_second == pytest.approx(21 / 4)
        engine.generate(["in"], GREEDY)
        clock.now += 5.0
        assert watch.now().tokens_per_second == pytest.approx(28 / 9)
        clock.now += 4.0  # the first three have left the window
        assert watch.now().tokens_per_second == pytest.approx(7 / RATE_SECONDS)
        clock.now += 3600.0
        assert watch.now().tokens_per_second == 0.0
    finally:
        engine.remove_observer(watch)


def test_a_timed_out_request_is_counted_as_one(engine: Engine):
    watch = EngineWatch(engine, "model")
    (output,) = engine.generate("er", GREEDY)
    sample = output.outputs[0]
    ended = type(sample)(0, sample.token_ids, "timeout", text="")
    watch.on_finished(RequestOutput("late", None, output.prompt_token_ids, (ended,), True, output.metrics))
    assert watch.now().num_ended == {"completed": 0, "aborted": 0, "timeout": 1}


def test_history_has_the_rates_between_two_looks(engine: Engine, metrics: Metrics):
    clock = Ticking()
    history = History(metrics, start=False, clock=clock)
    history.look()
    assert history.engines["model"].points() == []
    outputs = engine.generate([f"{TEMPLATE}s", f"{TEMPLATE}t"], GREEDY)
    clock.now += 2.0
    history.look()
    clock.now += 2.0
    history.look()
    busy, idle = history.engines["model"].points()
    assert busy.requests_per_second == 1.0
    assert busy.generated_per_second == 7.0
    num_prompt = sum(len(output.prompt_token_ids) for output in outputs)
    assert busy.prompt_per_second == num_prompt / 2
    assert busy.hit_rate == sum(output.num_cached_tokens for output in outputs) / num_prompt
    assert busy.first_token_p50 is not None
    assert busy.first_token_p95 is not None
    assert 0 < busy.first_token_p50 <= busy.first_token_p95
    assert (idle.requests_per_second, idle.hit_rate) == (0.0, None)
    assert [point.number for point in history.engines["model"].points(after=0)] == [1]
    metrics.unwatch(engine)
    history.look()
    assert not history.engines
    metrics.watch(engine)


def test_a_histogram_counts_a_value_as_often_as_told():
    histogram = Histogram((1.0, 2.0))
    for number, times in ((0.5, 1), (1.0, 2), (1.5, 3), (9.0, 4)):
        histogram.add(number, times)
    counts = histogram.read()
    assert counts.counts == (3, 3, 4), "a bound is in its own bucket, as Prometheus has it"
    assert (counts.count, counts.total) == (10, 0.5 + 2.0 + 4.5 + 36.0)


def test_percentiles_are_nearest_ranks():
    numbers = [float(number) for number in range(100, 0, -1)]
    assert [percentile(numbers, share) for share in (0.01, 0.5, 0.95, 1.0)] == [1.0, 50.0, 95.0, 100.0]
    assert percentile([3.0], 0.5) == 3.0
    assert percentile([], 0.5) is None


def test_what_keys_used_is_told_by_id_and_label():
    metrics = Metrics()
    usage = {"id-1": {"label": "notebook", "requests": 2, "prompt_tokens": 30, "completion_tokens": 7}}
    metrics.add_source(KeyUsage(lambda: usage))
    (family,) = [
        family
        for family in text_string_to_metric_families(metrics_text(metrics.registry).decode())
        if family.name == "tidemill_api_key_prompt_tokens"
    ]
    (sample,) = family.samples
    assert (sample.labels, sample.value) == ({"key": "id-1", "label": "notebook"}, 30.0)
    usage["id-1"]["prompt_tokens"] = 31
    usage["id-2"] = {"label": None, "requests": 1, "prompt_tokens": 1, "completion_tokens": 1}
    found = {(each.definition.name, each.labels): each.value for each in metrics.samples()}
    assert found["api_key_prompt_tokens_total", ("id-1", "notebook")] == 31
    assert found["api_key_completion_tokens_total", ("id-2", "")] == 1
    assert metrics.facts() == {"API keys": "2"}


def test_without_prometheus_client_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'tidemill\[monitoring\]'"):
        Metrics().registry  # noqa: B018 - it is made when read


def test_the_model_gives_an_engine_its_name(engine: Engine):
    assert engine.model_name == varied_model().name == "model"
