"""Causal attention over pages: scores as [keys, queries], so that keys are a wgmma's 64 and queries the side of which
it takes any multiple of 8.

The arithmetic is that of paged_attention_softmax.py: to base 2, with a running maximum that is a whole number, so that
rescaling is exact and it makes no difference whether splits of a context run side by side or in turn. Its Partial of n
queries is transposed here: high and total [n], out [h, n].
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from pallas_kernels.chain_gpu.blocks import by_columns, new
from pallas_kernels.chain_gpu.sizes import ChainSizes, row_tile
from pallas_kernels.gpu_call import call
from pallas_kernels.numbers import cdiv, power_of_two
from pallas_kernels.paged_attention_inputs import PagedBlocks
from pallas_kernels.paged_attention_softmax import MASKED, Partial, combine
from pallas_kernels.pinned_math import exp2


def attend(
    q: Float[Array, "R H h"],
    keys: Array,
    values: Array,
    blocks: PagedBlocks,
    sizes: ChainSizes,
    *,
    interpret: bool = False,
    apart: bool | None = None,
) -> Float[Array, "R H*h"]:
    """Of the queries of `rotate_and_write`, in the pools' dtype; row i is token i % r of block i // r.

    `apart`: whether the splits of a context are programs of their own; by default they are when decoding. Rows of dead
    blocks may hold anything.
    """
    (num_rows, heads, width), (_, num_kv_heads, page_size, page_width) = q.shape, keys.shape
    batch, blocks = blocks.starts.shape[0], blocks._replace(num_blocks=None)  # counts say it too
    r, group = num_rows // batch, heads // num_kv_heads
    rows, out = row_tile(r * group), new((num_rows, heads * width), keys.dtype)
    num_splits = cdiv(blocks.tables.shape[1] * page_size, sizes.kv_split)
    tile = _Tile(r, group, rows, width, page_width, sizes.kv_tile, sizes.kv_split, interpret)
    grid, inputs = (batch, num_kv_heads, cdiv(r * group, rows)), (q, keys, values, blocks)
    how: dict[str, Any] = dict(interpret=interpret, warps=4)
    if num_splits == 1 or not (r == 1 if apart is None else apart):
        return call("chain_attend", functools.partial(_in_turn, tile=tile), grid, out, *inputs, stages=2, **how)
    few = new((num_splits, num_rows, heads))
    some = [few, few, new((num_splits, num_rows, heads, width))]
    partials = call(
        "chain_attend_splits", functools.partial(_one_split, tile=tile), (*grid, num_splits), some, *inputs, **how
    )
    join = functools.partial(_join, r=r, kv_split=sizes.kv_split)
    return call("chain_join", join, (num_rows, heads), out, *partials, blocks, interpret=interpret, warps=1)


class _Tile(NamedTuple):
    """What a program takes: `rows` pairs of a token of its block and a head of its group, and keys by tiles."""

    r: int
    group: int
    rows: int
    width: int
    page_width: int
    kv_tile: int
    kv_split: int
    interpret: bool


class _Rows(NamedTuple):
    """Where a program's queries lie."""

    row: Array  # [n], of the step's rows
    head: Array
    there: Array  # whether it is a token's
    position: Array
    end: Array  # positions before it have keys
    slot: Array
    kv_head: Array
    some: Array  # whether any row is a token's


def _rows_of(blocks: PagedBlocks, tile: _Tile) -> _Rows:
    b, k = pl.program_id(0), pl.program_id(1)
    own = pl.program_id(2) * tile.rows + jnp.arange(tile.rows)
    token, head = own // tile.group, k * tile.group + own % tile.group
    start, count = blocks.starts[b], blocks.counts[b]
    some = pl.program_id(2) * tile.rows // tile.group < count
    there, row = (token < count) & (own < tile.r * tile.group), b * tile.r + token
    return _Rows(row, head, there, start + token, start + count, blocks.slots[b], k, some)


def _queries(q_ref, rows: _Rows, tile: _Tile) -> Float[Array, "n h"]:
    *cells, mask = _place(rows, tile)
    return plgpu.load(q_ref.at[tuple(cells)], mask=mask, other=0)


def _spread(x: Array, like: Array) -> Array:
    return jnp.broadcast_to(x, like.shape)


