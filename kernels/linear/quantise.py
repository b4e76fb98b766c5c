"""Weights of 8 and 4 bits, and activations of 8: how numbers are rounded, on the host and plainly.

Every 64 inputs of a row share a scale: w = scale * q, with |q| <= 127 for int8 and |q| <= 7 for int4.
Activations are rounded likewise to 8 bits when the native backend takes a product with such weights;
nothing is calibrated.

Perplexity of SmolLM2-135M on one piece of 2,048 tokens of Python's documentation, all products and the head,
in a trial of the formats: int8 +0.1 %; with activations in groups of 96 or 192 inputs, +1.1 % and +1.9 %
(and a scale a row for the weights); with weights of 7 bits +1.6 %. So short a text does not tell a few
tenths of a percent apart; tests/engine/test_real_model.py holds the chosen one to 1 %. int4 costs this small
model much (+75 %).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

GROUP = 64
_LARGEST = {"int8": 127, "int4": 7}


class Quantised(NamedTuple):
    """A matrix [rows, in] in whole numbers. `in` is filled up with zeros to a multiple of 64."""

    values: np.ndarray  # i8[rows, in]
    scales: np.ndarray  # f32[rows, in / 64]


def quantise(matrix: np.ndarray, weight_format: str) -> Quantised:
    """f32[rows, in] as "int8" or "int4", to the nearest."""
    rows, in_dim = matrix.shape
    groups = np.pad(matrix.astype(np.float32), ((0, 0), (0, -in_dim % GROUP))).reshape(rows, -1, GROUP)
    scales = np.abs(groups).max(axis=2) / np.float32(_LARGEST[weight_format])
    divisors = np.where(scales > 0, scales, np.float32(1))
    values = np.rint(groups / divisors[..., None]).astype(np.int8)
    return Quantised(values.reshape(rows, -1), scales)


def dequantised(quantised: Quantised, in_dim: int) -> np.ndarray:
    """f32[rows, in]: the matrix that a product uses."""
    values = quantised.values.astype(np.float32)
    return (values * np.repeat(quantised.scales, GROUP, axis=1))[:, :in_dim]


def rounded_activations(x: jax.Array) -> jax.Array:
    """f32[T, in] -> f32[T, in]: what is left of x when each 64 inputs of a row have 8 bits and one scale."""
    num_rows, in_dim = x.shape
    groups = jnp.pad(x, ((0, 0), (0, -in_dim % GROUP))).reshape(num_rows, -1, GROUP)
    limit = jnp.max(jnp.abs(groups), axis=-1, keepdims=True)
    whole = jnp.round(groups * jnp.where(limit > 0, 127.0 / limit, 0.0))
    return (whole * (limit / 127.0)).reshape(num_rows, -1)[:, :in_dim]


def pack_nibbles(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Two arrays i8 of 4 bits in one: a number of each in the halves of a byte."""
    return ((low.view(np.uint8) & 15) | (high.view(np.uint8) << 4)).view(np.int8)


def unpack_nibbles(packed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What `pack_nibbles` was given."""
    four = jnp.int8(4)
    low = jax.lax.shift_right_arithmetic(jax.lax.shift_left(packed, four), four)
    return low, jax.lax.shift_right_arithmetic(packed, four)
