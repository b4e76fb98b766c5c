"""What each row of logits is drawn with."""

from __future__ import annotations

from typing import NamedTuple

import jax


class Draws(NamedTuple):
    """One entry a row of logits. A temperature of 0 is greedy, whatever the rest says."""

    temperature: jax.Array  # f32[L]
    top_k: jax.Array  # i32[L], V when off
    top_p: jax.Array  # f32[L], 1 when off
    min_p: jax.Array  # f32[L], 0 when off
    keys: jax.Array  # u32[L, 2], the row's own threefry key
    positions: jax.Array  # i32[L], folded into the key: the drawn token's position in its sequence
