"""Copies the beginnings of pages before a step runs: the part of a prompt that a known page begins with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from engine.compiled_steps import CompiledSteps
from kernels.paged_attention import PageLayout, Pages

if TYPE_CHECKING:
    from engine.placement import Placement


def make_copy(layout: PageLayout, num_layers: int) -> Any:
    """The pure device function (kv_pages, copies, num_copies) -> kv_pages, for all layers' pages in one pool.

    copies is i32[3, max_copies]: source page, target page, tokens; the first num_copies of them are made, one
    after the other.
    """

    def copy(kv_pages: Pages, copies: jax.Array, num_copies: jax.Array) -> Pages:
        if layout.copies_whole_pages:  # what is behind the tokens asked for is written before it is read
            return layout.copy_whole(kv_pages, num_layers, copies, num_copies)
        num_pages = kv_pages.num_pages // num_layers

        def one(index: jax.Array, by_layer: Pages) -> Pages:
            source, target, num_tokens = copies[:, index]
            return jax.vmap(layout.copy, (0, None, None, None))(by_layer, source, target, num_tokens)

        by_layer = jax.tree.map(lambda x: x.reshape(num_layers, num_pages, *x.shape[1:]), kv_pages)
        by_layer = jax.lax.fori_loop(0, num_copies, one, by_layer)
        return jax.tree.map(lambda x: x.reshape(num_layers * num_pages, *x.shape[2:]), by_layer)

    return copy


class PageCopier:
    """The compiled copy of one runner, for up to `max_copies` (`PageCopy`) a step; the pages are donated."""

    def __init__(
        self,
        layout: PageLayout,
        num_layers: int,
        num_pages: int,
        max_copies: int,
        place: Placement,
        saved: CompiledSteps,
    ):
        self._max_copies = max_copies
        self._num_replicas = place.num_replicas
        kv_pages = place.abstract_pages(layout, num_layers * num_pages)
        copy = place.jit_copy(make_copy(layout, num_layers))
        arguments = (kv_pages, *self._arrays(()))
        facts = {"layout": repr(layout), "layers": num_layers, "mesh": place.description}
        self._compiled = saved.compile("copy", partial(copy.lower, *arguments), arguments, kv_pages, facts)

    def run(self, kv_pages: Pages, copies: Sequence[Any]) -> Pages:
        """Make a step's copies. Raises ValueError when there are more than were declared."""
        return self._compiled(kv_pages, *self._arrays(copies))

    def _arrays(self, copies: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
        if len(copies) > self._max_copies:
            raise ValueError(f"{len(copies)} page copies in a step, at most {self._max_copies} were declared")
        arrays = np.zeros((3, self._max_copies), np.int32)
        if copies:
            arrays[:, : len(copies)] = np.transpose(copies)
        return arrays, np.array(len(copies), np.int32)
