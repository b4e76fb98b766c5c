"""The types of the benchmark's command-line options; each says what it would have taken."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any


def at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is not {least} or more")
        return value

    return number


positive = at_least(1)


def not_negative(text: str) -> float:
    value = float(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{value} is not 0 or more")
    return value


def fraction(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{value} is not above 0 and up to 1")
    return value


def lengths(text: str) -> tuple[int, int]:
    """ "16-64", or "64" for always 64."""
    low, has_high, high = text.partition("-")
    both = positive(low), positive(high if has_high else low)
    if both[0] > both[1]:
        raise argparse.ArgumentTypeError(f"{text}: give the lower number first")
    return both


def names_of(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """A comma-separated list of known names; empty is none."""

    def names(text: str) -> tuple[str, ...]:
        found = tuple(dict.fromkeys(name for name in text.split(",") if name))
        for name in found:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
        return found

    return names


def pair(kind: Callable[[str], Any]) -> Callable[[str], tuple[str, Any]]:
    def name_and_value(text: str) -> tuple[str, Any]:
        name, has_value, value = text.partition("=")
        if not has_value:
            raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
        return name, kind(value)

    return name_and_value
