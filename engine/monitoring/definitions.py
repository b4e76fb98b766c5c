"""What is measured of an engine: names, kinds, units and help. The one place; MONITORING.md is made of it.

Names follow Prometheus' conventions (base units, `_total` for what only grows) and keep those that eSurge
documents, behind another prefix. `cache_pages_total` is such a name: it is a gauge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from engine.monitoring.histogram import HistogramCounts
from engine.outputs import EngineStats

PREFIX = "tidemill_"

Kind = Literal["counter", "gauge", "histogram", "info"]

# Seconds, from a token on an accelerator to a long answer on a CPU.
LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
REQUEST_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
STEP_BUCKETS = (
    0.0001,
    0.00025,
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    10.0,
)
TOKEN_BUCKETS = tuple(float(1 << power) for power in range(0, 18, 1))


@dataclass(frozen=True, slots=True)
class Definition:
    """One metric. `name` is without the prefix, as its samples are called (a histogram's get `_bucket`,
    `_sum` and `_count` behind it).
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ("engine",)
    buckets: tuple[float, ...] = ()

    @property
    def full_name(self) -> str:
        return PREFIX + self.name

    @property
    def sample_names(self) -> tuple[str, ...]:
        """What a query can ask for."""
        if self.kind == "histogram":
            return tuple(self.full_name + suffix for suffix in ("_bucket", "_sum", "_count"))
        return (self.full_name,)


class Sample(NamedTuple):
    """The value of a metric for one set of labels."""

    definition: Definition
    labels: tuple[str, ...]
    value: float | HistogramCounts


REQUESTS = Definition(
    "requests_total",
    "counter",
    "Requests that ended: completed (by a stop or its length), aborted, or timeout.",
    ("engine", "status"),
)
REQUESTS_RECEIVED = Definition("requests_received_total", "counter", "Requests that were queued.")
COMPLETIONS = Definition(
    "completions_total",
    "counter",
    "Samples of finished requests (n of them each) by how they ended.",
    ("engine", "finish_reason"),
)
REQUEST_DURATION = Definition(
    "request_duration_seconds",
    "histogram",
    "Seconds from a finished request's arrival to its last token.",
    buckets=REQUEST_BUCKETS,
)
REQUEST_QUEUE = Definition(
    "request_queue_seconds",
    "histogram",
    "Seconds from a finished request's arrival until it was first scheduled.",
    buckets=REQUEST_BUCKETS,
)
FIRST_TOKEN = Definition(
    "time_to_first_token_seconds",
    "histogram",
    "Seconds from a finished request's arrival to its first token.",
    buckets=LATENCY_BUCKETS,
)
INTER_TOKEN = Definition(
    "inter_token_latency_seconds",
    "histogram",
    "Seconds from one token of a finished request to the next: its mean, counted once for each.",
    buckets=LATENCY_BUCKETS,
)
REQUEST_PROMPT_TOKENS = Definition(
    "request_prompt_tokens", "histogram", "Prompt tokens of a finished request.", buckets=TOKEN_BUCKETS
)
REQUEST_GENERATED_TOKENS = Definition(
    "request_generated_tokens",
    "histogram",
    "Tokens of a finished request's samples together.",
    buckets=TOKEN_BUCKETS,
)
SCHEDULE_DURATION = Definition(
    "schedule_duration_seconds", "histogram", "Seconds to plan a step.", buckets=STEP_BUCKETS
)
EXECUTION_DURATION = Definition(
    "model_execution_duration_seconds",
    "histogram",
    "Seconds of a step from its dispatch, or the end of the step before it, until its results were back.",
    buckets=STEP_BUCKETS,
)
STEP_SEQUENCES = Definition(
    "step_sequences_total", "counter", "Sequences of all steps: over steps_total, the mean batch size."
)
BATCH_SIZE = Definition("batch_size", "gauge", "Sequences in the last step.")
SCHEDULED_TOKENS = Definition("scheduled_tokens", "gauge", "Tokens computed by the last step.")
TOKENS_PER_SECOND = Definition(
    "tokens_per_second", "gauge", "Tokens generated a second, over the last ten seconds."
)
CACHE_HIT_RATE = Definition(
    "cache_hit_rate",
    "gauge",
    "Share of all prompt tokens so far found in the prefix cache; of a window, the rates of "
    "prefix_cached_tokens_total and prompt_tokens_total.",
)
SYSTEM_INFO = Definition(
    "system_info",
    "info",
    "Always 1: what the engine is and runs on.",
    ("engine", "model", "device", "version", "jax_version", "python_version"),
)

