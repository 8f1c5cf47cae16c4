"""Paged attention's GPU body (Triton): a program takes a tile of rows of one key-value head, and gathers keys by page
ids.

Decoding has few rows, so there the splits of a context are computed side by side, and a second kernel combines them in
their order. Otherwise a program computes its splits in turn. Both give the same bits.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from pallas_kernels.gpu_call import call
from pallas_kernels.numbers import cdiv
from pallas_kernels.paged_attention_inputs import (
    NO_TOKEN,
    PagedBlocks,
    Pages,
    Scoring,
    arrange,
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
from pallas_kernels.sizes_attention import AttentionSizes


def paged_attention_gpu(
    q: Float[Array, "B r H h"],
    pages: Pages,
    blocks: PagedBlocks,
    sinks: Float[Array, " H"] | None,
    scoring: Scoring,
    sizes: AttentionSizes,
    *,
    interpret: bool = False,
    side_by_side: bool | None = None,
) -> Float[Array, "B r H h"]:
    """Attention over pages. `side_by_side`: whether splits are programs of their own; by default they are when
    decoding.

    Raises ValueError for a head width that is no power of two from 16 on, because Triton's arrays have such sizes only.
    """
    _, r, num_heads, _ = q.shape
    _, num_kv_heads, page_size, h = pages.keys.shape
    if h < 16 or h & (h - 1):
        raise ValueError(
            f"the GPU's attention takes head widths 16, 32, 64, 128, 256, got {h}: take implementation 'xla'"
        )
    group = num_heads // num_kv_heads
    rows = arrange(scaled(q, pages, scoring), pages, sizes.rows)
    num_splits = cdiv(blocks.tables.shape[1] * page_size, sizes.split)
    blocks = blocks._replace(num_blocks=None)  # the programs of padding see its count of 0
    side_by_side = r == 1 if side_by_side is None else side_by_side
    of_rows = None if sinks is None else sinks_of_rows(sinks, num_kv_heads, r, sizes.rows)
    tokens = tokens_of_rows(r, group, sizes.rows)
    out_shape = jax.ShapeDtypeStruct(rows.shape, jnp.float32)
    grid = rows.shape[0], rows.shape[1], rows.shape[2] // sizes.rows  # block, key-value head, tile of rows

    def run(kernel: Callable, name: str, grid: tuple[int, ...], out_shape: Any, *inputs: Any) -> Any:
        kernel = functools.partial(kernel, scoring=scoring, sizes=sizes)
        return call(name, kernel, grid, out_shape, *inputs, interpret=interpret)

    if not side_by_side or num_splits == 1:
        out = run(_in_turn, "paged_attention_gpu", grid, out_shape, blocks, tokens, rows, pages, of_rows)
        return restore(out, q)
    # Of the partial results only the rows of tokens take memory: when decoding, most rows of a tile only fill it.
    shape = (num_splits, *rows.shape[:2], r * group)
    shapes = tuple(jax.ShapeDtypeStruct((*shape, width), jnp.float32) for width in (1, 1, h))
    name = "paged_attention_gpu_splits"
    partials = run(_one_split, name, (*grid, num_splits), shapes, blocks, tokens, rows, pages)
    out = run(_join, "paged_attention_gpu_join", grid, out_shape, blocks, tokens, Partial(*partials), of_rows)
    return restore(out, q)


def _place(sizes: AttentionSizes) -> tuple:
    """The (block, key-value head, rows) of this program."""
    return pl.program_id(0), pl.program_id(1), pl.ds(pl.program_id(2) * sizes.rows, sizes.rows)


def _in_turn(
    blocks: PagedBlocks, tokens, rows, pages: Pages, sinks, out, *, scoring: Scoring, sizes: AttentionSizes
) -> None:
    """All splits of a context one after the other, then the attention. `sinks` is None where there are none."""
    b, k, m = _place(sizes)
    reader = _reader(blocks, tokens, rows, pages, (b, k, m), scoring, sizes)

    def step(s, done):
        return combine(done, reader.attend(s))

    begin, stop = reader.first // sizes.split, pl.cdiv(reader.end, sizes.split)
    done = jax.lax.fori_loop(begin, stop, step, empty(sizes.rows, rows.shape[3]))
    out[b, k, m] = finish(done, None if sinks is None else sinks[k, m])


def _one_split(blocks: PagedBlocks, tokens, rows, pages: Pages, *out, scoring: Scoring, sizes: AttentionSizes) -> None:
    """One split's partial result, if the context reaches into it. `out` are the refs of a Partial."""
    place, s = _place(sizes), pl.program_id(3)
    reader = _reader(blocks, tokens, rows, pages, place, scoring, sizes)

    @pl.when((s >= reader.first // sizes.split) & (s * sizes.split < reader.end))
    def _():
        for ref, x in zip(out, reader.attend(s), strict=True):
            cells, mask = _cells(place, tokens, x.shape, s)
            plgpu.store(ref.at[cells], x, mask=mask)


def _cells(place: tuple, tokens, shape: tuple[int, ...], s) -> tuple[tuple, Array]:
    """(indices of this program's rows in split s of the partial results, which of these rows belong to a token).

    Rows that belong to none are not in the partial results.
    """
    b, k, m = place
    rows = m.start + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    columns = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    mask = jnp.broadcast_to(tokens[m] < NO_TOKEN, shape)
    return (s, b, k, rows, columns), mask


def _join(
    blocks: PagedBlocks, tokens, partials: Partial, sinks, out, *, scoring: Scoring, sizes: AttentionSizes
) -> None:
    """The splits' partial results in their order, as the attention."""
    b, k, m = _place(sizes)
    first, end = key_range(blocks.starts[b], blocks.counts[b], scoring.window)
    blank = empty(sizes.rows, out.shape[3])

    def read(ref, s, x):
        cells, mask = _cells((b, k, m), tokens, x.shape, s)
        return plgpu.load(ref.at[cells], mask=mask, other=0.0)

    def step(s, done):
        return combine(done, Partial(*(read(ref, s, x) for ref, x in zip(partials, blank, strict=True))))

    done = jax.lax.fori_loop(first // sizes.split, pl.cdiv(end, sizes.split), step, blank)
    out[b, k, m] = finish(done, None if sinks is None else sinks[k, m])


class _Reader(NamedTuple):
    """How a program reads its block's context."""

    attend: Callable[[Any], Partial]  # a split -> its partial result
    first: Array  # of the positions whose keys the block sees
    end: Array


def _reader(
    blocks: Any, tokens: Any, rows: Any, pages: Any, place: tuple, scoring: Scoring, sizes: AttentionSizes
) -> _Reader:
    b, k, m = place
    slot, start, count = blocks.slots[b], blocks.starts[b], blocks.counts[b]
    first, end = key_range(start, count, scoring.window)
    q, own_tokens = rows[place], tokens[m]
    page_size, other = pages.keys.shape[2], 0 if pages.keys.dtype == jnp.int8 else 0.0

    def spread(x):
        return jnp.broadcast_to(x, (sizes.kv_tile, q.shape[1]))

    def tile(i, partial):
        positions = i * sizes.kv_tile + jnp.arange(sizes.kv_tile, dtype=jnp.int32)
        in_context = (positions >= first) & (positions < end)
        ids = plgpu.load(blocks.tables.at[slot, positions // page_size], mask=in_context, other=0)
        page_ids, offsets = spread(ids[:, None]), spread((positions % page_size)[:, None])
        numbers = (page_ids, k, offsets, spread(jnp.arange(q.shape[1], dtype=jnp.int32)))

        def read(pool):
            return plgpu.load(pool.at[numbers], mask=spread(in_context[:, None]), other=other).astype(q.dtype)

        def scales(pool):
            return None if pool is None else plgpu.load(pool.at[ids, k], mask=in_context, other=0.0)[None]

        scores = scores_of(q, read(pages.keys), scales(pages.key_scales), scoring)
        seen = visible(own_tokens, positions[None], start, count, scoring.window)
        return fold(partial, scores, seen, read(pages.values), scales(pages.value_scales), lane_sum)

    def attend(s):
        begin = jnp.maximum(first // sizes.kv_tile, s * sizes.split_tiles)
        stop = jnp.minimum(pl.cdiv(end, sizes.kv_tile), (s + 1) * sizes.split_tiles)
        return jax.lax.fori_loop(begin, stop, tile, empty(sizes.rows, q.shape[1]))

    return _Reader(attend, first, end)
