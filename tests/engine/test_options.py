"""Options by eSurge's names: read into two values, none ignored, none unknown, none told twice."""

from __future__ import annotations

import re
from pathlib import Path

import jax.numpy as jnp
import pytest

from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import ConfigError
from engine.options import OPTION_NAMES, CacheConfig, Config, RequestOptions, SchedulerConfig, read_options

# The constructor's parameters in eSurge 0.3.0, and those of its reference page that its code lacks.
DOCUMENTED = (
    "model tokenizer dtype max_model_len min_input_pad min_token_pad max_num_seqs async_scheduling "
    "max_num_batched_tokens hbm_utilization page_size use_aot_forward enable_prefix_caching auto_shard_model "
    "sharding_axis_dims compile_runner runner_verbose overlap_execution sampler_metrics esurge_name "
    "data_parallelism_axis long_prefill_token_threshold reserve_tokens auto_truncate_prompt strict_context "
    "auto_cap_new_tokens truncate_mode prefer_preserve_prompt decode_truncated_prompt silent_mode "
    "destroy_pages_on_pause max_request_outputs idle_reset_seconds sampling_params_callback extra_stops "
    "extra_eos_token_ids tool_parser reasoning_parser ignore_stop_strings_in_reasoning cache_config "
    "prefix_cache_capacity scheduling_policy"
)


def read(**options):
    return read_options(None, None, None, options)


def test_every_documented_option_is_taken():
    parameters = set(Engine.__init__.__annotations__) | {"tokenizer"}
    assert set(DOCUMENTED.split()) <= {*OPTION_NAMES, *parameters}


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [("max_num_seq", "max_num_seqs"), ("pagesize", "page_size"), ("truncation_mode", "truncate_mode")],
)
def test_an_unknown_option_is_refused_with_the_nearest_name(wrong: str, nearest: str):
    with pytest.raises(ConfigError, match=f"no option '{wrong}': the nearest name is '{nearest}'"):
        read(**{wrong: 1})


def test_options_become_those_of_the_config_and_of_requests():
    told = read(max_num_seqs=4, page_size=16, reserve_tokens=3, truncate_mode="middle")
    assert told.config == EngineConfig(max_num_seqs=4, page_size=16)
    assert told.requests == RequestOptions(reserve_tokens=3, truncate_mode="middle")
    assert read().config == EngineConfig()
    assert read(max_model_len=None, min_token_pad=None, max_num_batched_tokens=None) == read()


def test_options_override_those_of_a_config():
    base = EngineConfig(max_num_seqs=4, page_size=16)
    told = read_options(base, None, None, {"page_size": 32})
    assert told.config == EngineConfig(max_num_seqs=4, page_size=32)


def test_configuration_objects_say_the_same_as_keywords():
    scheduler = SchedulerConfig(max_num_seqs=4, policy="priority", overlap_execution=False)
    cache = CacheConfig(page_size=16, enable_prefix_caching=True, prefix_cache_capacity=0.3)
    by_keyword = read(
        max_num_seqs=4,
        scheduling_policy="priority",
        async_scheduling=False,
        page_size=16,
        prefix_cache_capacity=0.3,
    )
    apart = read_options(None, cache, scheduler, {})
    together = read_options(Config(scheduler_config=scheduler, cache_config=cache), None, None, {})
    assert by_keyword.config == apart.config == together.config
    assert by_keyword.config.scheduling_policy == "priority"


def test_an_option_that_is_told_twice_must_be_told_alike():
    assert read_options(None, CacheConfig(page_size=16), None, {"page_size": 16}).config.page_size == 16
    with pytest.raises(ConfigError, match=r"engine\.page_size is 32, and 16 by cache_config"):
        read_options(None, CacheConfig(page_size=16), None, {"page_size": 32})
    with pytest.raises(ConfigError, match=r"engine\.max_num_seqs is 4, and 8 by scheduler_config"):
        read_options(
            Config(scheduler_config=SchedulerConfig(max_num_seqs=4)),
            None,
            SchedulerConfig(max_num_seqs=8),
            {},
        )


def test_steps_overlap_only_if_neither_option_says_no():
    assert read(async_scheduling=True, overlap_execution=True).config.async_scheduling
    assert not read(async_scheduling=True, overlap_execution=False).config.async_scheduling
    assert not read(async_scheduling=False, overlap_execution=True).config.async_scheduling


