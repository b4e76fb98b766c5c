"""The host's part of a step is measured on steps that are full, and its parts make the whole."""

from __future__ import annotations

import gc

import pytest

from engine.config import EngineConfig
from jobs.bench import host, streams
from jobs.bench.workloads import real_token_ids


@pytest.fixture
def collector():
    thresholds = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*thresholds)


@pytest.mark.usefixtures("collector")
def test_host_work_is_measured_part_by_part(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(host, "NUM_SEQS", 32)
    monkeypatch.setattr(host, "MAX_NEW", 70)
    found = host.run(num_steps=20)
    assert found["num_steps"] == 20
    least, most = found["ms_per_step_range"]
    assert least <= found["ms_per_step"] <= most
    assert found["mean_sequences"] > 30
    assert 30 < found["tokens_per_step"] <= 32
    parts = found["cpu_ms_by_part"]
    assert set(parts) == set(host.PARTS)
    assert all(taken > 0 for taken in parts.values())
    assert sum(parts.values()) <= found["cpu_ms_per_step"]


@pytest.mark.usefixtures("collector")
def test_a_step_leaves_nothing_to_the_collector_of_garbage():
    config = EngineConfig(max_num_seqs=16, max_num_batched_tokens=64, max_model_len=host.MAX_MODEL_LEN)
    engine, _ = host.make_engine(host.DEFAULT_MODEL, config, num_pages=256)
    crowd = host.Crowd(real_token_ids(engine.tokenizer), 0, 64)

    def run(num_steps: int) -> int:
        num_finished = 0
        for _ in range(num_steps):
            outputs = engine.step()
            host.read_texts(outputs)
            num_finished += len(outputs)
            crowd.add_to(engine, 24 - engine.num_unfinished)
        return num_finished

    crowd.add_to(engine, 24)
    run(20)
    gc.collect()
    gc.disable()
    try:
        assert run(80) > 2
        assert gc.collect() == 0, "arrays of every step would be kept until a collection"
    finally:
        gc.enable()


def test_parts_inside_others_count_once(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr(host.time, "thread_time", lambda: now[0])

    def work(seconds: float) -> None:
        now[0] += seconds

    watch = host.Stopwatch()
    inner = watch.watch("batch", work)

    def outer() -> None:
        work(1.0)
        inner(2.0)
        work(3.0)

    watch.watch("text", outer)()
    assert watch.seconds["batch"] == 2.0
    assert watch.seconds["text"] == 4.0


@pytest.mark.usefixtures("collector")
def test_what_streams_cost_is_measured_beside_outputs_given_whole(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(streams, "NUM_SEQS", 16)
    monkeypatch.setattr(streams, "NUM_STEPS_BEFORE", 5)
    whole, streamed = (streams.run(streams.DEFAULT_MODEL, 100, 2.0, 0, stream) for stream in (False, True))
    for found in (whole, streamed):
        assert found["num_steps"] == 100
        assert found["ms_per_step"] >= 1.9  # that of the device
        assert found["step_thread_cpu_ms_per_step"] > 0
    assert streamed["outputs_per_step"] > whole["outputs_per_step"]
