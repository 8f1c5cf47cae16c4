"""Grouped matrix products: which tile of rows meets which expert, and the twin in plain XLA.

Rows are sorted by expert. A tile that several experts share is visited once by each, and each keeps its own rows, so
that a row's dot has the same shape whichever rows are beside it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.matmul_reference import dot, finish
from pallas_kernels.numbers import cdiv
from pallas_kernels.sizes import MatmulSizes
from pallas_kernels.tiles import padded_rows


class Visits(NamedTuple):
    """For each visit, in the order of rows: tile, expert, and that expert's rows, from `starts` up to `ends`.

    Visits from `count` on repeat the last, with no rows.
    """

    tiles: Int[Array, " v"]
    experts: Int[Array, " v"]
    starts: Int[Array, " v"]
    ends: Int[Array, " v"]
    count: Int[Array, ""]


def visits_of(group_sizes: Int[Array, " E"], num_rows: int, tile: int) -> Visits:
    """All visits: each expert visits every tile that holds a row of it.

    There is at most one visit for each tile and one more for each boundary between experts inside a tile.
    """
    most = cdiv(num_rows, tile) + group_sizes.shape[0] - 1
    ends = jnp.cumsum(group_sizes.astype(jnp.int32))
    starts = ends - group_sizes
    first = starts // tile
    number = jnp.where(group_sizes > 0, (ends - 1) // tile - first + 1, 0)
    visited = jnp.cumsum(number)  # visits up to and with each expert's
    count = visited[-1]
    visit = jnp.minimum(jnp.arange(most), jnp.maximum(count - 1, 0))
    expert = jnp.minimum(jnp.searchsorted(visited, visit, side="right"), group_sizes.shape[0] - 1).astype(jnp.int32)
    live = jnp.arange(most) < count
    tiles = first[expert] + visit - (visited - number)[expert]
    tiles = jnp.where(count > 0, tiles, 0)
    starts, ends = (jnp.where(live, x[expert], 0) for x in (starts, ends))
    return Visits(tiles, expert, starts, ends, count)


def rows_of_visit(tile: Array, size: int, start: Array, end: Array) -> Array:
    """Which of a tile's rows belong to the visit, `[size, 1]`."""
    row = tile * size + jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0)
    return (row >= start) & (row < end)


def without_rest(out: Float[Array, "... M N"], group_sizes: Int[Array, " E"]) -> Float[Array, "... M N"]:
    """`out` with zeros in the rows after the last group."""
    return jnp.where(jnp.arange(out.shape[-2])[:, None] < group_sizes.sum(), out, jnp.zeros_like(out))


def grouped_plain(
    x: Float[Array, "M K"], w: Float[Array, "E parts N K"], group_sizes: Int[Array, " E"]
) -> Float[Array, "M N"]:
    """The product by XLA's own grouped dot. Gradients come from here."""
    experts, parts, outputs, inputs = w.shape
    x = without_rest(x, group_sizes)
    precision = jax.lax.Precision.HIGHEST if w.dtype == jnp.float32 else None
    by_inputs = w.reshape(experts, parts * outputs, inputs).swapaxes(1, 2)
    sums = jax.lax.ragged_dot(
        x, by_inputs, group_sizes.astype(jnp.int32), precision=precision, preferred_element_type=jnp.float32
    )
    return without_rest(finish(jnp.split(sums, parts, axis=1), [], None), group_sizes)


def grouped_matmul_reference(
    x: Float[Array, "M K"],
    w: Float[Array, "E parts N K"],
    group_sizes: Int[Array, " E"],
    sizes: MatmulSizes,
    out_dtype: jnp.dtype,
) -> Float[Array, "M N"]:
    """The product visit by visit: one dot of a tile of rows and one expert's weights, of which the expert's rows are
    kept."""
    (m, _), (_, parts, outputs, inputs), tile = x.shape, w.shape, sizes.rows
    visits = visits_of(group_sizes, m, tile)
    padded = padded_rows(x, tile)

    def step(v, out):
        weights, _ = jax.lax.optimization_barrier((w, v))  # or XLA on CPU would widen all experts before the loop
        one = jax.lax.dynamic_index_in_dim(weights, visits.experts[v], keepdims=False).reshape(-1, inputs)
        start = visits.tiles[v] * tile
        sums = jnp.split(dot(jax.lax.dynamic_slice_in_dim(padded, start, tile), one), parts, axis=1)
        mine = rows_of_visit(visits.tiles[v], tile, visits.starts[v], visits.ends[v])
        kept = jnp.where(mine, finish(sums, [], None).astype(out_dtype), jax.lax.dynamic_slice_in_dim(out, start, tile))
        return jax.lax.dynamic_update_slice_in_dim(out, kept, start, 0)

    return jax.lax.fori_loop(0, visits.count, step, jnp.zeros((padded.shape[0], outputs), out_dtype))[:m]
