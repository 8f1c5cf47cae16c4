"""The embedding of whole sequences, with a gradient that is the same sum in every run and costs what its tokens cost.

The gradient of `table[ids]` is a scatter with ids that repeat, which a GPU adds in the order in which its threads
arrive. Here equal ids are brought together first, and each row of the table is written once.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxengine.models.params import TABLE_AXES
from jaxengine.ops.kernels import Kernels
from jaxengine.ops.live import Live
from jaxengine.ops.regions import no_gradient
from jaxengine.ops.tiles import Tile
from pallas_kernels.numbers import cdiv
from pallas_kernels.tiles import unknown_zero
from sharding.mesh import WHOLE
from sharding.rules import spec_of

TABLE = spec_of(TABLE_AXES)


def _embed(
    kernels: Kernels, tile: Tile, table: Float[Array, "leaf V D"], ids: Int[Array, " R"], count: Int[Array, ""]
) -> Float[Array, "R D"]:
    """Rows of the table in float32, the first `count` of them. Differentiable in the table."""

    def look_up(kernels: Kernels, table: Array, ids: Array, count: Array) -> Float[Array, "R D"]:
        return kernels.products.finish(kernels.products.embed(table, ids, Live(tile.rows, count)))

    return kernels.on_each(look_up, TABLE, WHOLE, WHOLE, outputs=WHOLE)(table, ids, count)


embed = jax.custom_vjp(_embed, nondiff_argnums=(0, 1))


def _forward(kernels, tile, table, ids, count):
    return embed(kernels, tile, table, ids, count), (table, ids, count)


def _backward(kernels, tile, saved, rows):
    """A tile of rows at a time, each rounded to the table's dtype as a product's gradient is."""
    table, ids, count = jax.lax.optimization_barrier(saved)
    pull = kernels.on_each(functools.partial(_pull, tile), TABLE, *(WHOLE,) * 3, outputs=TABLE)
    return pull(table, ids, count, rows), no_gradient(ids), no_gradient(count)


def _pull(tile: Tile, kernels: Kernels, table: Array, ids: Array, count: Array, rows: Array) -> Array:
    """The cotangent of a device's part of the table."""
    ids, here = kernels.products.leaves.own_ids(table, ids)
    rows = jnp.where(here[:, None], rows, 0)

    def step(i, total):
        own_ids, own_rows = (jax.lax.dynamic_slice_in_dim(x, i * tile.rows, tile.rows) for x in (ids, rows))
        return add_rows(total, own_ids, own_rows.astype(table.dtype))

    start = jnp.full((table.shape[0] * table.shape[1], table.shape[2]), unknown_zero(rows), jnp.float32)
    total = jax.lax.fori_loop(0, cdiv(count, tile.rows), step, start)
    return total.astype(table.dtype).reshape(table.shape)


embed.defvjp(_forward, _backward)


def add_rows(total: Float[Array, "V D"], ids: Int[Array, " t"], rows: Float[Array, "t D"]) -> Float[Array, "V D"]:
    """`total` with each row added at its id, in an order that the ids alone decide.

    Rows of one id are added to each other first, one after another, the last first, in the dtype of the rows. In each
    of the loop's turns every id adds one more row, so that there are as many turns as the most frequent id has rows.
    """
    each = jnp.arange(ids.shape[0])
    # A row of zeros, padding's for one, gets an id of its own after the last, where it is dropped.
    ids = jnp.where((rows != 0).any(-1), ids, total.shape[0] + each)[::-1]
    order = jnp.argsort(ids, stable=True)
    ids, rows = ids[order], rows[::-1][order]
    is_first = (each == 0) | (ids != jnp.roll(ids, 1))
    rank = each - jax.lax.cummax(jnp.where(is_first, each, 0))  # rows of the same id before this one

    def add_next(k, sums):
        """To the first row of each id, the one k rows after it, where that is of the same id."""
        return sums + jnp.where((jnp.roll(rank, -k) == k)[:, None], jnp.roll(rows, -k, axis=0), 0)

    sums = jax.lax.fori_loop(1, rank.max() + 1, add_next, rows).astype(total.dtype)
    places = jnp.where(is_first, ids, total.shape[0] + ids.shape[0] + each)
    return total.at[places].add(sums, mode="drop", unique_indices=True)
