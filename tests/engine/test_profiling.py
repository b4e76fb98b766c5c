"""A profile is written for as long as it was asked for, and changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.errors import ConfigError
from engine.sampling_params import SamplingParams
from tests.engine.engines import engine_with, tiny_engine, tokens_of

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def traces(folder: Path) -> list[Path]:
    return list(folder.rglob("*.xplane.pb"))


def test_a_profile_ends_when_it_is_told_or_after_its_steps(tmp_path: Path):
    engine = engine_with(max_request_outputs=1)
    expected = tokens_of(tiny_engine().generate("the", GREEDY))
    with pytest.raises(ConfigError, match="no profile is being written"):
        engine.stop_profiling()

    engine.start_profiling(tmp_path / "told")
    with pytest.raises(ConfigError, match="stop_profiling"):
        engine.start_profiling(tmp_path / "another")
    assert tokens_of(engine.generate("the", GREEDY)) == expected
    assert traces(tmp_path / "told") == []
    assert engine.stop_profiling() == tmp_path / "told"
    assert len(traces(tmp_path / "told")) == 1

    engine.start_profiling(tmp_path / "steps", num_steps=3)
    (output,) = engine.generate("the", GREEDY)
    assert tokens_of([output]) == expected
    assert len(traces(tmp_path / "steps")) == 1, "it ended by itself"
    assert engine.stop_profiling() == tmp_path / "steps"
    assert engine.request_output(output.request_id) == output, "outputs are kept all the while"


def test_a_profile_that_cannot_be_is_refused(tmp_path: Path):
    engine = tiny_engine()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="no profile can be written"):
        engine.start_profiling(tmp_path / "file")
    with pytest.raises(ConfigError, match="num_steps is 0"):
        engine.start_profiling(tmp_path / "folder", num_steps=0)
    engine.start_profiling(tmp_path / "folder")
    engine.stop_profiling()
