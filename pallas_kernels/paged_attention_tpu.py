"""Paged attention's TPU body: a grid step attends one query block, and copies a tile of keys while it uses the last."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.numbers import cdiv
from pallas_kernels.paged_attention_inputs import (
    PagedBlocks,
    Pages,
    Scoring,
    arrange,
    cover_tiles,
    restore,
    sinks_of_rows,
    tokens_of_rows,
)
from pallas_kernels.paged_attention_softmax import (
    Partial,
    combine,
    empty,
    finish,
    fold,
    key_range,
    lane_sum,
    scores_of,
    visible,
)
from pallas_kernels.paged_attention_tpu_pages import Fetch, buffers_of, check_pool, with_scales_of_positions
from pallas_kernels.sizes_attention import AttentionSizes

VMEM_LIMIT = 64 * 2**20  # bytes: above the compiler's own 16 MiB, below every generation's VMEM


def paged_attention_tpu(
    q: Float[Array, "B r H h"],
    pages: Pages,
    blocks: PagedBlocks,
    sinks: Float[Array, " H"] | None,
    scoring: Scoring,
    sizes: AttentionSizes,
    *,
    interpret: bool = False,
) -> Float[Array, "B r H h"]:
    """Attention over pages. Slots, starts and counts are read as scalars before the queries come. A block's table
    comes with the block, because all tables of an engine with long contexts are more than the scalar memory holds.

    Raises ValueError for pools that a TPU cannot copy page by page (check_pool).
    """
    batch, r, num_heads, _ = q.shape
    _, num_kv_heads, page_size, h = pages.keys.shape
    check_pool(pages.keys, interpret)
    tables = cover_tiles(blocks.tables, page_size, sizes)
    rows = arrange(q, pages, scoring, sizes.rows)
    of_block = pl.BlockSpec((1, *rows.shape[1:]), lambda b, *_: (b, 0, 0, 0))
    tokens = tokens_of_rows(r, num_heads // num_kv_heads, sizes.rows)
    of_table = pl.BlockSpec((1, 1, tables.shape[1]), lambda b, slots, *_: (slots[b], 0, 0), memory_space=pltpu.SMEM)
    operands = tables[:, None], rows, tokens
    of_rows = None if sinks is None else sinks_of_rows(sinks, num_kv_heads, r, sizes.rows)
    pools = with_scales_of_positions(pages, tables, page_size)
    anywhere = jax.tree.map(lambda _: pl.BlockSpec(memory_space=pl.ANY), pools)
    out = pl.pallas_call(
        functools.partial(_kernel, scoring=scoring, sizes=sizes, page_size=page_size),
        out_shape=jax.ShapeDtypeStruct(rows.shape, jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch,),
            in_specs=[of_table, of_block, _whole(tokens), None if of_rows is None else _whole(of_rows), anywhere],
            out_specs=of_block,
            scratch_shapes=[
                _partial(rows.shape),
                _partial(rows.shape),
                pltpu.SemaphoreType.DMA((2,)),
                buffers_of(pools, num_kv_heads, sizes),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_LIMIT),
        name="paged_attention_tpu",
        interpret=interpret,
    )(blocks.slots, blocks.starts, blocks.counts, *operands, of_rows, pools)
    return restore(out, q)


def _whole(x: Array) -> pl.BlockSpec:
    """All of x at every grid step."""
    return pl.BlockSpec(x.shape, lambda b, *_: (0,) * x.ndim)


def _partial(shape: tuple[int, ...]) -> Any:
    """A Partial of room for the results of one block's rows, of which all blocks' are [B, K, m, h]."""
    _, num_kv_heads, m, h = shape
    high, total, out = (pltpu.VMEM((num_kv_heads, m, width), jnp.float32) for width in (1, 1, h))
    return Partial(high, total, out)  # pyright: ignore[reportArgumentType] # shapes in the place of arrays


def _kernel(
    slots,
    starts,
    counts,
    table,
    q,
    tokens,
    sinks,
    pools: Pages,
    out,
    partial: Partial,
    done: Partial,
    semaphores,
    buffers: Pages,
    *,
    scoring: Scoring,
    sizes: AttentionSizes,
    page_size: int,
):
    """`sinks` is None where there are none; `partial` is the result of the split at hand, `done` that of the splits
    before."""
    b = pl.program_id(0)
    slot, start, count = slots[b], starts[b], counts[b]
    first, end = key_range(start, count, scoring.window)
    begin, stop = first // sizes.kv_tile, cdiv(end, sizes.kv_tile)
    fetch = Fetch(pools, buffers, semaphores, table, slot, first, end, page_size, sizes.kv_tile)
    _clear(partial)
    _clear(done)

    @pl.when(begin < stop)
    def _():
        fetch.start(begin)

    def end_split(at):
        _put(done, at, combine(_take(done, at), _take(partial, at)))

    def step(i, _):
        @pl.when(i + 1 < stop)
        def _():
            fetch.start(i + 1)

        fetch.wait(i)
        positions = i * sizes.kv_tile + jax.lax.broadcasted_iota(jnp.int32, (1, sizes.kv_tile), 1)
        column = i * sizes.kv_tile + jax.lax.broadcasted_iota(jnp.int32, (sizes.kv_tile, 1), 0)

        def sees(rows):
            return visible(tokens[rows], positions, start, count, scoring.window)

        tile = fetch.tile(i)
        _fold_tile(q, tile, partial, (column >= first) & (column < end), sees, scoring, sizes)

        @pl.when(((i + 1) % sizes.split_tiles == 0) | (i + 1 == stop))
        def _():
            _each_tile_of_rows(q, sizes.rows, end_split)
            _clear(partial)

        return 0

    jax.lax.fori_loop(begin, stop, step, 0)

    def write(at):
        out[0, *at] = finish(_take(done, at), None if sinks is None else sinks[at])

    _each_tile_of_rows(q, sizes.rows, write)


def _fold_tile(
    q, tile: Pages, partial: Partial, in_context, sees: Callable, scoring: Scoring, sizes: AttentionSizes
) -> None:
    """One tile of keys into the partial results of every head and tile of rows. `sees(rows)`: which keys the rows
    see."""
    dtype = q.dtype

    def one(at):
        k, rows = at
        v = jnp.where(in_context, _widen(tile.values[k], dtype), jnp.zeros((), dtype))
        scales = (tile.key_scales, tile.value_scales)
        key_scale, value_scale = (None if scale is None else scale[pl.ds(k, 1)] for scale in scales)
        scores = scores_of(q[0, *at], _widen(tile.keys[k], dtype), key_scale, scoring)
        _put(partial, at, fold(_take(partial, at), scores, sees(rows), v, value_scale, lane_sum))

    _each_tile_of_rows(q, sizes.rows, one)


def _widen(x: Array, dtype: jnp.dtype) -> Array:
    """8-bit numbers in the dots' dtype, by way of float32, from which every generation of TPUs can narrow."""
    return x if x.dtype == dtype else x.astype(jnp.float32).astype(dtype)


def _each_tile_of_rows(q, size: int, body: Callable) -> None:
    """body((head, rows)) for every key-value head and tile of rows."""

    def head(k, _):
        for m in range(0, q.shape[2], size):
            body((k, pl.ds(m, size)))
        return 0

    jax.lax.fori_loop(0, q.shape[1], head, 0)


def _take(refs: Partial, at) -> Partial:
    return Partial(*(ref[at] for ref in refs))


def _put(refs: Partial, at, partial: Partial) -> None:
    for ref, x in zip(refs, partial, strict=True):
        ref[at] = x  # pyright: ignore[reportIndexIssue] # a ref, in the place of an array


def _clear(refs: Partial) -> None:
    for ref, x in zip(refs, empty(1, 1), strict=True):
        ref[...] = jnp.broadcast_to(x[None], ref.shape)  # pyright: ignore[reportIndexIssue]
