"""What a finished run looks like in numbers, to be compared with another run of the same job."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from engine.errors import OutputError
from pipeline.results import Run

MAX_KEPT_TEXTS = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatistics:
    """mean_length: generated tokens a sample. finish_reasons: the share of samples that ended so.
    duplicate_rate: the share of samples whose text, if it has any, an earlier one had. empty_rate: the share
    of samples without a text, or with blanks alone. reject_rate: the share of rows that could not be run.
    """

    rows: int
    samples: int
    mean_length: float = 0.0
    finish_reasons: Mapping[str, float] = field(default_factory=dict)
    duplicate_rate: float = 0.0
    empty_rate: float = 0.0
    reject_rate: float = 0.0

    @classmethod
    def of(cls, run: Run) -> RunStatistics:
        """Reads the texts of the whole run. Raises OutputError when it is not finished."""
        manifest = run.manifest()
        if manifest is None:
            raise OutputError(f"{run.path} is not finished; start its job again, then publish")
        totals = manifest["totals"]
        texts, reasons, num_empty, num_tokens = RepeatedTexts(), Counter[str](), 0, 0
        for table in run.tables("rows", ["text", "finish_reason", "num_generated_tokens"]):
            reasons.update(reason or "none" for reason in table["finish_reason"].to_pylist())
            num_tokens += sum(filter(None, table["num_generated_tokens"].to_pylist()))
            for text in table["text"].to_pylist():
                if text and not text.isspace():
                    texts.add(text)
                else:
                    num_empty += 1
        samples = reasons.total()
        return cls(
            rows=totals["rows"],
            samples=samples,
            mean_length=num_tokens / samples if samples else 0.0,
            finish_reasons={reason: count / samples for reason, count in sorted(reasons.items())},
            duplicate_rate=texts.rate * (samples - num_empty) / samples if samples else 0.0,
            empty_rate=num_empty / samples if samples else 0.0,
            reject_rate=totals["rejected"] / totals["rows"] if totals["rows"] else 0.0,
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class RepeatedTexts:
    """The share of texts that an earlier one had, in bounded memory.

    Beyond `max_kept` different texts only those count whose hash ends in a zero bit, then in two, and so on:
    a text and its repetitions stay or go together, so the rate among those that stay is that of all, up to
    the chance of which ones they are.
    """

    def __init__(self, max_kept: int = MAX_KEPT_TEXTS):
        self._max_kept = max_kept
        self._counts: dict[int, int] = {}
        self._mask = 0

    def add(self, text: str) -> None:
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        key = int.from_bytes(digest, "little")
        if key & self._mask:
            return
        self._counts[key] = self._counts.get(key, 0) + 1
        while len(self._counts) > self._max_kept:
            self._mask = 2 * self._mask + 1
            self._counts = {each: count for each, count in self._counts.items() if not each & self._mask}

    @property
    def rate(self) -> float:
        num_texts = sum(self._counts.values())
        return 1 - len(self._counts) / num_texts if num_texts else 0.0
