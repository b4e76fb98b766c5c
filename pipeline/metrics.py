"""What a chunk counted and timed, how chunks add up to a shard, and the shard's metrics for people.

Two kinds of numbers meet here. What a row did (tokens, times, finish reason) is counted in the row's own
chunk. What the engine did as a whole (steps, evictions) belongs to no single row: it is counted in
the chunk that was the oldest open one while it happened. Every step is counted once, so sums over shards are
exact, but a shard that shares its steps with the next one keeps all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from pipeline.histogram import Histogram

if TYPE_CHECKING:
    from engine.outputs import RequestMetrics, RequestOutput
    from pipeline.hints import Template

METRICS_VERSION = 4

# Templates that a sum keeps and that a shard's metrics show, those first that save most.
MAX_TEMPLATES = 64
SHOWN_TEMPLATES = 10


@dataclass(slots=True)
class TemplateCounts:
    """Rows that share a beginning of `num_tokens` tokens; `text` is how they begin."""

    num_tokens: int
    text: str
    rows: int = 0
    prompt_tokens: int = 0
    achievable_tokens: int = 0
    cached_tokens: int = 0

    def merge(self, other: TemplateCounts) -> None:
        self.rows += other.rows
        self.prompt_tokens += other.prompt_tokens
        self.achievable_tokens += other.achievable_tokens
        self.cached_tokens += other.cached_tokens


@dataclass(slots=True)
class Metrics:
    """Counts and histograms of a chunk, a shard or a whole run; `merge` adds two of them exactly."""

    rows_in: int = 0
    rows_ok: int = 0
    rejected: dict[str, int] = field(default_factory=dict)  # reason -> rows
    samples: int = 0  # completions; n of them a row
    prompt_tokens: int = 0
    cached_tokens: int = 0  # prompt tokens found in the prefix cache
    # Those that a cache which forgets nothing would have held, counted in units of eight tokens, so that the
    # cached ones may be a little more; 0 for rows whose order was not planned.
    achievable_tokens: int = 0
    generated_tokens: int = 0
    finish_reasons: dict[str, int] = field(default_factory=dict)
    preempted_rows: int = 0
    templates: dict[str, TemplateCounts] = field(default_factory=dict)  # by the hash of their tokens
    # From when a request was handed to the engine: until first scheduled, until its first token.
    queue_seconds: Histogram = field(default_factory=Histogram)
    first_token_seconds: Histogram = field(default_factory=Histogram)
    token_seconds: Histogram = field(
        default_factory=Histogram
    )  # its mean between tokens, once for each token
    # From here on: of the engine as a whole, while this was the oldest open chunk.
    wall_seconds: float = 0.0
    compile_seconds: float = 0.0
    wait_seconds: float = 0.0  # the engine had nothing to do: reading and tokenising were behind
    num_steps: int = 0
    step_seconds: Histogram = field(default_factory=Histogram)
    occupancy: Histogram = field(default_factory=Histogram)  # rows in a step / max_num_seqs
    page_use: Histogram = field(default_factory=Histogram)  # pages held / all pages, once a step
    evictions: int = 0
    preemptions: int = 0
    computed_tokens: int = 0  # fed through the model, recomputed ones included
    cache_hits: int = 0  # rows whose result was in the request cache (cache.path)
    cache_stored: int = 0  # rows whose result was put there
    cache_damaged: int = 0  # its objects and rows that were passed over
    duplicates: int = 0  # requests that were given the result of an identical one
    padded_tokens: int = 0  # fed through with them, to fill a step's declared size
    drafted_tokens: int = 0  # guessed and looked at (engine.speculation)
    accepted_tokens: int = 0  # those of them that were drawn
    # Of steps with fewer than half of the sequences and nothing waiting: what the end of a run costs.
    tail_seconds: float = 0.0
    store_requests: dict[str, int] = field(default_factory=dict)  # kind -> sent while this chunk was made

    def reject(self, reason: str) -> None:
        """Count one rejected row."""
        self.rows_in += 1
        self.rejected[reason] = self.rejected.get(reason, 0) + 1

    def count_requests(self, counts: Mapping[str, int]) -> None:
        """Count requests to the store of the output, by kind."""
        for kind, count in counts.items():
            self.store_requests[kind] = self.store_requests.get(kind, 0) + count

    def complete(
        self, output: RequestOutput, achievable_tokens: int = 0, template: Template | None = None
    ) -> None:
        """Count one row that ran, with its samples.

        `achievable_tokens` of its prompt could have come from the prefix cache; `template` is what it shares
        with many others.
        """
        self.achievable_tokens += achievable_tokens
        if template is not None:
            counts = TemplateCounts(
                template.num_tokens,
                template.text,
                rows=1,
                prompt_tokens=len(output.prompt_token_ids),
                achievable_tokens=achievable_tokens,
                cached_tokens=output.num_cached_tokens,
            )
            self._count_template(template.key, counts)
        self.rows_in += 1
        self.rows_ok += 1
        self.prompt_tokens += len(output.prompt_token_ids)
        self.cached_tokens += output.num_cached_tokens
        num_generated = 0
        for sample in output.outputs:
            self.samples += 1
            num_generated += len(sample.token_ids)
            reason = sample.finish_reason or "none"
            self.finish_reasons[reason] = self.finish_reasons.get(reason, 0) + 1
        self.generated_tokens += num_generated
        self._count_times(output.metrics, num_generated // max(len(output.outputs), 1))

    def _count_times(self, times: RequestMetrics, num_tokens: int) -> None:
        self.preempted_rows += times.num_preemptions > 0
        if times.first_scheduled_time is not None:
            self.queue_seconds.add(times.first_scheduled_time - times.arrival_time)
        if times.first_token_time is not None:
            self.first_token_seconds.add(times.first_token_time - times.arrival_time)
            if times.finished_time is not None and num_tokens > 1:
                seconds = (times.finished_time - times.first_token_time) / (num_tokens - 1)
                self.token_seconds.add(seconds, times=num_tokens - 1)

    def _count_template(self, key: str, counts: TemplateCounts) -> None:
        known = self.templates.get(key)
        if known is None:
            self.templates[key] = replace(counts)
        else:
            known.merge(counts)

    @property
    def rows_rejected(self) -> int:
        return sum(self.rejected.values())

    @property
    def hit_rate(self) -> float | None:
        """Share of prompt tokens that the prefix cache already held."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else None

    def merge(self, other: Metrics) -> None:
        """Add everything `other` has counted; of templates no more are kept than the most rewarding ones."""
        for key, counts in other.templates.items():
            self._count_template(key, counts)
        if len(self.templates) > 2 * MAX_TEMPLATES:
            self.templates = dict(_by_saving(self.templates)[:MAX_TEMPLATES])
        for each in fields(self):
            mine, theirs = getattr(self, each.name), getattr(other, each.name)
            if isinstance(mine, Histogram):
                mine.merge(theirs)
            elif each.name == "templates":
                continue
            elif isinstance(mine, dict):
                for key, count in theirs.items():
                    mine[key] = mine.get(key, 0) + count
            else:
                setattr(self, each.name, mine + theirs)

    def to_json(self) -> dict[str, Any]:
        """All of it, as JSON values; `from_json` gives an equal one back."""
        values = {
            each.name: value.to_json() if isinstance(value := getattr(self, each.name), Histogram) else value
            for each in fields(self)
        }
        templates = {key: asdict(counts) for key, counts in self.templates.items()}
        return values | {"templates": templates, "metrics_version": METRICS_VERSION}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Metrics:
        result = cls()
        for each in fields(cls):
            value = values[each.name]
            if isinstance(getattr(result, each.name), Histogram):
                value = Histogram.from_json(value)
            setattr(result, each.name, dict(value) if isinstance(value, Mapping) else value)
        result.templates = {key: TemplateCounts(**value) for key, value in values["templates"].items()}
        return result

    @classmethod
    def sum(cls, parts: Iterable[Metrics]) -> Metrics:
        result = cls()
        for part in parts:
            result.merge(part)
        return result


