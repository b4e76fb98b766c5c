"""The settings of a job: one frozen value, made once from the composed configuration, passed to who needs it.

Each section is a dataclass beside its owner; the YAML under `conf/` holds values only. (The dataclasses are
not given to OmegaConf as schemas: frozen ones become read-only there and their types cannot be said to it.
The check is `typed_config`'s, and a test holds the YAML's keys to the dataclasses'.)

What may change between two starts on the same output is said here and nowhere else: `HARMLESS`. All the rest
is part of the fingerprint. Engine settings that never change a token by law (page size, batch sizes) stay in
it, because they may change the last bit of a logit on some backends; so does speculation, where it is on.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from engine.chips import find_slice
from engine.config import EngineConfig
from engine.errors import ConfigError, RequestError
from engine.platforms import profile_of
from engine.sampling_params import INTERACTIVE_FIELDS, SamplingParams
from pipeline.monitoring import MonitoringSettings
from pipeline.parquet_files import MAX_GROUP_ROWS
from pipeline.preemption import PreemptionSettings
from pipeline.progress import ProgressStyle
from pipeline.prompts import PromptSettings
from pipeline.request_cache import CacheSettings
from pipeline.shard_order import WorkerSettings
from pipeline.shards import InputSettings
from pipeline.typed_config import build, known_keys, unknown_key

Mode = Literal["run", "plan", "verify", "repair", "explain", "gc"]

# Named by the design and not built yet: said so, rather than "did you mean".
FUTURE_MODES = ("report",)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """source: the embedded model's name, a .gguf file, a Hugging Face folder, an fsspec URL or a hub id.
    revision: the commit a hub id is pinned to.
    """

    source: str
    revision: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputSettings:
    """path: a local folder, or one of a bucket (s3://, gs://); only mode=plan can do without. format: of
    data/ alone; "openai_batch" makes it OpenAI's output file, with an error file in errors/. created: the
    time that its answers bear, in Unix seconds; None is when the run was planned. chunk_rows: rows committed
    together. include_token_ids: keep the generated token ids.
    row_group_rows: the most rows of a row group of the final Parquet files; one also ends at 32 MiB.
    spool_dir: a local folder for what is not published yet; None is the system's temporary folder.
    max_requests_per_second: to the store, by each worker; None does not limit them.
    unsafe_single_writer: use a store that overwrites what should be created once; never start a second
    process on such an output.
    """

    path: str | None = None
    format: Literal["parquet", "jsonl", "openai_batch"] = "parquet"
    created: int | None = None
    chunk_rows: int = 64
    include_token_ids: bool = False
    row_group_rows: int = MAX_GROUP_ROWS
    spool_dir: str | None = None
    max_requests_per_second: float | None = None
    unsafe_single_writer: bool = False

    def __post_init__(self) -> None:
        _in_range("output.chunk_rows", self.chunk_rows, 1, 1_000_000)
        _in_range("output.row_group_rows", self.row_group_rows, 1, 1_000_000)
        if self.max_requests_per_second is not None:
            _in_range("output.max_requests_per_second", self.max_requests_per_second, 0.1, 100_000.0)
        if self.created is not None:
            if self.format != "openai_batch":
                raise ConfigError("output.created is for output.format=openai_batch; remove it")
            _in_range("output.created", self.created, 0, 2**40)
        if self.path == "":
            raise ConfigError("output.path is empty: name the folder for the results")


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumeSettings:
    """on_change: what to do when the output was begun with other settings or input: refuse, or fork (begin
    anew in a folder of its own inside the output).
    """

    on_change: Literal["refuse", "fork"] = "refuse"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSettings:
    """json: also write the plan as JSON to this file; "-" prints it in the place of the report. measure: run
    a short warm-up to estimate the time. topology: plan for these chips too, wherever the plan is made: v4-8,
    v5e-1, h100-8, ... compile: which of their steps, where the compiler is installed. price_per_chip_hour:
    for the cost, in any currency. roofline_share: of the speed that the chips' peaks allow, what steps reach;
    1 gives the least time there can be.
    """

    json: str | None = None
    measure: bool = True
    topology: str | None = None
    compile: Literal["all", "largest", "none"] = "all"
    price_per_chip_hour: float | None = None
    roofline_share: float = 1.0

    def __post_init__(self) -> None:
        if self.topology is not None:
            find_slice(self.topology)
        if self.price_per_chip_hour is not None:
            _in_range("plan.price_per_chip_hour", self.price_per_chip_hour, 0.0, 1e9)
        _in_range("plan.roofline_share", self.roofline_share, 0.01, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class GcSettings:
    """remove: what was found, instead of only listing it. min_age_hours: what is younger may be in use."""

    remove: bool = False
    min_age_hours: float = 24.0

    def __post_init__(self) -> None:
        _in_range("gc.min_age_hours", self.min_age_hours, 0.0, 1_000_000.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditSettings:
    """What mode=verify and mode=gc need to be told: which output, and nothing of how it was made."""

    output: OutputSettings
    gc: GcSettings = field(default_factory=GcSettings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything a job is told. Lengths are in tokens, times in seconds."""

    model: ModelSettings
    input: InputSettings
    output: OutputSettings = field(default_factory=OutputSettings)
    prompt: PromptSettings = field(default_factory=PromptSettings)
    sampling: SamplingParams = field(default_factory=SamplingParams)
    engine: EngineConfig = field(default_factory=EngineConfig)
    mode: Mode = "run"
    max_reject_fraction: float = 0.1
    drain_seconds: float = 10.0
    step_timeout_s: float = 600.0
    progress: ProgressStyle = "auto"
    progress_line_seconds: float = 30.0
    resume: ResumeSettings = field(default_factory=ResumeSettings)
    worker: WorkerSettings = field(default_factory=WorkerSettings)
    plan: PlanSettings = field(default_factory=PlanSettings)
    gc: GcSettings = field(default_factory=GcSettings)
    preemption: PreemptionSettings = field(default_factory=PreemptionSettings)
    monitoring: MonitoringSettings = field(default_factory=MonitoringSettings)
    cache: CacheSettings = field(default_factory=CacheSettings)

    def __post_init__(self) -> None:
        _in_range("max_reject_fraction", self.max_reject_fraction, 0.0, 1.0)
        _in_range("drain_seconds", self.drain_seconds, 0.0, 86_400.0)
        _in_range("step_timeout_s", self.step_timeout_s, 0.1, 86_400.0)
        _in_range("progress_line_seconds", self.progress_line_seconds, 0.1, 86_400.0)
        if self.monitoring.console and self.progress == "bar":
            raise ConfigError(
                "monitoring.console=true and progress=bar would write over each other: leave progress=auto, "
                "and the console takes its place"
            )
        if self.output.path is None and self.mode != "plan":
            raise ConfigError("output.path is missing: name the folder for the results, output.path=…")
        self._check_batch()
        if self.plan.topology is not None and self.engine.chip is not None:
            chip = find_slice(self.plan.topology).chip.name
            if chip != self.engine.chip:
                raise ConfigError(
                    f"plan.topology={self.plan.topology} is of another chip than "
                    f"engine.chip={self.engine.chip}: choose conf={profile_of(chip)}, or another topology"
                )
        if self.engine.max_model_len is not None and self.sampling.max_tokens >= self.engine.max_model_len:
            raise ConfigError(
                f"sampling.max_tokens={self.sampling.max_tokens} leaves no room for a prompt in "
                f"engine.max_model_len={self.engine.max_model_len}: lower the first or raise the second"
            )

    def _check_batch(self) -> None:
        is_batch = self.input.format == "openai_batch"
        if self.output.format == "openai_batch" and not is_batch:
            raise ConfigError("output.format=openai_batch answers batch files; set input.format=openai_batch")
        usual = PromptSettings(max_prompt_chars=self.prompt.max_prompt_chars)
        if is_batch and self.prompt != usual:
            changed = [f.name for f in dataclasses.fields(usual)]
            changed = [name for name in changed if getattr(self.prompt, name) != getattr(usual, name)]
            raise ConfigError(
                f"prompt.{changed[0]} has no meaning for batch files, which say it themselves; remove it"
            )


# Dotted keys that cannot change what is in data/: they say where, how patiently and with how much memory.
# The content of `input.path`, `model.source` and the templates is in the fingerprint under a name of its own.
HARMLESS = frozenset(
    {
        "mode",
        "max_reject_fraction",
        "drain_seconds",
        "step_timeout_s",
        "progress",
        "progress_line_seconds",
        "resume.on_change",
        "worker.index",
        "worker.count",
        "plan.json",
        "plan.measure",
        "plan.topology",
        "plan.compile",
        "plan.price_per_chip_hour",
        "plan.roofline_share",
        "gc.remove",
        "gc.min_age_hours",
        "cache.path",
        "preemption.notice",
        "preemption.file",
        "preemption.metadata_url",
        "preemption.poll_seconds",
        "monitoring.prometheus_port",
        "monitoring.dashboard_port",
        "monitoring.host",
        "monitoring.console",
        "monitoring.traces",
        "input.path",
        "input.order",
        "model.source",
        "model.revision",
        "output.path",
        "output.spool_dir",
        "output.max_requests_per_second",
        "output.unsafe_single_writer",
        "prompt.template",
        "prompt.template_file",
        "prompt.system_template",
        "engine.hbm_utilization",
        "engine.kv_cache_bytes",
        "engine.async_scheduling",
        "engine.compilation_cache_dir",
        "engine.compiled_steps_path",
        "engine.compiled_steps_trusted",
        "engine.platform",
        "engine.coordinator_address",
        "engine.num_processes",
        "engine.process_id",
        "engine.chip",
        "engine.use_aot_forward",
        "engine.compile_runner",
        "engine.runner_verbose",
    }
)

# Keys that outputs were begun without: at these values they are as those outputs were, and left out.
_LATER_DEFAULTS = {"engine.prefix_cache_capacity": None, "engine.min_input_pad": None}

KNOWN_KEYS = known_keys(Settings)


def from_config(values: Mapping[str, Any]) -> Settings:
    """Settings from a composed configuration (plain values). ConfigError, on one line, for what is wrong."""
    values = _without_missing(values)
    mode = values.get("mode")
    if mode in FUTURE_MODES:
        raise ConfigError(f"mode={mode} is not built yet: choose run, plan, verify, repair, explain or gc")
    sampling = values.get("sampling", {})
    if isinstance(sampling, Mapping):
        values["sampling"] = _sampling(sampling)
    return build(Settings, values)


def audit_settings(values: Mapping[str, Any]) -> AuditSettings:
    """The part of a composed configuration that is about an output as it stands. Raises ConfigError."""
    values = _without_missing(values)
    audit = build(AuditSettings, {key: values[key] for key in ("output", "gc") if key in values})
    if audit.output.path is None:
        raise ConfigError("output.path is missing: name the folder to look at, output.path=…")
    return audit


def _sampling(values: Mapping[str, Any]) -> SamplingParams:
    # Through its own constructor, which normalises and names each value's range. An absent bias is null in
    # YAML, because an empty mapping there would refuse new keys on the command line.
    values = {key: value for key, value in values.items() if not (key == "logit_bias" and value is None)}
    names = {each.name for each in dataclasses.fields(SamplingParams)} - INTERACTIVE_FIELDS.keys()
    for key in values:
        if key in INTERACTIVE_FIELDS:
            raise ConfigError(f"sampling.{key} is for callers of the engine: a job {INTERACTIVE_FIELDS[key]}")
        if key not in names:
            raise unknown_key(f"sampling.{key}", [f"sampling.{name}" for name in sorted(names)])
    try:
        return SamplingParams.from_dict(values)
    except RequestError as error:
        raise ConfigError(str(error)) from error


def _without_missing(values: Mapping[str, Any]) -> dict[str, Any]:
    """Drop what is still `???`, so that it is reported as missing under its name."""
    return {
        key: _without_missing(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if value != "???"
    }


def as_config(settings: Settings) -> dict[str, Any]:
    """All settings as JSON values, for job.json and the reader."""
    return dataclasses.asdict(settings)


def result_part(settings: Settings) -> dict[str, Any]:
    """The settings that the results depend on, by dotted key: the `config` part of the run's fingerprint.

    Sampling is left out, it has a part of its own.
    """
    flat = _flatten(as_config(settings))
    if settings.engine.speculation == "off":  # as it was before there was any
        del flat["engine.speculation"], flat["engine.max_draft_len"]
    return {key: flat[key] for key in sorted(flat) if _decides_results(key, flat[key])}


def _decides_results(key: str, value: Any) -> bool:
    if key in HARMLESS or key.startswith("sampling."):
        return False
    return key not in _LATER_DEFAULTS or value != _LATER_DEFAULTS[key]


def _flatten(values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{where}.{key}" if where else key
        flat.update(_flatten(value, name) if isinstance(value, Mapping) else {name: value})
    return flat


def _in_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high or math.isnan(value):
        raise ConfigError(f"{name}={value:g}: must be from {low:g} to {high:g}")
