"""Paged attention's TPU body: a grid step attends one query block.

While a tile of keys is used the next is copied, and that goes on from block to block: with its last tile a block starts
the copies of the next block's first. So grid steps run in order, and their number is that of the live blocks.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.numbers import ceil_to
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

VMEM_LIMIT = 48 * 2**20  # bytes: three quarters of the smallest generation's VMEM
HEADS_AT_ONCE = 8  # key-value heads whose arithmetic may overlap; more are more code to compile


def paged_attention_tpu(
    q: Float[Array, "B r H h"],
    pages: Pages,
    blocks: PagedBlocks,
    sinks: Float[Array, " H"] | None,
    scoring: Scoring,
    sizes: AttentionSizes,
    *,
    interpret: Any = False,
) -> Float[Array, "B r H h"]:
    """Attention over pages, in float32.

    Raises ValueError for pools that a TPU cannot copy page by page (check_pool).
    """
    q = scaled(q, pages, scoring)
    return attention_of_scaled(q, pages, blocks, sinks, scoring, sizes, jnp.dtype(jnp.float32), interpret=interpret)


def attention_of_scaled(
    q: Float[Array, "B r H h"],
    pages: Pages,
    blocks: PagedBlocks,
    sinks: Float[Array, " H"] | None,
    scoring: Scoring,
    sizes: AttentionSizes,
    out_dtype: jnp.dtype,
    *,
    interpret: Any = False,
) -> Float[Array, "B r H h"]:
    """The same of queries that are scaled and in the dots' dtype, rounded to `out_dtype`.

    Slots, starts and counts are read as scalars before the queries come. A block's table and the next block's come
    with the block, because all tables of an engine with long contexts are more than the scalar memory holds. Results
    of blocks from `num_blocks` on are not written.
    """
    batch, r, num_heads, _ = q.shape
    _, num_kv_heads, page_size, h = pages.keys.shape
    check_pool(pages.keys, interpret)
    tables = cover_tiles(blocks.tables, page_size, sizes)
    rows = arrange(q, pages)
    of_block = pl.BlockSpec((1, *rows.shape[1:]), lambda b, *_: (b, 0, 0, 0))
    padded = num_kv_heads, ceil_to(rows.shape[2], sizes.rows), h
    tokens = tokens_of_rows(r, num_heads // num_kv_heads, sizes.rows)
    operands = tables[:, None], tables[:, None], rows, tokens
    of_rows = None if sinks is None else sinks_of_rows(sinks, num_kv_heads, r, sizes.rows)
    pools = with_scales_of_positions(pages, tables, page_size)
    anywhere = jax.tree.map(lambda _: pl.BlockSpec(memory_space=pl.ANY), pools)
    out = pl.pallas_call(
        functools.partial(_kernel, scoring=scoring, sizes=sizes, page_size=page_size),
        out_shape=jax.ShapeDtypeStruct(rows.shape, out_dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(blocks.num_blocks,),
            in_specs=[
                _table_of(0, tables, batch),
                _table_of(1, tables, batch),
                of_block,
                _whole(tokens),
                None if of_rows is None else _whole(of_rows),
                anywhere,
            ],
            out_specs=of_block,
            scratch_shapes=[
                pltpu.VMEM(padded, rows.dtype),
                _partial(padded),
                _partial(padded),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.SemaphoreType.DMA((2,)),
                buffers_of(pools, num_kv_heads, sizes),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_LIMIT),
        name="paged_attention_tpu",
        interpret=interpret,
    )(blocks.slots, blocks.starts, blocks.counts, *operands, of_rows, pools)
    return restore(out, q)


def _table_of(ahead: int, tables: Array, batch: int) -> pl.BlockSpec:
    """The table of the block so many places after the grid step's own, or of the last."""

    def index(b, slots, *_):
        return slots[jnp.minimum(b + ahead, batch - 1)], 0, 0

    return pl.BlockSpec((1, 1, tables.shape[1]), index, memory_space=pltpu.SMEM)


def _whole(x: Array) -> pl.BlockSpec:
    """All of x at every grid step."""
    return pl.BlockSpec(x.shape, lambda b, *_: (0,) * x.ndim)


def _partial(shape: tuple[int, ...]) -> Any:
    """A Partial of room for the results of one block's rows, [K, m, h]."""
    num_kv_heads, m, h = shape
    high, total, out = (pltpu.VMEM((num_kv_heads, m, width), jnp.float32) for width in (1, 1, h))
    return Partial(high, total, out)  # pyright: ignore[reportArgumentType] # shapes in the place of arrays


