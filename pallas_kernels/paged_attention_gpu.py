"""Paged attention's GPU body, in Triton: a program takes a tile of rows of one key-value head and gathers keys by their pages' ids.

Decoding has few rows, so there a context's splits are computed side by side and combined in their order by a second kernel; otherwise a
program takes its splits in turn. Both give the same bits.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from pallas_kernels.paged_attention_inputs import (
    NO_TOKEN,
    PagedBlocks,
    Pages,
    Scoring,
    arrange,
    restore,
    sinks_of_rows,
    tokens_of_rows,
)
from pallas_kernels.paged_attention_softmax import Partial, combine, empty, finish, fold, key_range, scores_of, visible
from pallas_kernels.sizes_attention import AttentionSizes

WHOLE = pl.BlockSpec(memory_space=pl.ANY)


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
    """Attention over pages. `side_by_side`: whether splits are programs of their own; unless given, when decoding.

    Raises ValueError for a head width that is no power of two from 16 on: Triton's arrays have such sizes.
    """
    _, r, num_heads, _ = q.shape
    _, num_kv_heads, page_size, h = pages.keys.shape
    if h < 16 or h & (h - 1):
        raise ValueError(
            f"the GPU's attention takes head widths 16, 32, 64, 128, 256, got {h}: take implementation 'xla'"
        )
    rows = arrange(q, pages, scoring, sizes.rows)
    num_splits = -(-blocks.tables.shape[1] * page_size // sizes.split)
    side_by_side = r == 1 if side_by_side is None else side_by_side
    of_rows = () if sinks is None else (sinks_of_rows(sinks, num_kv_heads, r, sizes.rows),)
    inputs = [blocks, tokens_of_rows(r, num_heads // num_kv_heads, sizes.rows), rows, pages]
    call = functools.partial(_call, rows, sizes, interpret)
    own = dict(scoring=scoring, sizes=sizes)
    if not side_by_side or num_splits == 1:
        out = call(functools.partial(_in_turn, **own), "paged_attention_gpu", (), [*inputs, of_rows])
    else:
        of_tokens = (
            r * num_heads // num_kv_heads
        )  # rows that only fill a tile are most of it when decoding, and take no memory here
        shapes = tuple(
            jax.ShapeDtypeStruct((num_splits, *rows.shape[:2], of_tokens, width), jnp.float32) for width in (1, 1, h)
        )
        partials = call(
            functools.partial(_one_split, **own), "paged_attention_gpu_splits", (num_splits,), inputs, shapes
        )
        out = call(
            functools.partial(_join, **own), "paged_attention_gpu_join", (), [*inputs[:2], Partial(*partials), of_rows]
        )
    return restore(out, q)


def _call(
    rows: Array,
    sizes: AttentionSizes,
    interpret: bool,
    kernel,
    name: str,
    more_programs: tuple[int, ...],
    inputs,
    out_shape=None,
):
    """`kernel(*inputs' refs, out's refs)` for every block, key-value head and tile of rows."""
    out_shape = jax.ShapeDtypeStruct(rows.shape, jnp.float32) if out_shape is None else out_shape
    return pl.pallas_call(
        kernel,
        grid=(rows.shape[0], rows.shape[1], rows.shape[2] // sizes.rows, *more_programs),
        in_specs=jax.tree.map(lambda _: WHOLE, inputs),
        out_specs=jax.tree.map(lambda _: WHOLE, out_shape),
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        name=name,
        interpret=interpret,
    )(*inputs)


def _at(sizes: AttentionSizes) -> tuple:
    """The (block, key-value head, rows) of this program."""
    return pl.program_id(0), pl.program_id(1), pl.ds(pl.program_id(2) * sizes.rows, sizes.rows)


def _in_turn(
    blocks: PagedBlocks, tokens, rows, pages: Pages, sinks, out, *, scoring: Scoring, sizes: AttentionSizes
) -> None:
    """All of a context's splits, then the attention."""
    at = _at(sizes)
    attend, first, end = _reader(blocks, tokens, rows, pages, at, scoring, sizes)
    step = lambda s, done: combine(done, attend(s))
    done = jax.lax.fori_loop(first // sizes.split, pl.cdiv(end, sizes.split), step, empty(sizes.rows, rows.shape[3]))
    out[at] = finish(done, sinks[0][at[1:]] if sinks else None)


def _one_split(blocks: PagedBlocks, tokens, rows, pages: Pages, *out, scoring: Scoring, sizes: AttentionSizes) -> None:
    """One split's partial result, where the context has it."""
    at, s = _at(sizes), pl.program_id(3)
    attend, first, end = _reader(blocks, tokens, rows, pages, at, scoring, sizes)

    @pl.when((s >= first // sizes.split) & (s * sizes.split < end))
    def _():
        for ref, x in zip(out, attend(s), strict=True):
            cells, mask = _cells(at, tokens, x.shape, s)
            plgpu.store(ref.at[cells], x, mask=mask)


def _cells(at: tuple, tokens, shape: tuple[int, int], s) -> tuple[tuple, Array]:
    """(indices of this program's rows in split s of the partial results, which of the rows belong to a token and are there)."""
    b, k, m = at
    rows = m.start + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    columns = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    mask = jnp.broadcast_to(tokens[m] < NO_TOKEN, shape)
    return (s, b, k, rows, columns), mask


def _join(
    blocks: PagedBlocks, tokens, partials: Partial, sinks, out, *, scoring: Scoring, sizes: AttentionSizes
) -> None:
    """The splits' partial results in their order. Rows that only fill a tile were not written and are not read back."""
    at = _at(sizes)
    first, end = key_range(blocks.starts[at[0]], blocks.counts[at[0]], scoring.window)
    blank = empty(sizes.rows, out.shape[3])

    def read(ref, s, x):
        cells, mask = _cells(at, tokens, x.shape, s)
        return plgpu.load(ref.at[cells], mask=mask, other=0.0)

    step = lambda s, done: combine(done, Partial(*(read(ref, s, x) for ref, x in zip(partials, blank, strict=True))))
    done = jax.lax.fori_loop(first // sizes.split, pl.cdiv(end, sizes.split), step, blank)
    out[at] = finish(done, sinks[0][at[1:]] if sinks else None)


def _reader(blocks: Any, tokens: Any, rows: Any, pages: Any, at: tuple, scoring: Scoring, sizes: AttentionSizes):
    """(split -> its partial result, first and end of the positions whose keys the block sees)."""
    b, k, m = at
    slot, start, count = blocks.slots[b], blocks.starts[b], blocks.counts[b]
    first, end = key_range(start, count, scoring.window)
    q, own_tokens = rows[at], tokens[m]
    page_size = pages.keys.shape[2]

    def tile(i, partial):
        positions = i * sizes.kv_tile + jnp.arange(sizes.kv_tile, dtype=jnp.int32)
        in_context = (positions >= first) & (positions < end)
        ids = plgpu.load(blocks.tables.at[slot, positions // page_size], mask=in_context, other=0)
        spread = lambda x: jnp.broadcast_to(x, (sizes.kv_tile, q.shape[1]))
        numbers = (
            spread(ids[:, None]),
            k,
            spread((positions % page_size)[:, None]),
            spread(jnp.arange(q.shape[1], dtype=jnp.int32)),
        )
        other = 0 if pages.keys.dtype == jnp.int8 else 0.0
        read = lambda pool: plgpu.load(pool.at[numbers], mask=spread(in_context[:, None]), other=other).astype(q.dtype)
        scales = lambda pool: None if pool is None else plgpu.load(pool.at[ids, k], mask=in_context, other=0.0)[None]
        scores = scores_of(q, read(pages.keys), scales(pages.key_scales), scoring)
        seen = visible(own_tokens, positions[None], start, count, scoring.window)
        return fold(
            partial, scores, seen, read(pages.values), scales(pages.value_scales), lambda x: x.sum(-1, keepdims=True)
        )

    def attend(s):
        begin = jnp.maximum(first // sizes.kv_tile, s * sizes.split_tiles)
        stop = jnp.minimum(pl.cdiv(end, sizes.kv_tile), (s + 1) * sizes.split_tiles)
        return jax.lax.fori_loop(begin, stop, tile, empty(sizes.rows, q.shape[1]))

    return attend, first, end
