"""Causal attention over pages: scores as [keys, queries], so that keys are a wgmma's 64 and queries the side of which
it takes any multiple of 8.

The arithmetic is that of paged_attention_softmax.py: to base 2, with a running maximum that is a whole number, so that
rescaling is exact and it makes no difference whether splits of a context run side by side or in turn. Its Partial of n
queries is transposed here: high and total [n], out [h, n].

In prefill a program takes several blocks of one sequence, so that keys are read once for all of them. A row then meets
tiles of keys after its own, of which it sees nothing. They leave its maximum and its sums as they are: weights are 0,
and the factor of what was added before is 1. Values must be finite there, because 0 · NaN is NaN.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from pallas_kernels.chain_gpu.blocks import by_columns, new, over_keys
from pallas_kernels.chain_gpu.sizes import ChainSizes, attend_sizes
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
    free, out = attend_sizes(sizes, r, group, page_width), new((num_rows, heads * width), keys.dtype)
    together = 1 if r == 1 else free.rows // math.gcd(free.rows, r * group)  # so that they fill programs
    num_splits = cdiv(blocks.tables.shape[1] * page_size, sizes.kv_split)
    tile = _Tile(r, group, together, free.rows, width, page_width, sizes.kv_tile, sizes.kv_split, interpret)
    grid, inputs = (batch, num_kv_heads, cdiv(together * r * group, free.rows)), (q, keys, values, blocks)
    how: dict[str, Any] = dict(interpret=interpret, warps=free.warps, stages=free.stages)
    if num_splits == 1 or not (r == 1 if apart is None else apart):
        return call("chain_attend", functools.partial(_in_turn, tile=tile), grid, out, *inputs, **how)
    few = new((num_splits, num_rows, heads))
    some = [few, few, new((num_splits, num_rows, heads, width))]
    partials = call(
        "chain_attend_splits", functools.partial(_one_split, tile=tile), (*grid, num_splits), some, *inputs, **how
    )
    join = functools.partial(_join, r=r, kv_split=sizes.kv_split)
    return call("chain_join", join, (num_rows, heads), out, *partials, blocks, interpret=interpret, warps=1)


class _Tile(NamedTuple):
    """What a program takes: `rows` pairs of a token of its blocks and a head of its group, and keys by tiles."""

    r: int
    group: int
    together: int  # blocks of one sequence that a program may take
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
    last: Array  # position of the last key that it sees; -1 where it is no token's
    end: Array  # positions before it have keys
    slot: Array
    kv_head: Array
    some: Array  # whether any row is a token's


def _rows_of(blocks: PagedBlocks, tile: _Tile) -> _Rows:
    b, k = pl.program_id(0), pl.program_id(1)
    own = pl.program_id(2) * tile.rows + jnp.arange(tile.rows)
    token, head = own // tile.group, k * tile.group + own % tile.group
    start, count = blocks.starts[b], tokens_taken(blocks, b, tile.r, tile.together)
    some = pl.program_id(2) * tile.rows // tile.group < count
    there, row = token < count, b * tile.r + token
    return _Rows(row, head, there, jnp.where(there, start + token, -1), start + count, blocks.slots[b], k, some)


def tokens_taken(blocks: PagedBlocks, b: Any, r: int, together: int) -> Array:
    """How many tokens the program of block b takes: the block's, and those of the blocks after it, up to a multiple of
    `together`, that go on with its sequence. None where the block itself goes on with one that another program takes.
    """
    count, last = blocks.counts[b], blocks.counts.shape[0] - 1
    if together == 1:
        return count

    def goes_on(at: Any) -> Array:
        own, before = (jnp.clip(block, 0, last) for block in (at, at - 1))  # no block goes on with itself
        follows = (blocks.counts[before] == r) & (blocks.starts[own] == blocks.starts[before] + r)
        return (at % together > 0) & follows & (blocks.slots[own] == blocks.slots[before])

    # Scalars: as a reduction over a vector of blocks this took so many registers that the sums spilled.
    is_taken, still = goes_on(b), True
    for after in range(1, together):
        still = still & goes_on(b + after)
        count += jnp.where(still, blocks.counts[jnp.minimum(b + after, last)], 0)
    return jnp.where(is_taken, 0, count)


def _queries(q_ref, rows: _Rows, tile: _Tile) -> Float[Array, "n h"]:
    *cells, mask = _place(rows, tile)
    return plgpu.load(q_ref.at[tuple(cells)], mask=mask, other=0)


def _spread(x: Array, like: Array) -> Array:
    return jnp.broadcast_to(x, like.shape)


def _of_split(q: Array, rows: _Rows, keys, values, blocks: Any, split, tile: _Tile) -> Partial:
    page_size = keys.shape[2]
    columns = jnp.arange(tile.page_width, dtype=jnp.int32)[None]
    end = jnp.minimum(rows.end, (split + 1) * tile.kv_split)

    def positions(i) -> Array:
        return i * tile.kv_tile + jnp.arange(tile.kv_tile, dtype=jnp.int32)

    def load(pool, i) -> Float[Array, "kv_tile h"]:
        at = positions(i)
        in_context = at < end
        ids = plgpu.load(blocks.tables.at[rows.slot, at // page_size], mask=in_context, other=0)
        mask = jnp.broadcast_to(in_context[:, None], (tile.kv_tile, tile.page_width))
        cells = (
            _spread(ids[:, None], mask),
            rows.kv_head,
            _spread((at % page_size)[:, None], mask),
            _spread(columns, mask),
        )
        return plgpu.load(pool.at[cells], mask=mask, other=0.0)

    def score(i) -> Float[Array, "kv_tile n"]:
        return by_columns(load(keys, i), q, tile.interpret)

    def fold(i, done: Partial, scores: Array) -> Partial:
        seen = positions(i)[:, None] <= rows.last[None]
        scores = jnp.where(seen, scores, MASKED)
        high = jnp.maximum(done.high, jnp.ceil(scores.max(0)))
        weights, shrink = jnp.where(seen, exp2(scores - high[None]), 0.0), exp2(done.high - high)
        more = by_columns(load(values, i).T, weights.astype(values.dtype).T, tile.interpret)
        return Partial(high, done.total * shrink + over_keys(weights, tile.interpret), done.out * shrink[None] + more)

    def step(i, done: Partial) -> Partial:
        return fold(i, done, score(i))

    def step_ahead(i, carried: tuple[Partial, Array]) -> tuple[Partial, Array]:
        done, scores = carried
        return fold(i, done, scores), score(i + 1)

    first, stop = split * (tile.kv_split // tile.kv_tile), cdiv(end, tile.kv_tile)
    if tile.r == 1:
        return jax.lax.fori_loop(first, stop, step, _nothing(tile))
    # Scores are computed a turn ahead. Where Triton sees a dot take another's result, it gives all eight warps to the
    # first one's 64 keys, and half of them repeat the other half; it does not look from one turn of a loop to the next.
    return jax.lax.fori_loop(first, stop, step_ahead, (_nothing(tile), score(first)))[0]


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

    @pl.when(rows.some)
    def _():
        q = _queries(q_ref, rows, tile)

        def add(split, done: Partial) -> Partial:
            return combine(done, _of_split(q, rows, keys, values, blocks, split, tile))

        _, total, out = jax.lax.fori_loop(0, cdiv(rows.end, tile.kv_split), add, _nothing(tile))
        y = finished(total[None], out)
        row, head, column, mask = _place(rows, tile)
        plgpu.store(out_ref.at[row, head * tile.width + column], y.T.astype(out_ref.dtype), mask=mask)


def finished(total: Array, out: Array) -> Array:
    """out / total, with 0 for -0: a tile of which a row sees nothing adds zeros, and they make +0 of a -0."""
    return jnp.where(out == 0, 0.0, out) / jnp.where(total > 0, total, 1.0)


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
        y = finished(total, out).astype(out_ref.dtype)
        plgpu.store(out_ref.at[row, pl.ds(head * width, wide)], y, mask=mask)
