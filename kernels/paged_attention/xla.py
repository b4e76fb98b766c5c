"""Paged attention in plain XLA, shaped for a CPU.

A step's sequences fall in two kinds, each with a loop whose trip count is the step's own, so that no
bucket of context lengths or sequence counts has to be declared:

- sequences with one query (decode) go `DECODE_GROUP` at a time over their pages;
- the others (prefill chunks) go in tiles of `QUERY_TILE` queries of one sequence.

Both carry the running maximum, sum and output of the online softmax over spans of keys of one fixed
length, in order. A query's arithmetic is therefore the same whatever shares the step with it, and the
same whether it runs in a tile or in a group: with spans of `MIN_SPAN` tokens and more XLA's CPU products
and sums give both kinds the same bits (shorter ones do not; `tests/kernels` holds this).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.paged_attention.layout import AttentionOptions, Groups, PageLayout, Pages, Rows

# Measured on two cores with AVX2: 8 to 64 sequences a group are alike, as are 32 to 128 queries a tile.
DECODE_GROUP = 16
QUERY_TILE = 32
# Below 64 keys a span the two kinds of rows no longer agree to the bit.
MIN_SPAN = 64

# Finite, so that a difference of two masked logits is zero and not NaN.
_MASKED = -1e30


class _Softmax(NamedTuple):
    """Running state of the online softmax over leading axes `...` (batch, KV head, queries)."""

    maximum: jax.Array  # f32[...]
    total: jax.Array  # f32[...]
    output: jax.Array  # f32[..., H], not yet divided by `total`

    @classmethod
    def start(cls, shape: tuple[int, ...], head_dim: int, sinks: jax.Array | None) -> _Softmax:
        """Nothing seen; a sink counts as one key seen whose value is zero."""
        output = jnp.zeros((*shape, head_dim), jnp.float32)
        if sinks is None:
            return cls(jnp.full(shape, _MASKED, jnp.float32), jnp.zeros(shape, jnp.float32), output)
        sinks = sinks.reshape((1,) * (len(shape) - sinks.ndim) + sinks.shape)
        return cls(jnp.broadcast_to(sinks, shape), jnp.ones(shape, jnp.float32), output)

    def add(self, logits: jax.Array, seen: jax.Array, values: jax.Array) -> _Softmax:
        """Take in one span: logits and seen [..., q, span], values [..., span, H]."""
        logits = jnp.where(seen, logits, _MASKED)
        maximum = jnp.maximum(self.maximum, logits.max(-1))
        weights = jnp.where(seen, jnp.exp(logits - maximum[..., None]), 0.0)
        decay = jnp.exp(self.maximum - maximum)
        gained = jnp.einsum("...qt,...th->...qh", weights, values)
        return _Softmax(
            maximum, self.total * decay + _halving_sum(weights), self.output * decay[..., None] + gained
        )

    def result(self) -> jax.Array:
        """f32[..., H]; zero where nothing was seen."""
        total = jnp.where(self.total > 0, self.total, 1.0)
        return self.output / total[..., None]


def _halving_sum(x: jax.Array) -> jax.Array:
    """The sum over the last axis, a power of two, by adding its halves until one is left.

    XLA's own reduction, and a product with ones too, add in an order that depends on how many rows there
    are, and so on the kind of row.
    """
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x[..., 0]


class _Spans(NamedTuple):
    """Reads spans of pages: a span's keys are [..., K, H, span], its values [..., K, span, H]."""

    layout: PageLayout
    pages: Pages

    @property
    def pages_per_span(self) -> int:
        return max(1, MIN_SPAN // self.layout.page_size)

    @property
    def span_len(self) -> int:
        return self.pages_per_span * self.layout.page_size

    def padded(self, page_table: jax.Array) -> jax.Array:
        """The page table widened to whole spans, so that reading the last one is never shifted back."""
        extra = -page_table.shape[-1] % self.pages_per_span
        return jnp.pad(page_table, [(0, 0)] * (page_table.ndim - 1) + [(0, extra)])

    def read(self, page_table: jax.Array, index: jax.Array, kv_len: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Span `index` of the sequences in `page_table` [..., pages]; values past `kv_len` read as zero.

        What lies past a sequence's end may be anything, NaN too, and a weight of zero does not silence a NaN.
        """
        each = self.pages_per_span
        ids = jax.lax.dynamic_slice_in_dim(page_table, index * each, each, axis=-1)
        keys = self.pages.keys.at[ids].get(mode="clip")  # [..., each, K, H, page]
        values = self.pages.values.at[ids].get(mode="clip")  # [..., each, K, page, H]
        if self.pages.key_scales is not None and self.pages.value_scales is not None:
            keys = keys.astype(jnp.float32) * self.pages.key_scales.at[ids].get(mode="clip")[..., None, :]
            values = values.astype(jnp.float32) * self.pages.value_scales.at[ids].get(mode="clip")[..., None]
        if each == 1:
            keys, values = jnp.squeeze(keys, -4), jnp.squeeze(values, -4)
        else:
            keys, values = jnp.moveaxis(keys, -4, -2), jnp.moveaxis(values, -4, -3)
            keys = keys.reshape(*keys.shape[:-2], self.span_len)
            values = values.reshape(*values.shape[:-3], self.span_len, self.layout.head_dim)
        held = self.positions(index, kv_len.ndim) < kv_len[..., None]  # [..., span]
        values = jnp.where(held[..., None, :, None], values.astype(jnp.float32), 0.0)
        return keys.astype(jnp.float32), values

    def positions(self, index: jax.Array, num_axes: int) -> jax.Array:
        """i32[1, ..., span]: the key positions of span `index`, with `num_axes` axes of one before them."""
        position = index * self.span_len + jnp.arange(self.span_len, dtype=jnp.int32)
        return position.reshape((1,) * num_axes + (-1,))


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pages: Pages,
    rows: Rows,
    groups: Groups,
    options: AttentionOptions,
    layout: PageLayout,
    sinks: jax.Array | None,
) -> tuple[jax.Array, Pages]:
    """See `kernels.paged_attention.attend`."""
    pages = layout.write(pages, k, v, rows)
    num_tokens, num_heads, head_dim = q.shape
    kv_heads, group = layout.num_kv_heads, num_heads // layout.num_kv_heads
    grouped = q.astype(jnp.float32).reshape(num_tokens, kv_heads, group, head_dim)
    sink_heads = None if sinks is None else sinks.astype(jnp.float32).reshape(kv_heads, group)
    spans = _Spans(layout, pages)
    rows = rows._replace(page_table=spans.padded(rows.page_table))
    out = jnp.zeros_like(grouped)
    shared = _SharedSpans.of(groups, spans, rows.kv_len.shape[0])
    out = _attend_single_queries(out, grouped, spans, rows, shared, options, sink_heads)
    # A tile may reach past the last token; the spare rows take what it writes there.
    spare = [(0, QUERY_TILE), (0, 0), (0, 0), (0, 0)]
    out = _attend_tiles(jnp.pad(out, spare), jnp.pad(grouped, spare), spans, rows, options, sink_heads)
    return out[:num_tokens].reshape(q.shape).astype(q.dtype), pages


def _cap(logits: jax.Array, options: AttentionOptions) -> jax.Array:
    logits = logits * options.scale
    return logits if options.soft_cap is None else options.soft_cap * jnp.tanh(logits / options.soft_cap)


class _SharedSpans(NamedTuple):
    """For each slot, the deepest group it is in (G: none), and how many leading spans that group shares."""

    group: jax.Array  # i32[S]
    num_spans: jax.Array  # i32[S]

    @classmethod
    def of(cls, groups: Groups, spans: _Spans, num_slots: int) -> _SharedSpans:
        slots = jnp.arange(num_slots, dtype=jnp.int32)[:, None]
        inside = (slots >= groups.slot_start) & (slots < groups.slot_stop)  # [S, G]
        stop = jnp.where(inside, groups.page_stop, 0)
        num_spans = stop.max(-1) // spans.pages_per_span
        group = jnp.where(num_spans > 0, jnp.argmax(stop, -1), groups.page_stop.shape[0])
        return cls(group.astype(jnp.int32), num_spans)


def _attend_single_queries(
    out: jax.Array,
    q: jax.Array,
    spans: _Spans,
    rows: Rows,
    shared: _SharedSpans,
    options: AttentionOptions,
    sinks: jax.Array | None,
) -> jax.Array:
    """Fill `out` [T, K, N/K, H] for the sequences that have one query in the step."""
    num_tokens, kv_heads, group, head_dim = q.shape
    single = rows.query_len == 1
    count = single.sum(dtype=jnp.int32)
    slots = jnp.argsort(~single, stable=True)  # those with one query first, in their own order
    slots = jnp.pad(slots, (0, -slots.shape[0] % DECODE_GROUP))

    def attend_group(index: jax.Array, out: jax.Array) -> jax.Array:
        members = jax.lax.dynamic_slice_in_dim(slots, index * DECODE_GROUP, DECODE_GROUP)
        present = index * DECODE_GROUP + jnp.arange(DECODE_GROUP) < count
        kv_len = jnp.where(present, rows.kv_len[members], 0)
        first = options.first_visible(kv_len - 1)
        token = jnp.where(present, rows.query_start[members], num_tokens)
        queries = q.at[token].get(mode="clip")
        table = rows.page_table[members]

        def add_span(span: jax.Array, state: _Softmax) -> _Softmax:
            keys, values = spans.read(table, span, kv_len)
            logits = _cap(jnp.einsum("skgh,skht->skgt", queries, keys), options)
            position = spans.positions(span, 1)
            seen = (position < kv_len[:, None]) & (position >= first[:, None])
            return state.add(logits, seen[:, None, None], values)

        def add_shared_span(span: jax.Array, state: _Softmax) -> _Softmax:
            # Read once, then multiplied as each member's own: XLA's product of all members with one span
            # adds in another order when the span is longer than 64.
            read = spans.read(table[0], span, kv_len[0])  # full pages of every member
            keys, values = (jnp.broadcast_to(x, (DECODE_GROUP, *x.shape)) for x in read)
            logits = _cap(jnp.einsum("skgh,skht->skgt", queries, keys), options)
            seen = spans.positions(span, 1) >= first[:, None]
            return state.add(logits, seen[:, None, None], values)

        begin = jnp.min(jnp.where(present, first, jnp.iinfo(jnp.int32).max)) // spans.span_len
        end = -(-jnp.max(kv_len) // spans.span_len)
        # Where all present are of one group, its spans are read once for all.
        is_one = jnp.all(jnp.where(present, shared.group[members] == shared.group[members[0]], True))
        num_shared = jnp.where(is_one, shared.num_spans[members[0]], 0)
        start = _Softmax.start((DECODE_GROUP, kv_heads, group), head_dim, sinks)
        state = jax.lax.fori_loop(begin, num_shared, add_shared_span, start)
        state = jax.lax.fori_loop(jnp.maximum(begin, num_shared), end, add_span, state)
        return out.at[token].set(state.result(), mode="drop")

    return jax.lax.fori_loop(0, -(-count // DECODE_GROUP), attend_group, out)


def _attend_tiles(
    out: jax.Array,
    q: jax.Array,
    spans: _Spans,
    rows: Rows,
    options: AttentionOptions,
    sinks: jax.Array | None,
) -> jax.Array:
    """Fill `out` [T + tile, K, N/K, H] for the sequences that have several queries in the step."""
    _, kv_heads, group, head_dim = q.shape
    query_len = rows.query_len
    tiles = jnp.where(query_len > 1, -(-query_len // QUERY_TILE), 0)
    tiles_end = jnp.cumsum(tiles)

    def attend_tile(tile: jax.Array, out: jax.Array) -> jax.Array:
        slot = jnp.sum(tiles_end <= tile)
        offset = (tile - (tiles_end[slot] - tiles[slot])) * QUERY_TILE
        token = rows.query_start[slot] + offset
        count = jnp.minimum(query_len[slot] - offset, QUERY_TILE)
        position = rows.kv_len[slot] - query_len[slot] + offset + jnp.arange(QUERY_TILE, dtype=jnp.int32)
        last = position[0] + count  # one past the last position a query of this tile sees
        queries = jax.lax.dynamic_slice_in_dim(q, token, QUERY_TILE).transpose(1, 0, 2, 3)
        queries = queries.reshape(kv_heads, QUERY_TILE * group, head_dim)
        query_position = jnp.repeat(position, group)[:, None]
        first = options.first_visible(query_position)
        table = rows.page_table[slot]

        def add_span(span: jax.Array, state: _Softmax) -> _Softmax:
            keys, values = spans.read(table, span, last)
            logits = _cap(jnp.einsum("kqh,kht->kqt", queries, keys), options)
            key_position = spans.positions(span, 1)
            seen = (key_position <= query_position) & (key_position >= first) & (key_position < last)
            return state.add(logits, seen[None], values)

        by_head = None if sinks is None else jnp.tile(sinks, (1, QUERY_TILE))
        start = _Softmax.start((kv_heads, QUERY_TILE * group), head_dim, by_head)
        begin = first[0, 0] // spans.span_len
        state = jax.lax.fori_loop(begin, -(-last // spans.span_len), add_span, start)
        result = state.result().reshape(kv_heads, QUERY_TILE, group, head_dim).transpose(1, 0, 2, 3)
        before = jax.lax.dynamic_slice_in_dim(out, token, QUERY_TILE)
        mine = jnp.arange(QUERY_TILE) < count
        result = jnp.where(mine[:, None, None, None], result, before)
        return jax.lax.dynamic_update_slice_in_dim(out, result, token, 0)

    return jax.lax.fori_loop(0, tiles_end[-1], attend_tile, out)
