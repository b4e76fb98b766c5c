"""Lines of OpenAI's batch files, good and bad, and runs of them on the engine without a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.settings import Settings
from tests.pipeline.job_helpers import job_settings

CREATED = 1_700_000_000
MODEL = "tiny"


def chat_line(
    custom_id: Any = "a", say: str = "hello", url: str = "/v1/chat/completions", **body: Any
) -> dict[str, Any]:
    """A line that asks for a chat."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": say}], "max_tokens": 6} | body
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def completion_line(custom_id: Any = "a", prompt: Any = "once upon", **body: Any) -> dict[str, Any]:
    """A line that asks for a completion."""
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 6} | body
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}


def write_batch(path: Path, lines: list[Any]) -> Path:
    """A batch file; text is written as it is, to be a line that is no JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(line + "\n" for line in written), encoding="utf-8")
    return path


def batch_settings(input_path: Path, output_path: Path | str, **overrides: Any) -> Settings:
    """Settings of a job that runs batch files and answers in their form."""
    values = {
        "input__format": "openai_batch",
        "input__id_column": None,
        "output__format": "openai_batch",
        "output__created": CREATED,
        "max_reject_fraction": 1.0,
    }
    return job_settings(input_path, output_path, **(values | overrides))


def lines_of(output: Path, kind: str) -> list[dict[str, Any]]:
    """The lines of the output's files of a kind ("data" or "errors"), shard by shard."""
    found = []
    for path in sorted((output / kind).glob("*.jsonl")):
        found += [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return found
