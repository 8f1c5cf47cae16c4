"""From the packed projection to heads: bias, norm and rotation, and the write of keys and values. A program takes one
head of one row."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from pallas_kernels.chain_gpu.blocks import load, new
from pallas_kernels.gpu_call import call
from pallas_kernels.numbers import power_of_two
from pallas_kernels.packed_heads import KEYS, QUERIES, VALUES, Geometry, Projection
from pallas_kernels.paged_attention_inputs import PagedBlocks
from pallas_kernels.pinned_math import LOG2_E
from pallas_kernels.sums import in_order


def rotate_and_write(
    geometry: Geometry,
    projection: Projection,
    keys: Array,
    values: Array,
    blocks: PagedBlocks,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "R H h"], Array, Array]:
    """(queries, ready for `attend`: scaled to base 2 and rounded; the pools `[P, K, p, width]` with the blocks' rows
    written, in place).

    Row i is token i % r of block i // r; rows after a block's count give zeros and write nothing.
    """
    blocks = blocks._replace(num_blocks=None)  # counts say it too
    rows, inputs = projection.sums.shape[1], (projection, blocks, keys, values)
    out = new((rows, geometry.queries, geometry.width), keys.dtype), *(new(x.shape, x.dtype) for x in (keys, values))
    kernel = functools.partial(_kernel, geometry=geometry, r=rows // blocks.starts.shape[0])
    first = len([x for x in (*projection, *blocks) if x is not None])
    grid = rows, geometry.queries + 2 * geometry.keys
    how: dict[str, Any] = dict(interpret=interpret, warps=1, aliases={first: 1, first + 1: 2})
    return call("chain_heads", kernel, grid, out, *inputs, **how)


def _kernel(projection: Projection, blocks: PagedBlocks, _keys, _values, q_ref, keys, values, *, geometry, r) -> None:
    row, head = pl.program_id(0), pl.program_id(1)
    block, token = row // r, row % r
    position, is_there = blocks.starts[block] + token, token < blocks.counts[block]
    page_size, g = keys.shape[2], geometry
    page = jnp.where(is_there, blocks.tables[blocks.slots[block], position // page_size], 0)
    cell = position % page_size
    half = g.width // 2
    own_cells = jnp.arange(power_of_two(half))  # no slice, because one may not reach past the end, masked or not
    places = [part * half + own_cells for part in range(2)]
    mask = None if half == power_of_two(half) else own_cells < half

    def packed(kind: int, own: Array) -> list[Array]:
        """The halves of a head."""
        column = g.column(kind, own) * g.width
        windows = [column + at for at in places]
        halves = [
            in_order([load(projection.sums.at[np.int32(i), row, at], mask) for i in range(projection.sums.shape[0])])
            for at in windows
        ]
        if projection.bias is None:
            return halves
        return [
            x + load(projection.bias.at[at], mask).astype(jnp.float32) for x, at in zip(halves, windows, strict=True)
        ]

    def rotated(x: list[Array], norm) -> list[Array]:
        if norm is not None:
            mean = (jnp.sum(x[0] * x[0]) + jnp.sum(x[1] * x[1])) / g.width
            scales = [load(norm.at[at], mask).astype(jnp.float32) for at in places]
            x = [part * (1.0 / jnp.sqrt(mean + g.eps)) * scale for part, scale in zip(x, scales, strict=True)]
        angles = position.astype(jnp.float32) * load(projection.frequencies.at[places[0]], mask)
        cos, sin = jnp.cos(angles) * g.rope_factor, jnp.sin(angles) * g.rope_factor
        return [x[0] * cos - x[1] * sin, x[1] * cos + x[0] * sin]

    def store(ref, index: tuple, x: list[Array]) -> None:
        for at, part in zip(places, x, strict=True):
            plgpu.store(ref.at[(*index, at)], part.astype(ref.dtype), mask=mask)

    @pl.when(head < g.queries)
    def _():
        scaled = [x * (LOG2_E * g.width**-0.5) for x in rotated(packed(QUERIES, head), projection.q_norm)]
        store(q_ref, (row, head), [jnp.where(is_there, x, 0.0) for x in scaled])

    @pl.when(is_there & (head >= g.queries) & (head < g.queries + g.keys))
    def _():
        own = head - g.queries
        store(keys, (page, own, cell), rotated(packed(KEYS, own), projection.k_norm))

    @pl.when(is_there & (head >= g.queries + g.keys))
    def _():
        own = head - g.queries - g.keys
        store(values, (page, own, cell), packed(VALUES, own))
