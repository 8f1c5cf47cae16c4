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


def grouped_gradients(
    x: Float[Array, "M K"],
    w: Float[Array, "E parts N K"],
    group_sizes: Int[Array, " E"],
    cotangent: Float[Array, "M N"],
    tile: int,
) -> tuple[Float[Array, "M K"], Float[Array, "E parts N K"]]:
    """The gradients of x and w, visit by visit: what a visit adds is XLA's gradient of its one dot."""
    visits = visits_of(group_sizes, x.shape[0], tile)
    rows, upstream = padded_rows(x, tile), padded_rows(cotangent.astype(jnp.float32), tile)

    def step(v, gradients):
        of_x, of_w = gradients
        weights, _ = jax.lax.optimization_barrier((w, v))
        one = jax.lax.dynamic_index_in_dim(weights, visits.experts[v], keepdims=False)
        start, mine = visits.tiles[v] * tile, rows_of_visit(visits.tiles[v], tile, visits.starts[v], visits.ends[v])
        some, given = (jnp.where(mine, jax.lax.dynamic_slice_in_dim(a, start, tile), 0) for a in (rows, upstream))
        _, pullback = jax.vjp(_of_visit, some, one)
        of_some, of_one = pullback(given)
        before = jax.lax.dynamic_slice_in_dim(of_x, start, tile)
        of_x = jax.lax.dynamic_update_slice_in_dim(of_x, jnp.where(mine, of_some, before), start, 0)
        return of_x, of_w.at[visits.experts[v]].add(of_one.astype(jnp.float32))

    start = jnp.zeros_like(rows), jnp.zeros(w.shape, jnp.float32)
    of_x, of_w = jax.lax.fori_loop(0, visits.count, step, start)
    return of_x[: x.shape[0]], of_w.astype(w.dtype)


def _of_visit(x: Float[Array, "m K"], w: Float[Array, "parts N K"]) -> Float[Array, "m N"]:
    return finish(jnp.split(dot(x, w.reshape(-1, w.shape[-1])), w.shape[0], axis=1), [], None)


def grouped_matmul_reference(
    x: Float[Array, "M K"],
    w: Float[Array, "E parts N K"],
    group_sizes: Int[Array, " E"],
    sizes: MatmulSizes,
    out_dtype: jnp.dtype,
) -> Float[Array, "M N"]:
    """The product visit by visit: one dot of a tile of rows and one expert's weights, of which the expert's rows are
    kept."""
    m, outputs, tile = x.shape[0], w.shape[2], sizes.rows
    visits = visits_of(group_sizes, m, tile)
    padded = padded_rows(x, tile)

    def step(v, out):
        weights, _ = jax.lax.optimization_barrier((w, v))  # or XLA on CPU would widen all experts before the loop
        one = jax.lax.dynamic_index_in_dim(weights, visits.experts[v], keepdims=False)
        start = visits.tiles[v] * tile
        y = _of_visit(jax.lax.dynamic_slice_in_dim(padded, start, tile), one)
        mine = rows_of_visit(visits.tiles[v], tile, visits.starts[v], visits.ends[v])
        kept = jnp.where(mine, y.astype(out_dtype), jax.lax.dynamic_slice_in_dim(out, start, tile))
        return jax.lax.dynamic_update_slice_in_dim(out, kept, start, 0)

    return jax.lax.fori_loop(0, visits.count, step, jnp.zeros((padded.shape[0], outputs), out_dtype))[:m]
