"""Keeps Python's garbage collector off the step's path."""

from __future__ import annotations

import gc

# Containers made and not freed between two collections. A step makes some thousands and frees nearly all of
# them by their reference counts, so the default of 700 walks the young objects in every step for nothing.
_YOUNG, _MIDDLE, _OLD = 50_000, 20, 50


def spare_long_lived_objects() -> None:
    """For programs that run one engine to their end, once it is made: what exists by now is not walked again.

    A full collection over the modules and compiled steps of a process takes a tenth of a second, in which
    no step is planned. What is made from now on is collected as ever, only in larger portions. A library's
    constructor should not do this: what is dropped later, and refers to itself, would never be freed.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG, _MIDDLE, _OLD)
