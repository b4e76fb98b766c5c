"""When and how steps are compiled: the tokens are the same, what is compiled when is what was asked for."""

from __future__ import annotations

import logging
import re
from dataclasses import replace

import pytest

from engine.buckets import declare_buckets
from engine.compilation import counting_compiles
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import RetraceError
from engine.sampling_params import SamplingParams
from tests.engine.engines import tokens_of, varied_model

CONFIG = EngineConfig(
    max_num_seqs=4,
    max_num_batched_tokens=32,
    min_token_pad=16,
    max_model_len=96,
    page_size=16,
    kv_cache_bytes=1 << 20,
)
DRAWN = SamplingParams(temperature=1.0, seed=3, max_tokens=6, ignore_eos=True)


def answers(engine: Engine):
    return tokens_of(engine.generate([[5, 6, 7], [*range(10, 40)]], DRAWN))


@pytest.fixture(scope="module")
def usual() -> Engine:
    return Engine(varied_model(), CONFIG)


@pytest.mark.parametrize("use_aot_forward", [True, False])
@pytest.mark.parametrize("compile_runner", [True, False])
def test_steps_are_compiled_when_and_how_the_options_say(
    usual: Engine, use_aot_forward: bool, compile_runner: bool
):
    with counting_compiles() as at_start:
        engine = Engine(
            varied_model(), CONFIG, use_aot_forward=use_aot_forward, compile_runner=compile_runner
        )
    assert len(engine._runner._compiled) == (2 if compile_runner else 0)
    with counting_compiles() as later:
        assert answers(engine) == answers(usual)
    assert len(engine._runner._compiled) == 2
    if compile_runner:
        assert later.num_requests == 0, "something was compiled after the start"
    else:
        assert later.num_requests >= 2
        assert engine.stats().num_compiled == at_start.num_compiled + later.num_compiled
    assert answers(engine) == answers(usual)


def test_a_shape_that_was_not_declared_is_an_error_only_ahead_of_time(usual: Engine):
    """Arrays of one bucket for the step of the other."""
    for engine in (usual, Engine(varied_model(), CONFIG, use_aot_forward=False)):
        runner = engine._runner
        small, large = runner.buckets
        arrays = runner._batch.idle_arrays(large)
        if engine is usual:
            with pytest.raises(RetraceError, match="it was not compiled for"):
                runner._call(small, arrays)
        else:
            # The numbers are cut by the static shape, so a longer vector is a new shape and traced anew.
            with counting_compiles() as count:
                runner._kv_pages, _ = runner._call(small, arrays)
            assert count.num_requests == 1


def test_a_verbose_runner_tells_of_every_step(usual: Engine, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, "engine.runner"):
        answers(usual)
        assert caplog.text == ""
        engine = Engine(varied_model(), CONFIG, runner_verbose=True)
        assert len(re.findall("compiling the step of", caplog.text)) == 2
        caplog.clear()
        assert answers(engine) == answers(usual)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == engine.stats().num_steps
    assert re.fullmatch(r"\d+ tokens, \d+ rows, in the step of \(\d+, \d+\)", lines[0])


@pytest.mark.parametrize("pad", [8, 32])
def test_rows_of_logits_are_padded_as_asked(usual: Engine, pad: int):
    engine = Engine(varied_model(), replace(CONFIG, min_input_pad=pad))
    assert {bucket.num_logits for bucket in engine._runner.buckets} == {pad}
    assert answers(engine) == answers(usual)


def test_no_input_pad_is_that_of_tokens():
    for skips in (True, False):
        plain = declare_buckets(16, 1024, 256, skips_padding=skips)
        assert declare_buckets(16, 1024, 256, min_input_pad=16, skips_padding=skips) == plain
        finer = declare_buckets(32, 1024, 40, min_input_pad=8, skips_padding=skips)
        assert {bucket.num_logits for bucket in finer} <= {16, 32, 40}
        assert all(bucket.num_tokens % 32 == 0 for bucket in finer)
