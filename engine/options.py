"""What `Engine(...)` takes, by the names that eSurge gave them, read once into two frozen values.

    EngineConfig     what runs the model: sizes, memory, kernels, scheduling; the batch job has the same
    RequestOptions   what is done to each request before it is queued, and kept of it afterwards

Where eSurge's default would change a prompt or an answer without a word, ours leaves it alone: prompts are
cut only where `truncate_mode` or `auto_truncate_prompt` asks for it, and nothing is reserved by itself.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np

from engine.config import EngineConfig
from engine.errors import ConfigError, RequestError
from engine.sampling_params import SamplingParams

TruncateMode = Literal["left", "right", "middle"]
SamplingCallback = Callable[[SamplingParams, Mapping[str, Any]], SamplingParams | None]
"""(a request's sampling; its `request_id`, `prompt`, `prompt_token_ids`) -> what it runs with; None: that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Options of scheduling; None leaves an option as it is elsewhere. As in `EngineConfig`, but for
    `policy`, which is `scheduling_policy` there."""

    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    max_model_len: int | None = None
    policy: str | None = None
    long_prefill_token_threshold: int | None = None
    async_scheduling: bool | None = None
    overlap_execution: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """Options of the KV pages; None leaves an option as it is elsewhere. As in `EngineConfig`."""

    page_size: int | None = None
    hbm_utilization: float | None = None
    kv_cache_bytes: int | None = None
    kv_dtype: str | None = None
    enable_prefix_caching: bool | None = None
    prefix_cache_capacity: int | float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Both together."""

    scheduler_config: SchedulerConfig = SchedulerConfig()
    cache_config: CacheConfig = CacheConfig()


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOptions:
    """What an engine does with requests, beyond running them. Raises ConfigError naming the option.

    A prompt, its new tokens and `reserve_tokens` together are at most `max_model_len`. Where they are more:
    with `strict_context` the request is refused; else its new tokens are capped (`auto_cap_new_tokens`), then
    its prompt is cut (`auto_truncate_prompt`), the first of these first where `prefer_preserve_prompt` is
    set; what fits neither way is refused.
    """

    reserve_tokens: int = 0
    """Tokens of `max_model_len` that no request gets."""
    truncate_mode: TruncateMode | None = None
    """What a cut takes away: the beginning ("left", the default), the end, or the middle of a prompt."""
    auto_truncate_prompt: bool | None = None
    """Cut prompts that are too long; None: where there is a `truncate_mode`."""
    auto_cap_new_tokens: bool = True
    """Let a request that asks for more new tokens than there is room for have fewer; False: refuse it."""
    strict_context: bool = False
    prefer_preserve_prompt: bool = True
    decode_truncated_prompt: bool = True
    """`RequestOutput.prompt` of a cut prompt is the text of what was kept; False: as it was given."""
    sampling_params_callback: SamplingCallback | None = None
    extra_eos_token_ids: tuple[int, ...] = ()
    """These end every request, as the model's own end-of-sequence tokens do."""
    extra_stops: tuple[str, ...] = ()
    """Stop strings of every request, beyond its own."""
    tool_parser: str | None = None
    """Finds tool calls in completions (`engine.parsers.TOOL_PARSERS`); "auto": that of the model's family."""
    reasoning_parser: str | None = None
    ignore_stop_strings_in_reasoning: bool = True
    """With a reasoning parser: a stop string inside the reasoning does not stop."""
    esurge_name: str | None = None
    """Of this engine, in its log and as a server's model; None: the model's name."""
    silent_mode: bool = False
    """Nothing of this engine is logged."""
    sampler_metrics: bool = False
    """Keep count of the log-probabilities of the tokens drawn (`Engine.sampler_stats`)."""
    max_request_outputs: int = 0
    """So many finished outputs, the last ones, are kept for `Engine.request_output`."""
    idle_reset_seconds: float | None = None
    """After so long without an unfinished request, cached prefixes are forgotten when the next one comes."""
    destroy_pages_on_pause: bool = True
    """A pause gives the memory of the KV pages back to the device; False: it is kept."""

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "extra_eos_token_ids", tuple(self.extra_eos_token_ids))
        stops = self.extra_stops
        put(self, "extra_stops", (stops,) if isinstance(stops, str) else tuple(stops))
        for name in ("reserve_tokens", "max_request_outputs"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 0:
                raise ConfigError(f"engine.{name}={getattr(self, name)!r}: give a whole number, 0 or more")
        if self.truncate_mode not in (None, "left", "right", "middle"):
            raise ConfigError(f"engine.truncate_mode={self.truncate_mode!r}: choose left, right or middle")
        for name, hint in RequestOptions.__annotations__.items():
            if hint.startswith("bool") and not isinstance(getattr(self, name), bool):
                if name == "auto_truncate_prompt" and self.auto_truncate_prompt is None:
                    continue
                raise ConfigError(f"engine.{name}={getattr(self, name)!r}: give true or false")
        seconds = self.idle_reset_seconds
        if seconds is not None and not (isinstance(seconds, (int, float)) and 0 <= seconds < math.inf):
            raise ConfigError(f"engine.idle_reset_seconds={seconds!r}: give seconds, 0 or more, or None")
        if self.sampling_params_callback is not None and not callable(self.sampling_params_callback):
            raise ConfigError("engine.sampling_params_callback must be a function of a request's sampling")
        if self.esurge_name is not None and (not isinstance(self.esurge_name, str) or not self.esurge_name):
            raise ConfigError(f"engine.esurge_name={self.esurge_name!r}: give a name, or None")
        if self.strict_context and self.auto_truncate_prompt:
            raise ConfigError(
                "engine.strict_context refuses what engine.auto_truncate_prompt would cut: leave one out"
            )
        try:  # what no request could ask for cannot be asked for all of them either
            SamplingParams(stop=self.extra_stops, stop_token_ids=self.extra_eos_token_ids)
        except RequestError as error:
            raise ConfigError(f"engine.extra_stops or engine.extra_eos_token_ids: {error}") from error

    @property
    def truncates(self) -> bool:
        if self.auto_truncate_prompt is None:
            return self.truncate_mode is not None and not self.strict_context
        return self.auto_truncate_prompt


@dataclass(frozen=True, slots=True)
class Options:
    """All that an engine was told."""

    config: EngineConfig
    requests: RequestOptions
    names: frozenset[str]
    """The options that were given, by their names in `EngineConfig` and `RequestOptions`."""


_CONFIG_FIELDS = {field.name: field for field in fields(EngineConfig)}
_REQUEST_FIELDS = {field.name: field for field in fields(RequestOptions)}
_TRANSLATED = ("overlap_execution", "data_parallelism_axis", "auto_shard_model")
OPTION_NAMES = (*_CONFIG_FIELDS, *_REQUEST_FIELDS, *_TRANSLATED)
"""All that `Engine` takes by keyword beyond the model, the tokenizer and configuration objects."""


def read_options(
    config: EngineConfig | Config | None,
    cache_config: CacheConfig | None,
    scheduler_config: SchedulerConfig | None,
    options: Mapping[str, Any],
) -> Options:
    """The options of an engine; one that is None is not given.

    Raises ConfigError for an unknown name, with the nearest one, and for an option that two of the arguments
    give differently.
    """
    for name in options:
        if name not in OPTION_NAMES:
            raise unknown_option(name)
    given: dict[str, Any] = {}
    sources: list[tuple[str, Mapping[str, Any]]] = [("a keyword", options)]
    base = EngineConfig()
    if isinstance(config, Config):
        sources += [("config", _said(config.cache_config)), ("config", _said(config.scheduler_config))]
    elif config is not None:
        base = config
    sources += [("cache_config", _said(cache_config)), ("scheduler_config", _said(scheduler_config))]
    for where, values in sources:
        for name, value in values.items():
            if name in given and given[name] != value:
                raise ConfigError(f"engine.{name} is {given[name]!r}, and {value!r} by {where}: give it once")
            given[name] = value
    given = {name: value for name, value in given.items() if value is not None}
    overlaps = given.pop("overlap_execution", True)
    if not isinstance(overlaps, bool):
        raise ConfigError(f"engine.overlap_execution={overlaps!r}: give true or false")
    if not overlaps:
        given["async_scheduling"] = False
    _place(given, base)
    if isinstance(given.get("dtype"), (type, np.dtype)):  # jnp.bfloat16
        given["dtype"] = np.dtype(given["dtype"]).name
    if "max_num_batched_tokens" not in given and isinstance(given.get("max_num_seqs"), int):
        given["max_num_batched_tokens"] = max(base.max_num_batched_tokens, given["max_num_seqs"])
    requests = RequestOptions(**{name: value for name, value in given.items() if name in _REQUEST_FIELDS})
    config = replace(base, **{name: value for name, value in given.items() if name in _CONFIG_FIELDS})
    if requests.silent_mode and config.runner_verbose:
        raise ConfigError(
            "engine.runner_verbose writes a log and engine.silent_mode keeps none: leave one out"
        )
    return Options(config, requests, frozenset(given))


def unknown_option(name: str) -> ConfigError:
    near = difflib.get_close_matches(name, OPTION_NAMES, n=1, cutoff=0.0)
    return ConfigError(f"the engine has no option {name!r}: the nearest name is {near[0]!r}")


def _said(values: CacheConfig | SchedulerConfig | None) -> dict[str, Any]:
    if values is None:
        return {}
    said = {field.name: getattr(values, field.name) for field in fields(values)}
    if "policy" in said:
        said["scheduling_policy"] = said.pop("policy")
    return {name: value for name, value in said.items() if value is not None}


def _place(given: dict[str, Any], base: EngineConfig) -> None:
    """Read eSurge's options of sharding as `sharding_axis_dims`."""
    axis, shards = given.pop("data_parallelism_axis", "dp"), given.pop("auto_shard_model", True)
    dims = given.get("sharding_axis_dims", base.sharding_axis_dims)
    if axis not in ("dp", "fsdp"):
        raise ConfigError(
            f"engine.data_parallelism_axis={axis!r}: choose dp, where each replica has all weights, or fsdp, "
            "where replicas share them"
        )
    if axis == "fsdp" and isinstance(dims, (tuple, list)) and len(dims) == 5:
        dp, fsdp, *rest = dims
        given["sharding_axis_dims"] = dims = (1, -1 if -1 in (dp, fsdp) else dp * fsdp, *rest)
    if not isinstance(shards, bool):
        raise ConfigError(f"engine.auto_shard_model={shards!r}: give true or false")
    if not shards:
        if "sharding_axis_dims" in given and any(size > 1 for size in dims):
            raise ConfigError(
                f"engine.auto_shard_model is false and engine.sharding_axis_dims={list(dims)} splits the "
                "model: leave one of them out"
            )
        given["sharding_axis_dims"] = (1, 1, 1, 1, 1)
