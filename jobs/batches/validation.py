"""What makes a batch fail as a whole, before anything of it is run: what is wrong with the file, not with a
body.

A file is read line by line. Bodies are looked at only for their model, for which an engine has to be found;
what else is wrong with one is its own line's error, in the error file.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.server.batches.backend import BatchFault
from pipeline.row_ids import MAX_ID_CHARS
from pipeline.rows import Reject, SourceRow
from pipeline.shards import InputSettings, list_shards, read_rows

MAX_FAULTS = 20
MAX_REQUESTS = 50_000
"""Of a batch; OpenAI's own limit."""


@dataclass(frozen=True, slots=True)
class Checked:
    """What a file holds, or why it cannot be run."""

    num_requests: int
    model: str | None
    faults: tuple[BatchFault, ...]


def check_input(
    path: Path, endpoint: str, models: Collection[str], *, max_requests: int = MAX_REQUESTS
) -> Checked:
    """Read the whole file. At most MAX_FAULTS faults are told."""
    settings = InputSettings(path=str(path), format="openai_batch")
    [shard] = list_shards(settings)
    faults: list[BatchFault] = []
    ids: set[str] = set()
    model: str | None = None
    num_requests = 0
    for row in read_rows(shard, settings):
        num_requests += 1
        if num_requests > max_requests:
            message = f"The file has more than {max_requests} requests; split it."
            return Checked(num_requests, None, (BatchFault(code="too_many_requests", message=message),))
        found = _fault(row, endpoint, models, ids, model)
        if isinstance(found, BatchFault):
            faults.append(found)
            if len(faults) == MAX_FAULTS:
                break
        else:
            model = found
    if num_requests == 0:
        faults.append(BatchFault(code="empty_file", message="The file has no requests."))
    return Checked(num_requests, None if faults else model, tuple(faults))


def _fault(
    row: SourceRow | Reject, endpoint: str, models: Collection[str], ids: set[str], model: str | None
) -> BatchFault | str:
    """What is wrong with a line, or the model that it names."""
    line = row.line

    def fault(code: str, message: str, param: str | None = None) -> BatchFault:
        return BatchFault(code=code, message=message, param=param, line=line)

    if isinstance(row, Reject):
        return fault("invalid_json_line", f"This line cannot be read: {row.message}")
    columns = row.columns
    custom_id = columns.get("custom_id")
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= MAX_ID_CHARS:
        message = f"custom_id must be text of 1 to {MAX_ID_CHARS} characters."
        return fault(
            "missing_required_parameter" if custom_id is None else "invalid_custom_id", message, "custom_id"
        )
    if custom_id in ids:
        message = f"The custom_id {custom_id[:80]!r} was given to an earlier line; make each unique."
        return fault("duplicate_custom_id", message, "custom_id")
    ids.add(custom_id)
    if columns.get("method") != "POST":
        return fault(
            "invalid_method", f"The method must be POST, not {_shown(columns.get('method'))}.", "method"
        )
    if columns.get("url") != endpoint:
        message = f"The url must be the batch's endpoint, {endpoint}, not {_shown(columns.get('url'))}."
        return fault("invalid_url", message, "url")
    body = columns.get("body")
    if not isinstance(body, dict):
        return fault("invalid_request", "The body must be an object.", "body")
    named = body.get("model")
    if not isinstance(named, str) or named not in models:
        listed = ", ".join(sorted(models))
        return fault(
            "model_not_found", f"The model {_shown(named)} does not exist; use {listed}.", "body.model"
        )
    if model is not None and named != model:
        message = f"All lines of a batch name one model: {model!r} before, {named!r} here."
        return fault("mismatched_model", message, "body.model")
    return named


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
