"""Small files of a checkpoint, read with a bound, and messages of other libraries brought onto one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.errors import ModelError

MAX_JSON_BYTES = 64 << 20
"""A config or a weight index is kilobytes; a file past this is not one."""


def one_line(error: object, limit: int = 300) -> str:
    """An error's own text without line breaks, cut at `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. ModelError where it is absent, too large, or anything else."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelError(
                f"{path}: larger than {MAX_JSON_BYTES >> 20} MiB, so not the JSON file it should be"
            )
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not valid JSON ({one_line(error)}); fetch the file again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: holds a JSON {type(value).__name__} where an object is needed")
    return value
