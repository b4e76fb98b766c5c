"""Quotients of scalars that are never negative: the scalar unit would pay for signs that are not there."""

from __future__ import annotations

from typing import Any

import jax


def quotient(x: Any, by: int) -> Any:
    """x // by for x >= 0."""
    return x >> (by.bit_length() - 1) if by & (by - 1) == 0 else jax.lax.div(x, by)


def quotient_up(x: Any, by: int) -> Any:
    """The least whole number that is x / by or more, for x >= 0."""
    return quotient(x + (by - 1), by)


def rounded_down(x: Any, by: int) -> Any:
    """The largest multiple of `by` that is x or less, for x >= 0."""
    return x - remainder(x, by)


def remainder(x: Any, by: int) -> Any:
    """x % by for x >= 0."""
    return x & (by - 1) if by & (by - 1) == 0 else jax.lax.rem(x, by)
