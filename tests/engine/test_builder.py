"""An engine built in steps or from YAML: the same options, data only, nothing unknown."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import pytest

import engine as ed
from engine.builder import EngineBuilder
from engine.errors import ConfigError
from engine.options import read_options

SMALL = {"max_model_len": 64, "max_num_seqs": 4, "max_num_batched_tokens": 16, "page_size": 16}


def built(folder: str) -> EngineBuilder:
    return (
        EngineBuilder()
        .set_model(folder)
        .set_dtype("float32")
        .set_sharding(axis_dims=(1, 1, 1, -1, 1))
        .set_esurge(**SMALL)
        .set_esurge(kv_cache_bytes=1 << 20, esurge_name="built", truncate_mode="left")
    )


def test_yaml_and_calls_build_the_same_engine(tiny_folder: Path, tmp_path: Path):
    builder = built(str(tiny_folder))
    path = tmp_path / "engine.yaml"
    text = builder.to_yaml(path)
    assert path.read_text() == text
    read = EngineBuilder.from_yaml(path)
    assert read.to_dict() == builder.to_dict()
    assert read.validate() == builder.validate()
    engine = read.set_esurge(compile_runner=False).build_esurge()
    assert engine.esurge_name == "built"
    assert (engine.config.max_num_seqs, engine.options.truncate_mode) == (4, "left")
    sampling = ed.SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    assert len(engine.generate("the", sampling_params=sampling)[0].outputs[0].token_ids) == 3


def test_sections_mean_what_the_engines_options_mean(tiny_folder: Path):
    told = EngineBuilder(
        {
            "model": {"name_or_path": str(tiny_folder), "revision": None},
            "loader": {"dtype": "bfloat16"},
            "sharding": {"axis_dims": [2, 1, 1, -1, 1], "data_parallelism_axis": "fsdp"},
            "esurge": SMALL,
        }
    ).validate()
    expected = read_options(
        None, None, None, {**SMALL, "dtype": "bfloat16", "sharding_axis_dims": (1, 2, 1, -1, 1)}
    )
    assert told.config == expected.config


def test_a_dtype_of_jax_becomes_a_name_in_yaml():
    text = (
        EngineBuilder("somewhere").set_dtype(jnp.bfloat16).set_sharding(axis_dims=(1, 1, 1, 1, 1)).to_yaml()
    )
    assert "dtype: bfloat16" in text
    assert "!!" not in text


def test_a_callback_is_taken_and_cannot_be_written():
    builder = EngineBuilder("somewhere").set_esurge(sampling_params_callback=lambda sampling, facts: None)
    assert builder.validate().requests.sampling_params_callback is not None
    with pytest.raises(ConfigError, match="cannot be written as YAML"):
        builder.to_yaml()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EngineBuilder().set_esurge(page_sizes=3), "esurge.page_sizes .* 'page_size'"),
        (lambda: EngineBuilder().set_model("m", revison="x"), "model.revison .* 'revision'"),
        (lambda: EngineBuilder({"esurg": {}}), "section 'esurg': the nearest name is 'esurge'"),
        (lambda: EngineBuilder({"esurge": [1]}), "esurge holds a list"),
        (lambda: EngineBuilder().validate(), "name_or_path is missing"),
        (lambda: EngineBuilder("").update({"model": {"name_or_path": 3}}).validate(), "give text"),
        (lambda: EngineBuilder("m").set_esurge(page_size=3).validate(), "page_size=3"),
        (lambda: EngineBuilder("m").set_dtype("float32").set_esurge(dtype="bfloat16").validate(), "differ"),
    ],
)
def test_what_cannot_be_is_refused(make, message: str):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("esurge: {_target_: os.system}", "esurge._target_"),
        ("model: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("model: {name_or_path: '${oc.env:HOME}'}", "nothing is interpolated"),
        ("model: {name_or_path: [a", "expected"),
        ("- a", "must be a mapping"),
    ],
)
def test_a_file_is_data_and_nothing_in_it_runs(tmp_path: Path, text: str, message: str):
    path = tmp_path / "engine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        EngineBuilder.from_yaml(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        EngineBuilder.from_yaml(tmp_path / "none.yaml")
