"""What `mode=plan` found, as JSON values and as lines for people."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.histogram import Histogram
from pipeline.metrics import SHOWN_TEMPLATES
from pipeline.progress import duration
from pipeline.rows import Prompt
from pipeline.settings import Settings
from pipeline.shared_prefixes import SharedPrefixes
from pipeline.summary import by_count

# Prompt lengths are counted in bins of so many tokens, and shown in no more bins than that.
BIN_TOKENS = 16
MAX_BINS = 12


@dataclass(frozen=True, slots=True)
class ShardPlan:
    name: str
    rows: int
    rejected: int


@dataclass(slots=True)
class RowsPlan:
    """What reading and tokenising every row found. Token counts are of prompts that can run."""

    shards: list[ShardPlan] = field(default_factory=list)
    rejected_by_reason: dict[str, int] = field(default_factory=dict)
    num_prompts: int = 0
    num_truncated: int = 0
    prompt_lengths: Histogram = field(default_factory=Histogram)
    length_counts: dict[int, int] = field(default_factory=dict)  # by length // BIN_TOKENS
    max_generated_tokens: int = 0  # if no row stops early
    num_sequences: int = 0  # samples counted
    longest_request: int = 0  # prompt and output, in tokens

    @property
    def num_rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def num_over_long(self) -> int:
        return self.num_truncated + self.rejected_by_reason.get("prompt_too_long", 0)

    def length_histogram(self) -> list[tuple[int, int, int]]:
        """(least length, length past the greatest, prompts) in bins of equal width, `MAX_BINS` at most."""
        if not self.length_counts:
            return []
        first, last = min(self.length_counts), max(self.length_counts)
        width = 1
        while last // width - first // width >= MAX_BINS:
            width *= 2
        counts = dict.fromkeys(range(first // width, last // width + 1), 0)
        for number, count in self.length_counts.items():
            counts[number // width] += count
        size = width * BIN_TOKENS
        return [(number * size, (number + 1) * size, count) for number, count in counts.items()]

    def add(self, prompt: Prompt) -> None:
        length, sampling = len(prompt.token_ids), prompt.sampling
        self.num_prompts += 1
        self.num_truncated += prompt.was_truncated
        self.prompt_lengths.add(length)
        self.length_counts[length // BIN_TOKENS] = self.length_counts.get(length // BIN_TOKENS, 0) + 1
        self.max_generated_tokens += sampling.n * sampling.max_tokens
        self.num_sequences += sampling.n
        self.longest_request = max(self.longest_request, length + sampling.max_tokens)


@dataclass(frozen=True, slots=True)
class Measured:
    """What the warm-up found. `num_pages` fit in the memory that the settings allow."""

    device: str
    num_pages: int
    prefill_tokens_per_second: float
    decode_step_seconds: float
    num_sequences: int  # in a measured decode step


@dataclass(frozen=True, slots=True)
class Estimate:
    """At most: as if every row generated all of its max_tokens."""

    steps: int
    seconds: float


def as_json(
    settings: Settings,
    rows: RowsPlan,
    shared: SharedPrefixes,
    measured: Measured | None,
    estimate: Estimate | None,
) -> dict[str, Any]:
    """The plan as JSON values; what was not measured is null."""
    return {
        "shards": [asdict(shard) for shard in rows.shards],
        "rows": rows.num_rows,
        "prompts": rows.num_prompts,
        "rejected": sum(rows.rejected_by_reason.values()),
        "rejected_by_reason": dict(sorted(rows.rejected_by_reason.items())),
        "over_long_rows": rows.num_over_long,
        "truncated_rows": rows.num_truncated,
        "prompt_tokens": shared.num_tokens,
        "prompt_lengths": rows.prompt_lengths.summary(),
        "prompt_length_histogram": [
            {"from": start, "below": stop, "rows": count} for start, stop, count in rows.length_histogram()
        ],
        "max_generated_tokens": rows.max_generated_tokens,
        "shared_prefix_tokens": shared.num_shared,
        "shared_prefix_share": shared.share,
        "shared_prefix_is_exact": shared.is_exact,
        "templates": [asdict(template) for template in shared.templates[:SHOWN_TEMPLATES]],
        "page_size": settings.engine.page_size,
        "longest_request_tokens": rows.longest_request,
        "measured": None if measured is None else asdict(measured),
        "estimate": None if estimate is None else asdict(estimate),
    }


def report_lines(
    settings: Settings,
    rows: RowsPlan,
    shared: SharedPrefixes,
    measured: Measured | None,
    estimate: Estimate | None,
    missing_platform: str | None,
) -> list[str]:
    """The plan for people, a line each."""
    found = [f"Plan: {len(rows.shards)} shards, {rows.num_rows:,} rows. Nothing was generated.", ""]
    for shard in rows.shards[:10]:
        rejected = f", {shard.rejected:,} of them rejected" if shard.rejected else ""
        found.append(f"  shard     {shard.name}: {shard.rows:,} rows{rejected}")
    if len(rows.shards) > 10:
        found.append(f"            and {len(rows.shards) - 10:,} more")
    found.append(f"  prompts   {rows.num_prompts:,} can run")
    if rows.rejected_by_reason:
        found.append(f"  bad rows  {by_count(rows.rejected_by_reason)}")
    found.append(
        f"  over-long {rows.num_over_long:,} rows, of which {rows.num_truncated:,} would be cut to fit"
    )
    found.append(
        f"  tokens    {shared.num_tokens:,} in prompts, at most {rows.max_generated_tokens:,} generated"
    )
    found += _length_lines(rows)
    at_least = "" if shared.is_exact else "at least "
    found.append(
        f"  shared    {at_least}{shared.num_shared:,} prompt tokens ({shared.share:.0%}) can come from the "
        "prefix cache: they begin a prompt as they began an earlier one"
    )
    if shared.num_shared and settings.input.order == "input":
        found.append("            in input order fewer may: see input.order")
    for template in shared.templates[:3]:
        found.append(
            f"            {template.rows:,} rows begin with the same {template.num_tokens:,} tokens: "
            f"{template.text[:40]}"
        )
    if measured is None or estimate is None:
        why = missing_platform or ("no prompt can run" if settings.plan.measure else "plan.measure=false")
        return found if settings.plan.topology else [*found, f"  time      not estimated: {why}"]
    found.append(f"  memory    {_memory(settings, rows, measured)}")
    found.append(f"  steps     at most about {estimate.steps:,}")
    found.append(
        f"  time      at most about {duration(estimate.seconds)} on {measured.device} (measured: prefill "
        f"{measured.prefill_tokens_per_second:,.0f} tokens/s, a decode step of {measured.num_sequences} "
        f"sequences {measured.decode_step_seconds * 1000:.1f} ms)"
    )
    return found


def _length_lines(rows: RowsPlan) -> list[str]:
    bins = rows.length_histogram()
    most = max((count for _, _, count in bins), default=0)
    return [
        f"            {f'{start:,}-{stop - 1:,}':>15}  {count:>9,}  {'#' * round(40 * count / most)}"
        for start, stop, count in bins
    ]


def _memory(settings: Settings, rows: RowsPlan, measured: Measured) -> str:
    size = settings.engine.page_size
    longest = -(-rows.longest_request // size)
    text = f"{measured.num_pages:,} pages of {size} tokens fit; the longest request needs {longest:,}"
    if longest:
        text += f", so {measured.num_pages // longest:,} of those run at once"
    return text