@dataclass(frozen=True, slots=True)
class ChunkFacts:
    """What a chunk was made on and by; the same for every chunk of an attempt."""

    attempt: str
    device: str
    versions: dict[str, str]
    fingerprint: str

    def to_json(self) -> dict[str, Any]:
        return {"facts": asdict(self)}


def summarise(metrics: Metrics) -> dict[str, Any]:
    """`metrics` for people and notebooks: rates and percentiles instead of buckets.

    Rates are tokens per second of wall time attributed to this shard; null where nothing was timed.
    """
    wall = metrics.wall_seconds

    def rate(tokens: int) -> float | None:
        return tokens / wall if wall > 0 else None

    return {
        "metrics_version": METRICS_VERSION,
        "rows_in": metrics.rows_in,
        "rows_ok": metrics.rows_ok,
        "rows_rejected": metrics.rows_rejected,
        "rejected_by_reason": dict(sorted(metrics.rejected.items())),
        "samples": metrics.samples,
        "prompt_tokens": metrics.prompt_tokens,
        "cached_tokens": metrics.cached_tokens,
        "generated_tokens": metrics.generated_tokens,
        "prefix_hit_rate": metrics.hit_rate,
        "achievable_tokens": metrics.achievable_tokens,
        "achieved_share": _share(metrics.cached_tokens, metrics.achievable_tokens),
        "templates": [asdict(counts) for _, counts in _by_saving(metrics.templates)[:SHOWN_TEMPLATES]],
        "prompt_tokens_per_second": rate(metrics.prompt_tokens),
        "generated_tokens_per_second": rate(metrics.generated_tokens),
        "wall_seconds": wall,
        "compile_seconds": metrics.compile_seconds,
        "wait_seconds": metrics.wait_seconds,
        "tail_seconds": metrics.tail_seconds,
        "queue_seconds": metrics.queue_seconds.summary(),
        "time_to_first_token_seconds": metrics.first_token_seconds.summary(),
        "time_per_token_seconds": metrics.token_seconds.summary(),
        "num_steps": metrics.num_steps,
        "step_seconds": metrics.step_seconds.summary(),
        "batch_occupancy": metrics.occupancy.summary(),
        "padding_share": _share(metrics.padded_tokens, metrics.computed_tokens + metrics.padded_tokens),
        "page_use": metrics.page_use.summary(),
        "duplicates_fanned_out": metrics.duplicates,
        "request_cache_hits": metrics.cache_hits,
        "request_cache_stored": metrics.cache_stored,
        "request_cache_damaged": metrics.cache_damaged,
        "drafted_tokens": metrics.drafted_tokens,
        "accepted_tokens": metrics.accepted_tokens,
        "draft_acceptance": _share(metrics.accepted_tokens, metrics.drafted_tokens),
        "evictions": metrics.evictions,
        "preemptions": metrics.preemptions,
        "preempted_rows": metrics.preempted_rows,
        "finish_reasons": dict(sorted(metrics.finish_reasons.items())),
        "store_requests": dict(sorted(metrics.store_requests.items())),
    }


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _by_saving(templates: Mapping[str, TemplateCounts]) -> list[tuple[str, TemplateCounts]]:
    """The most rewarding first."""
    return sorted(templates.items(), key=lambda item: (-item[1].achievable_tokens, item[0]))


def merge_chunks(summaries: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The content of `metrics/part-*.json`, from what its chunks' commits hold (`Metrics` and `ChunkFacts`).

    `attempts` lists who made the shard and on what, in the order of their first chunk, with chunk counts.
    """
    attempts: dict[str, dict[str, Any]] = {}
    total = Metrics()
    for summary in summaries:
        facts = summary["facts"]
        attempts.setdefault(facts["attempt"], {**facts, "chunks": 0})["chunks"] += 1
        total.merge(Metrics.from_json(summary))
    return {**summarise(total), "attempts": list(attempts.values())}


def counts_of(summary: Mapping[str, Any]) -> Metrics:
    """What a shard's metrics/ counted of its rows, without what was timed."""
    return Metrics(
        rejected=dict(summary["rejected_by_reason"]),
        finish_reasons=dict(summary["finish_reasons"]),
        **{name: summary[name] for name in _ROW_COUNTS},
    )


_ROW_COUNTS = ("rows_in", "rows_ok", "samples", "prompt_tokens", "cached_tokens", "generated_tokens")
