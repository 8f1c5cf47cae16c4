"""Tiles of rows: the unit in which every kernel's twin works, so that a row's bits do not depend on the other rows."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.numbers import cdiv, ceil_to


def unknown_zero(*arrays: Array) -> Int[Array, ""]:
    """0, computed from the arrays' first elements in a way that XLA does not see through.

    What it is added to waits for the arrays, and XLA cannot fold it into a constant unless all of them are constants.
    """
    bits = functools.reduce(jnp.bitwise_xor, (_bits_of_first(x) for x in arrays))
    return jax.lax.shift_right_logical(bits & 0xFFFF, jnp.int32(16))


def _bits_of_first(x: Array) -> Int[Array, ""]:
    first = x[(0,) * x.ndim]
    if is_float(x):
        return jax.lax.bitcast_convert_type(first.astype(jnp.float32), jnp.int32)
    return first.astype(jnp.int32)


def is_float(x: Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def tiles_of(live: Any, tile: int) -> Any:
    """How many tiles the first `live` ≥ 0 rows reach, traced or not. No sign is looked at: that would be ten scalar
    instructions."""
    return cdiv(live, tile) if isinstance(live, int) else jax.lax.div(live + (tile - 1), jnp.int32(tile))


def padded_rows(x: Array, tile: int) -> Array:
    """`x` with rows of zeros added at the end, up to a whole number of tiles, at least one."""
    size = max(tile, ceil_to(x.shape[0], tile))
    return jnp.pad(x, ((0, size - x.shape[0]), *((0, 0),) * (x.ndim - 1)))


def by_tiles(body: Callable[..., Any], tile: int, *rows: Array) -> Any:
    """`body(*one tile of the rows)`, an array or a tree of arrays, over all rows `[M, ...]`.

    It is a loop whose trip count the compiler does not know, so that the body is compiled once, at one shape.
    """
    size = rows[0].shape[0]
    rows = tuple(padded_rows(x, tile) for x in rows)
    shapes = jax.eval_shape(body, *(x[:tile] for x in rows))
    zero = unknown_zero(rows[0])

    def blank(shape):
        return jnp.full((rows[0].shape[0], *shape.shape[1:]), zero, shape.dtype)

    def step(i, out):
        def put(whole, part):
            return jax.lax.dynamic_update_slice_in_dim(whole, part, i * tile, 0)

        return jax.tree.map(put, out, body(*(jax.lax.dynamic_slice_in_dim(x, i * tile, tile) for x in rows)))

    out = jax.tree.map(blank, shapes)
    out = jax.lax.fori_loop(0, rows[0].shape[0] // tile + zero, step, out)
    return jax.tree.map(lambda x: x[:size], out)
