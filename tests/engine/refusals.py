"""Loads that must be refused, and what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine import checkpoints
from engine.errors import ModelError


def refused(source: str | Path, **options: Any) -> str:
    """The message of the ModelError that loading raises, which must be one line."""
    with pytest.raises(ModelError) as caught:
        checkpoints.load(str(source), **options)
    message = str(caught.value)
    assert "\n" not in message
    return message
