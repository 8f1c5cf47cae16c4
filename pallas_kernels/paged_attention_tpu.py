"""Paged attention's TPU body: one grid step attends one query block; tiles of keys are copied page by page ahead of their use."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

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
from pallas_kernels.paged_attention_softmax import Partial, combine, empty, finish, fold, key_range, scores_of, visible
from pallas_kernels.sizes import LANES
from pallas_kernels.sizes_attention import AttentionSizes

VMEM_LIMIT = 64 * 2**20  # bytes: above the compiler's own 16 MiB, below every generation's VMEM
SUBLANE_BYTES = 32  # rows of a tile in memory times bytes of a number


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
    """Attention over pages; slots, starts and counts are read as scalars before the queries come, and a block's table with it: all
    tables of an engine with long contexts are more than the scalar memory holds.

    Raises ValueError for pools that a TPU cannot copy page by page (check_pool).
    """
    batch, r, num_heads, _ = q.shape
    _, num_kv_heads, page_size, h = pages.keys.shape
    check_pool(pages.keys, interpret)
    tables = cover_tiles(blocks.tables, page_size, sizes)
    rows = arrange(q, pages, scoring, sizes.rows)
    of_block = pl.BlockSpec((1, *rows.shape[1:]), lambda b, *_: (b, 0, 0, 0))
    whole = lambda x: pl.BlockSpec(x.shape, lambda b, *_: (0,) * x.ndim)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    tokens = tokens_of_rows(r, num_heads // num_kv_heads, sizes.rows)
    table = pl.BlockSpec((1, 1, tables.shape[1]), lambda b, slots, *_: (slots[b], 0, 0), memory_space=pltpu.SMEM)
    operands, specs = [tables[:, None], rows, tokens], [table, of_block, whole(tokens)]
    if sinks is not None:
        operands.append(sinks_of_rows(sinks, num_kv_heads, r, sizes.rows))
        specs.append(whole(operands[-1]))
    pools = [pages.keys, pages.values, *_scales_of_positions(pages, tables, page_size)]
    kernel = functools.partial(_kernel, has_sinks=sinks is not None, scoring=scoring, sizes=sizes, page_size=page_size)
    state = lambda width: pltpu.VMEM((*rows.shape[1:3], width), jnp.float32)
    out = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(rows.shape, jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(batch,),
            in_specs=[*specs, *[anywhere] * len(pools)],
            out_specs=of_block,
            scratch_shapes=[
                *map(state, (1, 1, h) * 2),
                pltpu.SemaphoreType.DMA((2,)),
                *_buffers(pools, num_kv_heads, sizes),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_LIMIT),
        name="paged_attention_tpu",
        interpret=interpret,
    )(blocks.slots, blocks.starts, blocks.counts, *operands, *pools)
    return restore(out, q)


def check_pool(pool: Array, interpret: bool) -> None:
    """Refuse pages that are no whole memory tiles (8 rows of 32 bits, 16 of 16, 32 of 8; lanes of 128) and, where compiled, float16.

    XLA keeps narrower pages in another layout and would copy the whole pool at every call.
    """
    page_size, h, dtype = *pool.shape[2:], pool.dtype
    unit = SUBLANE_BYTES // dtype.itemsize
    if page_size % unit:
        raise ValueError(
            f"on a TPU the page size of a {dtype.name} cache must be a multiple of {unit}, got {page_size}"
        )
    if not interpret and h % LANES:
        raise ValueError(
            f"on a TPU pages must be a multiple of {LANES} wide, got {h}: allocate them wider than the heads, with zeros"
        )
    if not interpret and dtype == jnp.float16:
        raise ValueError(
            "the TPU's kernels do not read float16 pages: keep the cache in bfloat16 or float32, or take implementation 'xla'"
        )


def _scales_of_positions(pages: Pages, tables: Array, page_size: int) -> list[Array]:
    """Key and value scales of every position of every sequence, [S, K, C], or nothing."""
    spread = lambda pool: jnp.repeat(pool[jnp.maximum(tables, 0)].swapaxes(1, 2), page_size, axis=2)
    return [spread(pool) for pool in (pages.key_scales, pages.value_scales) if pool is not None]


def _buffers(pools: list[Array], num_kv_heads: int, sizes: AttentionSizes) -> list:
    """Two tiles of every pool: one is used while the other is copied."""
    tile = lambda pool: (num_kv_heads, sizes.kv_tile, *pool.shape[3:])
    return [pltpu.VMEM((2, *tile(pool)), pool.dtype) for pool in pools]


def _kernel(
    slots,
    starts,
    counts,
    table,
    q,
    tokens,
    *refs,
    has_sinks: bool,
    scoring: Scoring,
    sizes: AttentionSizes,
    page_size: int,
):
    refs = list(refs)
    sinks = refs.pop(0) if has_sinks else None
    num_pools = (len(refs) - 8) // 2
    pools, (out, *state, semaphores), buffers = refs[:num_pools], refs[num_pools:-num_pools], refs[-num_pools:]
    partial, done = Partial(*state[:3]), Partial(*state[3:])
    b = pl.program_id(0)
    slot, start, count = slots[b], starts[b], counts[b]
    first, end = key_range(start, count, scoring.window)
    begin, stop = first // sizes.kv_tile, -(-end // sizes.kv_tile)
    copies = functools.partial(_copies, pools, buffers, semaphores, table, slot, first, end, page_size, sizes.kv_tile)
    _clear(partial)
    _clear(done)

    @pl.when(begin < stop)
    def _():
        _start(copies(begin))

    def step(i, _):
        @pl.when(i + 1 < stop)
        def _():
            _start(copies(i + 1))

        _wait(copies(i))
        positions = i * sizes.kv_tile + jax.lax.broadcasted_iota(jnp.int32, (1, sizes.kv_tile), 1)
        column = i * sizes.kv_tile + jax.lax.broadcasted_iota(jnp.int32, (sizes.kv_tile, 1), 0)
        _fold_tile(
            q,
            tokens,
            [buffer.at[i % 2] for buffer in buffers],
            partial,
            (column >= first) & (column < end),
            lambda t: visible(t, positions, start, count, scoring.window),
            scoring,
            sizes,
        )

        @pl.when(((i + 1) % sizes.split_tiles == 0) | (i + 1 == stop))
        def _():
            _each_tile_of_rows(q, sizes.rows, lambda at: _put(done, at, combine(_take(done, at), _take(partial, at))))
            _clear(partial)

        return 0

    jax.lax.fori_loop(begin, stop, step, 0)

    def write(at):
        out[0, *at] = finish(_take(done, at), None if sinks is None else sinks[at])

    _each_tile_of_rows(q, sizes.rows, write)


def _fold_tile(q, tokens, buffers, partial: Partial, in_context, sees, scoring: Scoring, sizes: AttentionSizes) -> None:
    """One tile of keys into the partial results of every head and tile of rows."""
    keys, values, *scales = buffers
    dtype = q.dtype

    def one(at):
        k, rows = at
        v = jnp.where(in_context, _widen(values[k], dtype), jnp.zeros((), dtype))
        key_scale, value_scale = (scale[pl.ds(k, 1)] for scale in scales) if scales else (None, None)
        scores = scores_of(q[0, *at], _widen(keys[k], dtype), key_scale, scoring)
        _put(
            partial,
            at,
            fold(_take(partial, at), scores, sees(tokens[rows]), v, value_scale, lambda x: x.sum(-1, keepdims=True)),
        )

    _each_tile_of_rows(q, sizes.rows, one)


def _widen(x: Array, dtype: jnp.dtype) -> Array:
    """8-bit numbers in the dots' dtype, by way of float32, from which every generation can narrow."""
    return x if x.dtype == dtype else x.astype(jnp.float32).astype(dtype)


