"""Paged attention's XLA twin: the same tiles in the same order, one query block and key-value head after the other."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.numbers import cdiv
from pallas_kernels.paged_attention_inputs import (
    PagedBlocks,
    Pages,
    Scoring,
    arrange,
    cover_tiles,
    restore,
    scaled,
    sinks_of_rows,
    tokens_of_rows,
)
from pallas_kernels.paged_attention_softmax import Partial, combine, empty, finish, fold, key_range, scores_of, visible
from pallas_kernels.pinned_math import row_sum
from pallas_kernels.sizes_attention import AttentionSizes


def paged_attention_reference(
    q: Float[Array, "B r H h"],
    pages: Pages,
    blocks: PagedBlocks,
    sinks: Float[Array, " H"] | None,
    scoring: Scoring,
    sizes: AttentionSizes,
) -> Float[Array, "B r H h"]:
    """Attention over pages. The bounds of the loops over tiles and splits are known at run time only, so XLA compiles
    the bodies once."""
    batch, r, num_heads, _ = q.shape
    _, num_kv_heads, page_size, _ = pages.keys.shape
    rows = arrange(scaled(q, pages, scoring), pages, sizes.rows)
    tokens = tokens_of_rows(r, num_heads // num_kv_heads, sizes.rows)
    of_rows = None if sinks is None else sinks_of_rows(sinks, num_kv_heads, r, sizes.rows)
    tables = cover_tiles(blocks.tables, page_size, sizes)
    num_tiles = rows.shape[2] // sizes.rows

    def one(index):
        b, k, m = index // (num_kv_heads * num_tiles), index // num_tiles % num_kv_heads, index % num_tiles * sizes.rows
        cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=m, slice_size=sizes.rows)
        table, start, count = tables[blocks.slots[b]], blocks.starts[b], blocks.counts[b]
        partial = _attend(cut(rows[b, k]), cut(tokens), pages, k, table, start, count, scoring, sizes)
        return finish(partial, None if of_rows is None else cut(of_rows[k]))

    out = jax.lax.map(one, jnp.arange(batch * num_kv_heads * num_tiles))
    return restore(out.reshape(rows.shape), q)


def _attend(q, tokens, pages: Pages, k, table, start, count, scoring: Scoring, sizes: AttentionSizes) -> Partial:
    """One tile of rows over all keys that its block sees."""
    first, end = key_range(start, count, scoring.window)
    rows, h = q.shape

    def tile(i, partial):
        keys, values, key_scales, value_scales = _tile(pages, table, i, k, sizes.kv_tile)
        positions = i * sizes.kv_tile + jnp.arange(sizes.kv_tile)[None]
        values = jnp.where(((positions >= first) & (positions < end)).T, values.astype(q.dtype), 0)
        seen = visible(tokens, positions, start, count, scoring.window)
        scores = scores_of(q, keys.astype(q.dtype), key_scales, scoring)
        return fold(partial, scores, seen, values, value_scales, lambda x: row_sum(x)[:, None])

    def split(s, done):
        begin, stop = jnp.maximum(first // sizes.kv_tile, s * sizes.split_tiles), cdiv(end, sizes.kv_tile)
        stop = jnp.minimum(stop, (s + 1) * sizes.split_tiles)
        return combine(done, jax.lax.fori_loop(begin, stop, tile, empty(rows, h)))

    return jax.lax.fori_loop(first // sizes.split, cdiv(end, sizes.split), split, empty(rows, h))


def _tile(pages: Pages, table, i, k, length: int) -> Pages:
    """Keys and values `[s, h]` of tile i and head k, and their scales `[1, s]`."""
    h, page_size = pages.keys.shape[3], pages.keys.shape[2]
    ids = jax.lax.dynamic_slice_in_dim(table, i * (length // page_size), length // page_size)
    keys, values = (pool[ids, k].reshape(length, h) for pool in (pages.keys, pages.values))
    if pages.key_scales is None or pages.value_scales is None:
        return Pages(keys, values)
    scales = (jnp.repeat(pool[ids, k], page_size)[None] for pool in (pages.key_scales, pages.value_scales))
    return Pages(keys, values, *scales)