def test_the_budget_of_a_step_grows_with_the_sequences_unless_it_is_told():
    assert read(max_num_seqs=2048).config.max_num_batched_tokens == 2048
    assert read(max_num_seqs=8).config.max_num_batched_tokens == EngineConfig().max_num_batched_tokens
    with pytest.raises(ConfigError, match=r"at least engine\.max_num_seqs"):
        read(max_num_seqs=64, max_num_batched_tokens=32)


def test_a_dtype_may_be_what_jax_calls_it():
    assert read(dtype=jnp.bfloat16).config.dtype == read(dtype="bfloat16").config.dtype == "bfloat16"
    assert read(dtype=jnp.dtype("float32")).config.dtype == "float32"


def test_sharding_by_esurges_names():
    dims = {"sharding_axis_dims": (2, 1, 1, -1, 1)}
    assert read(**dims).config.sharding_axis_dims == (2, 1, 1, -1, 1)
    assert read(**dims, data_parallelism_axis="fsdp").config.sharding_axis_dims == (1, 2, 1, -1, 1)
    both = read(sharding_axis_dims=(2, 2, 1, 1, 1), data_parallelism_axis="fsdp")
    assert both.config.sharding_axis_dims == (1, 4, 1, 1, 1)
    rest = read(sharding_axis_dims=(-1, 2, 1, 1, 1), data_parallelism_axis="fsdp")
    assert rest.config.sharding_axis_dims == (1, -1, 1, 1, 1)
    assert read(auto_shard_model=False).config.sharding_axis_dims == (1, 1, 1, 1, 1)
    with pytest.raises(ConfigError, match="splits the model"):
        read(**dims, auto_shard_model=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reserve_tokens": -1}, "reserve_tokens=-1"),
        ({"max_request_outputs": 1.5}, "max_request_outputs"),
        ({"truncate_mode": "front"}, "left, right or middle"),
        ({"auto_truncate_prompt": "yes"}, "auto_truncate_prompt='yes'"),
        ({"strict_context": 1}, "strict_context=1"),
        ({"strict_context": True, "auto_truncate_prompt": True}, "leave one out"),
        ({"sampling_params_callback": "f"}, "must be a function"),
        ({"extra_stops": [""]}, "extra_stops"),
        ({"extra_eos_token_ids": [-1]}, "extra_eos_token_ids"),
        ({"esurge_name": ""}, "esurge_name=''"),
        ({"idle_reset_seconds": -1.0}, "idle_reset_seconds=-1.0"),
        ({"silent_mode": True, "runner_verbose": True}, "leave one out"),
        ({"data_parallelism_axis": "tp"}, "choose dp"),
        ({"auto_shard_model": 0}, "auto_shard_model=0"),
        ({"overlap_execution": 0}, "overlap_execution=0"),
        ({"prefix_cache_capacity": 1.5}, "prefix_cache_capacity=1.5"),
        ({"prefix_cache_capacity": -1}, "prefix_cache_capacity=-1"),
        ({"prefix_cache_capacity": True}, "prefix_cache_capacity=True"),
        ({"min_input_pad": 12}, "min_input_pad=12"),
        ({"compile_runner": "no"}, "compile_runner='no'"),
        ({"use_aot_forward": False, "compiled_steps_path": "/tmp/steps"}, "leave one of them out"),
    ],
    ids=lambda part: str(part)[:40],
)
def test_values_that_cannot_be_are_refused(options, message: str):
    with pytest.raises(ConfigError) as caught:
        read(**options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_prompts_are_cut_only_where_somebody_asked_for_it():
    assert not RequestOptions().truncates
    assert RequestOptions(truncate_mode="left").truncates
    assert RequestOptions(auto_truncate_prompt=True).truncates
    assert not RequestOptions(truncate_mode="left", auto_truncate_prompt=False).truncates
    assert not RequestOptions(truncate_mode="left", strict_context=True).truncates


def test_every_option_is_in_a_test(repository: Path):
    text = "".join(path.read_text() for path in (repository / "tests").rglob("test_*.py"))
    missing = [name for name in OPTION_NAMES if not re.search(rf"\b{name}\b\W+\S", text)]
    assert not missing