# What an engine counts itself: read when somebody asks.
PULLED: tuple[tuple[Definition, Callable[[EngineStats], float]], ...] = (
    (
        Definition(
            "prompt_tokens_total", "counter", "Prompt tokens of queued requests, each sample's counted."
        ),
        lambda stats: stats.num_prompt_tokens,
    ),
    (
        Definition(
            "prefix_cached_tokens_total", "counter", "Those of them that were found in the prefix cache."
        ),
        lambda stats: stats.num_cached_tokens,
    ),
    (
        Definition("tokens_generated_total", "counter", "Tokens drawn for requests that had not ended."),
        lambda stats: stats.num_generated_tokens,
    ),
    (
        Definition("drafted_tokens_total", "counter", "Tokens guessed by speculation, right or not."),
        lambda stats: stats.num_drafted_tokens,
    ),
    (
        Definition("accepted_tokens_total", "counter", "Tokens guessed by speculation that were drawn."),
        lambda stats: stats.num_accepted_tokens,
    ),
    (
        Definition(
            "computed_tokens_total", "counter", "Tokens fed through the model, recomputed ones included."
        ),
        lambda stats: stats.num_computed_tokens,
    ),
    (
        Definition("padded_tokens_total", "counter", "Padding that was fed through with them."),
        lambda stats: stats.num_padded_tokens,
    ),
    (
        Definition(
            "preempted_requests_total",
            "counter",
            "Times that a sequence lost its pages and had to wait again.",
        ),
        lambda stats: stats.preemptions,
    ),
    (
        Definition("cache_evictions_total", "counter", "Pages of the prefix cache that were given up."),
        lambda stats: stats.evictions,
    ),
    (
        Definition(
            "duplicate_requests_total", "counter", "Requests that were given the result of an identical one."
        ),
        lambda stats: stats.num_duplicates,
    ),
    (
        Definition("steps_total", "counter", "Steps run."),
        lambda stats: stats.num_steps,
    ),
    (
        Definition("running_requests", "gauge", "Sequences that run; n of a request with n samples."),
        lambda stats: stats.running,
    ),
    (
        Definition("waiting_requests", "gauge", "Sequences that wait for a place or for pages."),
        lambda stats: stats.waiting,
    ),
    (
        Definition("cache_pages_total", "gauge", "KV pages there are, of all replicas."),
        lambda stats: stats.pages_free + stats.pages_cached + stats.pages_held,
    ),
    (
        Definition("cache_pages_used", "gauge", "KV pages held by requests."),
        lambda stats: stats.pages_held,
    ),
    (
        Definition("cache_pages_cached", "gauge", "KV pages that nobody holds, kept for prefixes to come."),
        lambda stats: stats.pages_cached,
    ),
    (
        Definition(
            "compile_seconds", "gauge", "Seconds of tracing, compiling or reading back steps at the start."
        ),
        lambda stats: stats.compile_seconds,
    ),
    (
        Definition("compiled_steps", "gauge", "Steps that had to be compiled at the start."),
        lambda stats: stats.num_compiled,
    ),
    (
        Definition("loaded_steps", "gauge", "Steps that were read whole from engine.compiled_steps_path."),
        lambda stats: stats.num_loaded,
    ),
)

OBSERVED = (
    REQUESTS,
    REQUESTS_RECEIVED,
    COMPLETIONS,
    REQUEST_DURATION,
    REQUEST_QUEUE,
    FIRST_TOKEN,
    INTER_TOKEN,
    REQUEST_PROMPT_TOKENS,
    REQUEST_GENERATED_TOKENS,
    SCHEDULE_DURATION,
    EXECUTION_DURATION,
    STEP_SEQUENCES,
    BATCH_SIZE,
    SCHEDULED_TOKENS,
    TOKENS_PER_SECOND,
    CACHE_HIT_RATE,
    SYSTEM_INFO,
)

# Of the process, whatever engines it has.
DEVICE_MEMORY_USED = Definition(
    "device_memory_used_bytes", "gauge", "Memory in use of a device that says so (no CPU does).", ("device",)
)
DEVICE_MEMORY_LIMIT = Definition(
    "device_memory_limit_bytes", "gauge", "Memory of it that may be used.", ("device",)
)
PROCESS = (
    DEVICE_MEMORY_USED,
    DEVICE_MEMORY_LIMIT,
    Definition("process_resident_memory_bytes", "gauge", "Resident memory of this process.", ()),
    Definition("process_virtual_memory_bytes", "gauge", "Virtual memory of this process.", ()),
    Definition("process_cpu_seconds_total", "counter", "CPU time of this process.", ()),
    Definition("process_start_time_seconds", "gauge", "Its start, in seconds since 1970.", ()),
    Definition("process_open_fds", "gauge", "File descriptors it has open.", ()),
    Definition("process_max_fds", "gauge", "File descriptors it may open.", ()),
)

ENGINE_METRICS: tuple[Definition, ...] = (*OBSERVED, *(definition for definition, _ in PULLED), *PROCESS)


def table(definitions: Sequence[Definition]) -> str:
    """A Markdown table of them, by name."""
    rows = [
        f"| `{each.full_name}` | {each.kind} | {_code(each.labels)} | {each.help} |"
        for each in sorted(definitions, key=lambda each: each.name)
    ]
    return "\n".join(["| name | kind | labels | what it says |", "|---|---|---|---|", *rows]) + "\n"


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
