"""Pinned regions: pieces of the forward pass with bits that do not depend on the code around them.

XLA picks a dot's algorithm by its shape and fuses element-wise code by its surroundings, so one Python function traced
at two token counts, or with and without gradients, gives different bits. A region runs on tiles of a fixed number of
rows, in a loop with a body that is the same HLO in every program: XLA compiles a loop's body apart from the code around
it, and a trip count that is known only at run time keeps XLA from unrolling the loop into that code. The same count
lets a half-empty step skip its empty tiles. Under differentiation a region saves its inputs and recomputes, so the
values seen inside `value_and_grad` are the same loop's.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.numbers import cdiv
from pallas_kernels.tiles import is_float, unknown_zero

Tree = Any


def over_tiles(body: Callable[[Tree, Tree], Tree], tile: int, weights: Tree, rows: Tree, count: Int[Array, ""]) -> Tree:
    """`body(weights, rows of one tile)` over the first `count` of the rows `[R, ...]`; R is a multiple of `tile`.

    Rows after the last tile that holds one of the first `count` rows are zeros. `count` must be known at run time only
    (an argument of the step, or computed from one). Differentiable in weights and rows.
    """
    return _over_tiles(body, tile, weights, rows, count)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _over_tiles(body, tile, weights, rows, count):
    size = jax.tree.leaves(rows)[0].shape[0]
    assert size % tile == 0, f"{size} rows are no whole number of tiles of {tile}"
    shapes = jax.eval_shape(body, weights, jax.tree.map(lambda x: x[:tile], rows))
    # Depends on the rows and on `count`, so that XLA cannot make the zeros of all regions of a program first and keep
    # them. Where a region is computed again, its rows were known long before; `count` becomes known at its turn
    # (device/trunk.py).
    zero = unknown_zero(jax.tree.leaves(rows)[0], count)

    def zeros(part: jax.ShapeDtypeStruct) -> Array:
        return jnp.full((size, *part.shape[1:]), zero, part.dtype)

    def step(i, out):
        return _put(out, i, tile, body(weights, _cut(rows, i, tile)))

    return jax.lax.fori_loop(0, cdiv(count, tile), step, jax.tree.map(zeros, shapes))


@jax.custom_vjp
def settled(x: Float[Array, "R N"]) -> Float[Array, "R N"]:
    """x, whose cotangent is written out before anything reads it: what made it is compiled in one way, whoever reads it
    next (all of it on one device, a part on each of several).
    """
    return x


def _copied(cotangent: Float[Array, "R N"]) -> Float[Array, "R N"]:
    """By a loop, which XLA does not look across."""
    zero = unknown_zero(cotangent)
    start = jnp.full(cotangent.shape, zero, cotangent.dtype)
    return jax.lax.fori_loop(0, cotangent.shape[0] + zero, lambda i, out: _put(out, i, 1, _cut(cotangent, i, 1)), start)


settled.defvjp(lambda x: (x, None), lambda _, cotangent: (_copied(cotangent),))


def _cut(rows: Tree, i: Array, tile: int) -> Tree:
    """Tile i of each array."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i * tile, tile), rows)


def _put(rows: Tree, i: Array, tile: int, part: Tree) -> Tree:
    """The arrays with `part` as tile i of each."""
    return jax.tree.map(lambda x, p: jax.lax.dynamic_update_slice_in_dim(x, p, i * tile, 0), rows, part)


def _forward(body, tile, weights, rows, count):
    return _over_tiles(body, tile, weights, rows, count), (weights, rows, count)


def _backward(body, tile, saved, cotangent):
    # The barrier keeps XLA from merging the recomputation with the forward loop, which would fuse across the region.
    weights, rows, count = jax.lax.optimization_barrier(saved)
    weights, rows = _Floats(weights), _Floats(rows)

    def step(i, gradients):
        total, of_rows = gradients
        part = _cut(rows.leaves, i, tile)

        def apply(some_weights, some_rows):
            return body(weights.with_floats(some_weights, weights.leaves), rows.with_floats(some_rows, part))

        _, pullback = jax.vjp(apply, weights.pick(weights.leaves), rows.pick(part))
        more, of_part = pullback(_cut(cotangent, i, tile))
        total = [t + g.astype(jnp.float32) for t, g in zip(total, more, strict=True)]
        return total, _put(of_rows, i, tile, of_part)

    zero = unknown_zero(jax.tree.leaves(cotangent)[0])
    of_weights = [jnp.full(x.shape, zero, jnp.float32) for x in weights.pick(weights.leaves)]
    of_rows = [jnp.full(x.shape, zero, x.dtype) for x in rows.pick(rows.leaves)]
    total, of_rows = jax.lax.fori_loop(0, cdiv(count, tile), step, (of_weights, of_rows))
    total = [t.astype(x.dtype) for t, x in zip(total, weights.pick(weights.leaves), strict=True)]
    return (
        weights.with_floats(total, map(no_gradient, weights.leaves)),
        rows.with_floats(of_rows, map(no_gradient, rows.leaves)),
        no_gradient(count),
    )


_over_tiles.defvjp(_forward, _backward)


def no_gradient(x: Array) -> Any:
    """The cotangent that JAX wants for an integer input."""
    return np.zeros(x.shape, jax.dtypes.float0)


class _Floats:
    """A tree's floating-point leaves, apart from its integers."""

    def __init__(self, tree: Tree) -> None:
        self.leaves, self._tree = jax.tree.flatten(tree)
        self._chosen = [is_float(x) for x in self.leaves]

    def pick(self, leaves: list[Array]) -> list[Array]:
        """Those of all leaves that are floating-point."""
        return [x for x, chosen in zip(leaves, self._chosen, strict=True) if chosen]

    def with_floats(self, floats: Iterable[Array], others: Iterable[Array]) -> Tree:
        """The tree with `floats` in their places, and what `others` has in all others."""
        floats = iter(floats)
        return self._tree.unflatten(
            [next(floats) if chosen else other for other, chosen in zip(others, self._chosen, strict=True)]
        )