def _kernel(
    slots,
    starts,
    counts,
    table,
    next_table,
    q_of_block,
    tokens,
    sinks,
    pools: Pages,
    out,
    q,
    partial: Partial,
    done: Partial,
    turn,
    semaphores,
    buffers: Pages,
    *,
    scoring: Scoring,
    sizes: AttentionSizes,
    page_size: int,
):
    """`sinks` is None where there are none; `q` are the block's queries, padded to whole tiles of rows; `partial` is
    the result of the split at hand, `done` that of the splits before. `turn[0]` is the buffer of the block's first
    tile."""
    b, last = pl.program_id(0), pl.num_programs(0) - 1
    start, count = starts[b], counts[b]

    def fetch_of(b, table):
        first, end = key_range(starts[b], counts[b], scoring.window)
        return Fetch(pools, buffers, semaphores, table, slots[b], first, end, page_size, sizes.kv_tile)

    fetch, of_next = fetch_of(b, table), fetch_of(jnp.minimum(b + 1, last), next_table)
    first, end, begin, stop = fetch.first, fetch.end, fetch.begin, fetch.stop
    _clear(partial)
    _clear(done)

    @pl.when(b == 0)
    def _():
        turn[0] = 0
        fetch.start_first(0)
        q[...] = jnp.zeros_like(q)

    num_rows = q_of_block.shape[2]
    q[:, :num_rows] = q_of_block[0]
    first_buffer = turn[0]
    turn[0] = (first_buffer + stop - begin) & 1

    @pl.when((b < last) & (begin == stop))
    def _():
        of_next.start_first(first_buffer)

    def end_split(at):
        _put(done, at, combine(_take(done, at), _take(partial, at)))

    def step(i, _):
        buffer = (first_buffer + i - begin) & 1

        @pl.when(i + 1 < stop)
        def _():
            fetch.start(i + 1, 1 - buffer)

        @pl.when((b < last) & (i + 1 == stop))
        def _():
            of_next.start_first(1 - buffer)

        fetch.wait(i, buffer)
        positions = i * sizes.kv_tile + jax.lax.broadcasted_iota(jnp.int32, (1, sizes.kv_tile), 1)
        column = i * sizes.kv_tile + jax.lax.broadcasted_iota(jnp.int32, (sizes.kv_tile, 1), 0)

        def sees(rows):
            return visible(tokens[rows], positions, start, count, scoring.window)

        _fold_tile(q, fetch.tile(buffer), partial, (column >= first) & (column < end), sees, scoring, sizes)

        @pl.when(((i + 1) % sizes.split_tiles == 0) | (i + 1 == stop))
        def _():
            _each_tile_of_rows(q, sizes.rows, end_split)
            _clear(partial)

        return 0

    jax.lax.fori_loop(begin, stop, step, 0)

    def write(at):
        head, rows = at
        y = finish(_take(done, at), None if sinks is None else sinks[at])
        count = min(sizes.rows, num_rows - rows.start)
        out[0, head, pl.ds(rows.start, count)] = y[:count].astype(out.dtype)

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
        scores = scores_of(q[at], _widen(tile.keys[k], dtype), key_scale, scoring)
        _put(partial, at, fold(_take(partial, at), scores, sees(rows), v, value_scale, lane_sum))

    _each_tile_of_rows(q, sizes.rows, one)


def _widen(x: Array, dtype: jnp.dtype) -> Array:
    """8-bit numbers in the dots' dtype, by way of float32, from which every generation of TPUs can narrow."""
    return x if x.dtype == dtype else x.astype(jnp.float32).astype(dtype)


def _each_tile_of_rows(q, size: int, body: Callable) -> None:
    """body((head, rows)) for every key-value head and tile of rows, HEADS_AT_ONCE in a row without a loop, so that the
    matrix unit works for one head while another's softmax is computed."""

    def head(k, _):
        for m in range(0, q.shape[1], size):
            body((k, pl.ds(m, size)))
        return 0

    jax.lax.fori_loop(0, q.shape[0], head, 0, unroll=min(HEADS_AT_ONCE, q.shape[0]))


def _take(refs: Partial, at) -> Partial:
    return Partial(*(ref[at] for ref in refs))


def _put(refs: Partial, at, partial: Partial) -> None:
    for ref, x in zip(refs, partial, strict=True):
        ref[at] = x  # pyright: ignore[reportIndexIssue] # a ref, in the place of an array


def _clear(refs: Partial) -> None:
    for ref, x in zip(refs, empty(1, 1), strict=True):
        ref[...] = jnp.broadcast_to(x[None], ref.shape)  # pyright: ignore[reportIndexIssue]
