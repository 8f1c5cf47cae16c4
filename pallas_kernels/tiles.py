"""Tiles of rows: the unit in which every kernel's twin works, so that a row's bits do not depend on the other rows."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def unknown_zero(*arrays: Array) -> Int[Array, ""]:
    """0, computed from the arrays' first elements in a way that XLA does not see through: what is added to it waits for them, and is
    no constant unless all of them are."""
    bits = functools.reduce(jnp.bitwise_xor, (_bits_of_first(x) for x in arrays))
    return jax.lax.shift_right_logical(bits & 0xFFFF, jnp.int32(16))


def _bits_of_first(x: Array) -> Int[Array, ""]:
    first = x[(0,) * x.ndim]
    return (
        jax.lax.bitcast_convert_type(first.astype(jnp.float32), jnp.int32) if is_float(x) else first.astype(jnp.int32)
    )


def is_float(x: Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def padded_rows(x: Array, tile: int) -> Array:
    """`x` with zeros behind its rows up to a whole number of tiles, at least one."""
    return jnp.pad(x, ((0, max(tile, -(-x.shape[0] // tile) * tile) - x.shape[0]), *((0, 0),) * (x.ndim - 1)))


def by_tiles(body: Callable[..., Any], tile: int, *rows: Array) -> Any:
    """`body(*one tile of the rows)`, an array or a tree of them, over all rows `[M, ...]`: a loop of one body whose trip count the compiler
    does not know."""
    size = rows[0].shape[0]
    rows = tuple(padded_rows(x, tile) for x in rows)
    shapes = jax.eval_shape(body, *(x[:tile] for x in rows))
    zero = unknown_zero(rows[0])
    out = jax.tree.map(lambda s: jnp.full((rows[0].shape[0], *s.shape[1:]), zero, s.dtype), shapes)

    def step(i, out):
        part = body(*(jax.lax.dynamic_slice_in_dim(x, i * tile, tile) for x in rows))
        return jax.tree.map(lambda o, p: jax.lax.dynamic_update_slice_in_dim(o, p, i * tile, 0), out, part)

    return jax.tree.map(lambda o: o[:size], jax.lax.fori_loop(0, rows[0].shape[0] // tile + zero, step, out))
