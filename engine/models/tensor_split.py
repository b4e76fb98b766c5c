"""Which heads, inner units and rows of the vocabulary each chip of the tp axis has. Plain numpy.

What does not divide is filled up with zeros, which change no sum: zero heads attend to nothing that counts,
zero inner units give zero, and the logits of zero rows are dropped.

- Of K KV heads each of n <= K chips has ceil(K / n), with the query heads that read them. With n > K chips a
  KV head is on n // K of them, each with its share (rounded up) of the query heads; the chips that are left
  over have zeros.
- The inner units and the vocabulary are cut into n equal runs. Quantised weights have a scale for each 64
  inputs, so there the runs are whole groups of 64: then the numbers are those of one device.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from engine.models.config import ModelConfig
from kernels.linear.quantise import GROUP

_NOTHING = -1


class Cut(NamedTuple):
    """A part of an array: what is at `indices` of `axis`, and zeros where an index is -1."""

    axis: int
    indices: np.ndarray  # i64

    def of(self, array: np.ndarray) -> np.ndarray:
        """The part, contiguous."""
        is_zero = self.indices == _NOTHING
        part = np.take(array, np.where(is_zero, 0, self.indices), self.axis)
        if is_zero.any():
            part[(slice(None),) * self.axis + (is_zero,)] = 0
        return part


@dataclass(frozen=True, slots=True)
class TensorSplit:
    """A model cut for `num_chips` chips; weights stored as `weight_format`."""

    config: ModelConfig
    num_chips: int
    weight_format: str

    @property
    def local_config(self) -> ModelConfig:
        """The sizes of one chip's part; the vocabulary is counted whole."""
        return replace(
            self.config,
            num_heads=self.kv_heads_each * self.query_heads_each,
            num_kv_heads=self.kv_heads_each,
            intermediate_size=self.inner_each,
        )

    @property
    def chips_a_kv_head(self) -> int:
        return max(1, self.num_chips // self.config.num_kv_heads)

    @property
    def kv_heads_each(self) -> int:
        return -(-self.config.num_kv_heads // self.num_chips)

    @property
    def query_heads_each(self) -> int:
        """Of each KV head that a chip has, the query heads that it has."""
        ratio = self.config.num_heads // self.config.num_kv_heads
        return -(-ratio // self.chips_a_kv_head)

    @property
    def inner_each(self) -> int:
        unit = GROUP if self.weight_format in ("int8", "int4") else 1
        return -(-self.config.intermediate_size // (self.num_chips * unit)) * unit

    @property
    def vocab_each(self) -> int:
        return -(-self.config.vocab_size // self.num_chips)

    def kv_heads(self, chip: int) -> list[int]:
        """The KV heads of a chip, -1 for zeros."""
        shared = self.chips_a_kv_head
        first = chip // shared * self.kv_heads_each
        heads = range(first, first + self.kv_heads_each)
        return [head if head < self.config.num_kv_heads else _NOTHING for head in heads]

    def query_heads(self, chip: int) -> list[int]:
        """The query heads of a chip, those of its first KV head first, -1 for zeros."""
        ratio = self.config.num_heads // self.config.num_kv_heads
        first = chip % self.chips_a_kv_head * self.query_heads_each
        places = range(first, first + self.query_heads_each)
        return [
            kv_head * ratio + place if kv_head != _NOTHING and place < ratio else _NOTHING
            for kv_head in self.kv_heads(chip)
            for place in places
        ]

    def cut(self, path: tuple[str | int, ...], chip: int) -> Cut | None:
        """The part of the model's array at `path` (as in `weight_plan`) that a chip has; None: all of it."""
        owner, name = ("embed", "weight") if path == ("embed",) else path[-2:]
        if owner in ("embed", "head"):
            return Cut(0, self._run(chip, self.vocab_each, self.config.vocab_size))
        if owner in ("out", "down"):
            if name == "bias":  # added once
                return None if chip == 0 else Cut(0, np.full(self.config.d_model, _NOTHING))
            return Cut(1, self._head_rows(self.query_heads(chip)) if owner == "out" else self._inner(chip))
        if owner == "qkv":
            q_rows, kv_rows = self._head_rows(self.query_heads(chip)), self._head_rows(self.kv_heads(chip))
            num_q, num_kv = self.config.num_heads, self.config.num_kv_heads
            return Cut(0, self._joined((q_rows, kv_rows, kv_rows), (0, num_q, num_q + num_kv)))
        if owner == "gate_up":
            inner = self._inner(chip)
            up = np.where(inner == _NOTHING, _NOTHING, inner + self.config.intermediate_size)
            return Cut(0, np.concatenate((inner, up)))
        return None

    def _head_rows(self, heads: Iterable[int]) -> np.ndarray:
        """The rows of some heads of a matrix whose rows are heads."""
        dim = self.config.head_dim
        rows = [np.full(dim, _NOTHING) if head < 0 else np.arange(dim) + head * dim for head in heads]
        return np.concatenate(rows)

    def _joined(self, parts: tuple[np.ndarray, ...], first_heads: tuple[int, ...]) -> np.ndarray:
        dim = self.config.head_dim
        moved = [
            np.where(part == _NOTHING, _NOTHING, part + first * dim)
            for part, first in zip(parts, first_heads, strict=True)
        ]
        return np.concatenate(moved)

    def _inner(self, chip: int) -> np.ndarray:
        return self._run(chip, self.inner_each, self.config.intermediate_size)

    @staticmethod
    def _run(chip: int, each: int, size: int) -> np.ndarray:
        indices = np.arange(chip * each, (chip + 1) * each)
        return np.where(indices < size, indices, _NOTHING)
