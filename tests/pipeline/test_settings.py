"""A configuration is turned into Settings, or refused on one line that names the place and the nearest."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.sampling_params import INTERACTIVE_FIELDS, SamplingParams
from pipeline.compose import compose, groups
from pipeline.exit_codes import help_lines
from pipeline.prompts import PromptSettings
from pipeline.run import main
from pipeline.settings import (
    HARMLESS,
    KNOWN_KEYS,
    ModelSettings,
    OutputSettings,
    Settings,
    from_config,
    result_part,
)
from pipeline.shards import InputSettings

PATHS = ["input.path=in", "output.path=out"]


def settings_of(*arguments: str) -> Settings:
    config = compose([*PATHS, *arguments], KNOWN_KEYS)
    assert config is not None
    return from_config(config)


@pytest.mark.parametrize(
    "choice", [f"{group}={option}" for group, options in groups().items() for option in options]
)
def test_every_shipped_option_composes(choice: str) -> None:
    assert settings_of(choice).input.path == "in"


@pytest.mark.parametrize(
    ("file", "owner"),
    [
        ("engine/default", EngineConfig),
        ("input/files", InputSettings),
        ("prompt/default", PromptSettings),
        ("output/default", OutputSettings),
        ("sampling/default", SamplingParams),
        ("model/smollm2", ModelSettings),
    ],
)
def test_the_shown_values_are_the_dataclass_defaults(repository: Path, file: str, owner: type) -> None:
    shown = yaml.safe_load((repository / "conf" / f"{file}.yaml").read_text())
    fields = {field.name: field for field in dataclasses.fields(owner)}
    for name in INTERACTIVE_FIELDS if owner is SamplingParams else ():
        del fields[name]
    assert sorted(shown) == sorted(fields)
    for name, value in shown.items():
        default = fields[name].default
        if (
            value == "???"
            or default is dataclasses.MISSING
            or (file, name) == ("sampling/default", "max_tokens")
        ):
            continue
        assert (tuple(value) if isinstance(value, list) else value or default) == (
            default or value or default
        ), name


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["engine.page_sizee=3"],
            "unknown configuration key 'engine.page_sizee': did you mean 'engine.page_size'?",
        ),
        (["+engine.page_sizee=3"], "did you mean 'engine.page_size'?"),
        (["engin.page_size=3"], "did you mean 'engine.page_size'?"),
        (["modell=smollm2"], "did you mean 'model'?"),
        (["model=smollm"], "no option 'smollm' in group 'model': did you mean 'smollm2'?"),
        (["model=/a/model.gguf"], "write model.source=/a/model.gguf"),
        (["conf=tpuv4"], "did you mean 'tpu_v4'?"),
        (["engine=3"], "no option '3' in group 'engine'"),
        (["engine.page_size=-4"], "engine.page_size=-4: give a"),
        (["input.path=a,b"], "write lists as key=[a,b]"),
        (["input.path=[a"], "cannot read 'input.path=[a'"),
        (["input.path=a=b"], "quote values with special characters"),
        (["run"], "'run' is not an override"),
        (["--fast"], "unrecognized arguments: --fast"),
        (["--multirun"], "--multirun is not supported"),
        (["~model"], "model is missing"),
    ],
)
def test_a_bad_command_line_is_refused_on_one_line(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*PATHS, *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("tidemill: error: ")
    assert shown.err.count("\n") == 1
    assert expected in shown.err
    assert list(tmp_path.iterdir()) == []


def with_value(config: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    section, _, name = key.rpartition(".")
    return {**config, section: {**config[section], name: value}} if section else {**config, key: value}


@pytest.fixture(scope="module")
def composed() -> dict[str, Any]:
    config = compose(PATHS, KNOWN_KEYS)
    assert config is not None
    return config


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("mod", "run", "did you mean 'mode'?"),
        ("sampling.temprature", 0, "did you mean 'sampling.temperature'?"),
        ("engine.page_size", "big", "engine.page_size='big': expected an integer, got text"),
        ("engine.page_size", None, "engine.page_size=null: expected an integer, got null"),
        ("engine.page_size", 1.5, "expected an integer, got a number"),
        ("engine.page_size", True, "expected an integer, got true or false"),
        ("engine.page_size", 48, "engine.page_size=48: give a power of two from 8 to 512"),
        ("engine.max_num_seqs", 0, "engine.max_num_seqs=0"),
        ("engine.dtype", "float8", "engine.dtype='float8': choose one of float32, bfloat16"),
        ("engine", 3, "engine=3: expected a mapping, got an integer"),
        ("engine.max_model_len", 256, "sampling.max_tokens=256 leaves no room for a prompt"),
        ("output.format", "csv", "output.format='csv'"),
        ("output.chunk_rows", 0, "output.chunk_rows=0: must be from 1"),
        ("output.path", 3, "output.path=3: expected text or null, got an integer"),
        ("max_reject_fraction", 1.5, "max_reject_fraction=1.5: must be from 0 to 1"),
        ("max_reject_fraction", float("nan"), "max_reject_fraction=nan: must be from 0 to 1"),
        ("drain_seconds", -1, "drain_seconds=-1: must be from 0"),
        ("sampling.top_p", 2, "sampling.top_p is 2"),
        ("sampling.n", [1], "sampling.n is [1]"),
        ("input.format", "csv", "input.format='csv'"),
        ("input.max_line_bytes", 0, "input.max_line_bytes=0"),
        ("input.carry_columns", "id", "input.carry_columns='id': expected a list"),
        ("input.carry_columns", ["a", 1], "input.carry_columns=['a', 1]: expected a list of text"),
        ("prompt.over_long", "cut", "prompt.over_long='cut'"),
        ("resume.on_change", "merge", "resume.on_change='merge'"),
        ("mode", "plann", "mode='plann': did you mean 'plan'?"),
        ("mode", "report", "mode=report is not built yet: choose run, plan, verify,"),
        ("output.max_requests_per_second", 0, "output.max_requests_per_second=0: must be from 0.1"),
        ("output.row_group_rows", 0, "output.row_group_rows=0: must be from 1"),
        ("gc.min_age_hours", -1, "gc.min_age_hours=-1: must be from 0"),
    ],
)
def test_a_bad_value_is_refused_on_one_line(
    composed: dict[str, Any], key: str, value: Any, expected: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        from_config(with_value(composed, key, value))
    assert expected in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("missing", "given"), [("input.path", PATHS[1]), ("output.path", PATHS[0])])
def test_a_missing_path_is_named(missing: str, given: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([given]) == 2
    assert f"{missing} is missing" in capsys.readouterr().err


def test_values_reach_their_settings() -> None:
    settings = settings_of(
        "model.source=/a/b.gguf",
        "input.path=[a.jsonl,'s3://b/year=2024/*.parquet']",
        "input.carry_columns=[x,y]",
        "sampling.logit_bias={5: 1.5, 7: -100}",
        "sampling.stop=['\\n\\n']",
        "sampling=balanced",
        "engine.hbm_utilization=1",
        "prompt.template='{{ a }}, {{ b }}'",
    )
    assert settings.model.source == "/a/b.gguf"
    assert settings.input.paths == ("a.jsonl", "s3://b/year=2024/*.parquet")
    assert settings.input.carry_columns == ("x", "y")
    assert settings.sampling.logit_bias == ((5, 1.5), (7, -100.0))
    assert settings.sampling.temperature == 0.7
    assert settings.engine.hbm_utilization == 1.0
    assert settings.prompt.template == "{{ a }}, {{ b }}"


def test_mode_plan_needs_no_output() -> None:
    config = compose(["input.path=in", "mode=plan"], KNOWN_KEYS)
    assert config is not None
    assert from_config(config).output.path is None


def test_the_hardware_profile_sets_the_engine_and_the_command_line_wins() -> None:
    engine = settings_of("conf=tpu_v4", "engine.max_num_seqs=8").engine
    assert (engine.platform, engine.dtype, engine.max_num_seqs) == ("tpu", "bfloat16", 8)
    assert settings_of().engine.platform == "cpu"


def test_printing_a_configuration_runs_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["conf=tpu_v4", "--cfg", "job"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["engine"]["platform"] == "tpu"
    assert list(tmp_path.iterdir()) == []


def test_help_says_what_exit_codes_mean_and_which_groups_there_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    for line in help_lines():
        assert line.strip() in shown
    for group, options in groups().items():
        assert f"{group}: {', '.join(options)}" in shown


def test_the_harmless_keys_exist_and_leave_the_fingerprint_alone(composed: dict[str, Any]) -> None:
    assert HARMLESS.issubset(KNOWN_KEYS)
    plain = result_part(from_config(composed))
    assert not HARMLESS & set(plain)
    changed = composed
    for key, value in {
        "output.path": "elsewhere",
        "output.spool_dir": "spool",
        "max_reject_fraction": 1.0,
        "drain_seconds": 1,
        "progress": "off",
        "resume.on_change": "fork",
        "engine.kv_cache_bytes": 1_000_000,
        "engine.async_scheduling": False,
        "engine.hbm_utilization": 0.5,
    }.items():
        changed = with_value(changed, key, value)
    assert changed != composed
    assert result_part(from_config(changed)) == plain


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("engine.seed", 1),
        ("engine.dtype", "bfloat16"),
        ("engine.page_size", 32),
        ("output.chunk_rows", 5),
        ("prompt.chat", True),
    ],
)
def test_what_may_change_results_changes_the_fingerprint(
    composed: dict[str, Any], key: str, value: Any
) -> None:
    changed = from_config(with_value(composed, key, value))
    assert result_part(changed) != result_part(from_config(composed))


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings_of().mode = "plan"  # type: ignore[misc]


def test_the_command_answers_from_any_folder_without_making_any(repository: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipeline.run", *PATHS, "engine.page_sizee=3"]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(repository)}, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "did you mean 'engine.page_size'?" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_config_error_keeps_its_kind() -> None:
    with pytest.raises(ConfigError, match=r"^input\.path"):
        from_config({"model": {"source": "x"}, "input": {"path": []}, "output": {"path": "o"}})


@pytest.mark.parametrize("name", sorted(INTERACTIVE_FIELDS))
def test_what_only_a_caller_can_ask_for_is_refused_by_name(composed: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=f"sampling.{name} is for callers of the engine: a job "):
        from_config(with_value(composed, f"sampling.{name}", 1))


def test_settings_that_came_later_leave_outputs_that_were_begun_without_them(
    composed: dict[str, Any],
) -> None:
    plain = from_config(composed)
    assert not {"engine.prefix_cache_capacity", "engine.min_input_pad"} & set(result_part(plain))
    assert not {"stop_pattern", "detokenize", "best_of"} & set(plain.sampling.as_dict())
    changed = from_config(with_value(composed, "engine.prefix_cache_capacity", 0.3))
    assert result_part(changed)["engine.prefix_cache_capacity"] == 0.3
    assert changed.sampling.replace(stop_pattern="END").as_dict()["stop_pattern"] == "END"