def _of_split(q: Array, rows: _Rows, keys, values, blocks: Any, split, tile: _Tile) -> Partial:
    page_size = keys.shape[2]
    columns = jnp.arange(tile.page_width, dtype=jnp.int32)[None]

    def step(i, done: Partial) -> Partial:
        at = i * tile.kv_tile + jnp.arange(tile.kv_tile, dtype=jnp.int32)
        in_context = at < rows.end
        ids = plgpu.load(blocks.tables.at[rows.slot, at // page_size], mask=in_context, other=0)
        mask = jnp.broadcast_to(in_context[:, None], (tile.kv_tile, tile.page_width))
        cells = (
            _spread(ids[:, None], mask),
            rows.kv_head,
            _spread((at % page_size)[:, None], mask),
            _spread(columns, mask),
        )
        key, value = (plgpu.load(pool.at[cells], mask=mask, other=0.0) for pool in (keys, values))
        seen = (at[:, None] <= rows.position[None]) & rows.there[None]
        scores = jnp.where(seen, by_columns(key, q, tile.interpret), MASKED)
        high = jnp.maximum(done.high, jnp.ceil(scores.max(0)))
        weights, shrink = jnp.where(seen, exp2(scores - high[None]), 0.0), exp2(done.high - high)
        more = by_columns(value.T, weights.astype(value.dtype).T, tile.interpret)
        return Partial(high, done.total * shrink + weights.sum(0), done.out * shrink[None] + more)

    tiles = tile.kv_split // tile.kv_tile
    stop = jnp.minimum(cdiv(rows.end, tile.kv_tile), (split + 1) * tiles)
    return jax.lax.fori_loop(split * tiles, stop, step, _nothing(tile))


def _nothing(tile: _Tile) -> Partial:
    high, total = jnp.full((tile.rows,), MASKED, jnp.float32), jnp.zeros((tile.rows,), jnp.float32)
    return Partial(high, total, jnp.zeros((tile.page_width, tile.rows), jnp.float32))


def _place(rows: _Rows, tile: _Tile) -> tuple[Array, Array, Array, Array]:
    """Where the program's results [n, h] lie, as wide as pages: row, head and column of each, and which there are."""
    columns = jnp.arange(tile.page_width)[None]
    mask = rows.there[:, None] & (columns < tile.width)
    return _spread(rows.row[:, None], mask), _spread(rows.head[:, None], mask), _spread(columns, mask), mask


def _in_turn(q_ref, keys, values, blocks: PagedBlocks, out_ref, *, tile: _Tile) -> None:
    rows = _rows_of(blocks, tile)
    q = _queries(q_ref, rows, tile)

    @pl.when(rows.some)
    def _():
        def add(split, done: Partial) -> Partial:
            return combine(done, _of_split(q, rows, keys, values, blocks, split, tile))

        _, total, out = jax.lax.fori_loop(0, cdiv(rows.end, tile.kv_split), add, _nothing(tile))
        out = out / jnp.where(total > 0, total, 1.0)[None]
        row, head, column, mask = _place(rows, tile)
        plgpu.store(out_ref.at[row, head * tile.width + column], out.T.astype(out_ref.dtype), mask=mask)


def _one_split(q_ref, keys, values, blocks: PagedBlocks, high_ref, total_ref, out_ref, *, tile: _Tile) -> None:
    rows, split = _rows_of(blocks, tile), pl.program_id(3)
    q = _queries(q_ref, rows, tile)

    @pl.when(rows.some & (split * tile.kv_split < rows.end))
    def _():
        high, total, out = _of_split(q, rows, keys, values, blocks, split, tile)
        for ref, x in ((high_ref, high), (total_ref, total)):
            plgpu.store(ref.at[split, rows.row, rows.head], x, mask=rows.there)
        *cells, mask = _place(rows, tile)
        plgpu.store(out_ref.at[(split, *cells)], out.T, mask=mask)


def _join(high_ref, total_ref, sums_ref, blocks: PagedBlocks, out_ref, *, r: int, kv_split: int) -> None:
    """The splits' partial results of one row and head, in their order."""
    row, head = pl.program_id(0), pl.program_id(1)
    width = sums_ref.shape[3]
    wide = power_of_two(width)
    mask = None if wide == width else jnp.arange(wide) < width
    block = row // r
    end = blocks.starts[block] + blocks.counts[block]

    def step(split, done: Partial) -> Partial:
        out = plgpu.load(sums_ref.at[split, row, head, pl.ds(0, wide)], mask=mask, other=None if mask is None else 0.0)
        return combine(done, Partial(high_ref[split, row, head], total_ref[split, row, head], out))

    @pl.when(row % r < blocks.counts[block])
    def _():
        start = Partial(jnp.float32(MASKED), jnp.float32(0.0), jnp.zeros((wide,), jnp.float32))
        _, total, out = jax.lax.fori_loop(0, cdiv(end, kv_split), step, start)
        y = (out / jnp.where(total > 0, total, 1.0)).astype(out_ref.dtype)
        plgpu.store(out_ref.at[row, pl.ds(head * width, wide)], y, mask=mask)