def _each_tile_of_rows(q, size: int, body) -> None:
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
        ref[at] = x


def _clear(refs: Partial) -> None:
    blank = empty(1, 1)
    for ref, x in zip(refs, blank, strict=True):
        ref[...] = jnp.broadcast_to(x[None], ref.shape)


def _copies(
    pools, buffers, semaphores, table, slot, first, end, page_size: int, kv_tile: int, i
) -> Iterator[tuple[Array, list]]:
    """(whether a query sees any of it, the copies) for each page of tile i, from the pool to one of the two buffers."""
    keys, values, *scales = pools
    key_buffer, value_buffer, *scale_buffers = buffers
    copy = lambda source, target: pltpu.make_async_copy(source, target, semaphores.at[i % 2])
    for j in range(kv_tile // page_size):
        position = i * kv_tile + j * page_size
        page, rows = table[0, 0, i * (kv_tile // page_size) + j], pl.ds(j * page_size, page_size)
        yield (
            (position < end) & (position + page_size > first),
            [
                copy(keys.at[page], key_buffer.at[i % 2, :, rows]),
                copy(values.at[page], value_buffer.at[i % 2, :, rows]),
            ],
        )
    for pool, buffer in zip(scales, scale_buffers, strict=True):
        yield i >= 0, [copy(pool.at[slot, :, pl.ds(pl.multiple_of(i * kv_tile, kv_tile), kv_tile)], buffer.at[i % 2])]


def _start(copies: Iterator[tuple[Array, list]]) -> None:
    for wanted, some in copies:

        @pl.when(wanted)
        def _(some=some):
            for copy in some:
                copy.start()


def _wait(copies: Iterator[tuple[Array, list]]) -> None:
    for wanted, some in copies:

        @pl.when(wanted)
        def _(some=some):
            for copy in some:
                copy.wait()
