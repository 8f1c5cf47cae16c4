"""Paged attention in plain XLA, laid out for a CPU. Its pools differ from the kernels'; paged_attention_reference.py
is their twin.

The masking and the online softmax are those of paged_attention_softmax.py, written for all sequences at once. They do
not call its `fold`, which masks the weights a second time: XLA would compile other code for it, and might round
otherwise.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.paged_attention_softmax import MASKED
from pallas_kernels.pinned_math import LOG2_E, exp2, row_sum


def load_pages(pages: Array, page_ids: Int[Array, "B n"], dtype: jnp.dtype) -> Array:
    """Pages by id, `[P, ...] -> [B, n, ...]`, in `dtype`.

    The pool stores 16-bit floats as uint16, because XLA on CPU widens 16-bit floats to float32 and would move that
    conversion before the gather, so that it widens the whole pool. Integers are gathered as they are, and their bits
    are read as floats after the gather.
    """
    tile = pages[page_ids]
    return tile if tile.dtype == dtype else jax.lax.bitcast_convert_type(tile, dtype)


def paged_attention(
    q: Float[Array, "B r H h"],
    k_pages: Array,
    v_pages: Array,
    tables: Int[Array, "B n"],
    positions: Int[Array, " B"],
    *,
    scale: float,
    kv_tile: int,
    dtype: jnp.dtype,
) -> Float[Array, "B r H h"]:
    """Causal attention of r queries a sequence, the first at `positions[b]`, over the pages of a block table.

    k_pages [P, K, h, p] holds keys transposed, v_pages [P, K, p, h] values; tables must cover whole tiles of kv_tile
    keys. Scores, softmax and sums are float32. Keys are taken kv_tile at a time from the start of the context, so a
    query's bits do not depend on the page size, on the other queries, or on the lengths of the other contexts: a tile
    past its own context multiplies the running maximum, sum and accumulator by 1 and adds 0.
    """
    batch, r, num_heads, h = q.shape
    num_kv_heads, page_size = v_pages.shape[1], v_pages.shape[2]
    group, pages_per_tile = num_heads // num_kv_heads, kv_tile // page_size
    # [B, K, r * group, h]: the queries that share a key-value head are rows of one dot
    queries = q.reshape(batch, r, num_kv_heads, group, h).transpose(0, 2, 1, 3, 4)
    queries = queries.reshape(batch, num_kv_heads, r * group, h).astype(jnp.float32) * (scale * LOG2_E)
    rows = max(
        r * group, 2
    )  # at least two, because XLA takes another path for a dot with one row: other bits, and slow
    queries = jnp.pad(queries, ((0, 0), (0, 0), (0, rows - r * group), (0, 0)))
    query_positions = jnp.pad(jnp.repeat(jnp.arange(r), group), (0, rows - r * group)) + positions[:, None]  # [B, rows]
    dot = functools.partial(jnp.einsum, precision="highest", preferred_element_type=jnp.float32)

    def step(i, carry):
        high, total, out = carry
        ids = jax.lax.dynamic_slice_in_dim(tables, i * pages_per_tile, pages_per_tile, axis=1)
        keys = load_pages(k_pages, ids, dtype).transpose(0, 2, 3, 1, 4).reshape(batch, num_kv_heads, h, kv_tile)
        values = load_pages(v_pages, ids, dtype).transpose(0, 2, 1, 3, 4).reshape(batch, num_kv_heads, kv_tile, h)
        key_positions = i * kv_tile + jnp.arange(kv_tile)
        visible = key_positions <= query_positions[:, None, :, None]
        # Past the context a page may hold anything, NaN too, and 0 * NaN is NaN.
        written = (key_positions <= positions[:, None] + r - 1)[:, None, :, None]
        values = jnp.where(written, values.astype(jnp.float32), 0.0)
        scores = jnp.where(visible, dot("bkmh,bkhs->bkms", queries, keys.astype(jnp.float32)), MASKED)
        new_high = jnp.maximum(high, jnp.ceil(scores.max(-1)))
        shrink, weights = exp2(high - new_high), exp2(scores - new_high[..., None])
        total = total * shrink + row_sum(weights)
        return new_high, total, out * shrink[..., None] + dot("bkms,bksh->bkmh", weights, values)

    num_tiles = (positions.max() + r - 1) // kv_tile + 1
    start = jnp.full((batch, num_kv_heads, rows), MASKED, jnp.float32)
    empty = jnp.zeros((batch, num_kv_heads, rows, h), jnp.float32)
    _, total, out = jax.lax.fori_loop(0, num_tiles, step, (start, jnp.zeros_like(start), empty))
    out = (out / total[..., None])[:, :, : r * group].reshape(batch, num_kv_heads, r, group, h)
    return out.transpose(0, 2, 1, 3, 4).reshape(batch, r, num_heads, h)
