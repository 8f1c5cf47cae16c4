"""Pinned regions: pieces of the forward pass whose bits do not depend on what stands around them.

XLA picks a dot's algorithm by its shape and fuses element-wise code by its surroundings, so one Python function traced at two token
counts, or with and without gradients, gives different bits. A region runs on tiles of a fixed number of rows, in a loop whose body is
the same HLO wherever it stands: a loop's body is compiled apart from the code around it, and a trip count that is known only at run
time keeps XLA from unrolling the loop into that code. The same count lets a half-empty step skip its empty tiles.
Under differentiation a region saves its inputs and recomputes, so the values seen inside `value_and_grad` are the same loop's.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from pallas_kernels.tiles import is_float, unknown_zero

Tree = Any


def over_tiles(body: Callable[[Tree, Tree], Tree], tile: int, weights: Tree, rows: Tree, count: Int[Array, ""]) -> Tree:
    """`body(weights, rows of one tile)` over the first `count` of the rows `[R, ...]`; R is a multiple of `tile`.

    Rows behind the last tile that holds one of the first `count` rows are zeros. `count` must be known at run time only
    (an argument of the step, or computed from one). Differentiable in weights and rows.
    """
    return _over_tiles(body, tile, weights, rows, count)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _over_tiles(body, tile, weights, rows, count):
    size = jax.tree.leaves(rows)[0].shape[0]
    assert size % tile == 0, f"{size} rows are no whole number of tiles of {tile}"
    shapes = jax.eval_shape(body, weights, jax.tree.map(lambda x: x[:tile], rows))
    # Zeros that follow from the rows and the count: XLA would else make those of every region of a program first, and keep them all.
    # Where a region is computed again, its rows were known long before; the count waits for its turn (rl/forward.py).
    zero = unknown_zero(jax.tree.leaves(rows)[0], count)
    out = jax.tree.map(lambda s: jnp.full((size, *s.shape[1:]), zero, s.dtype), shapes)

    def step(i, out):
        part = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i * tile, tile), rows)
        return jax.tree.map(
            lambda o, y: jax.lax.dynamic_update_slice_in_dim(o, y, i * tile, 0), out, body(weights, part)
        )

    return jax.lax.fori_loop(0, -(-count // tile), step, out)


def _forward(body, tile, weights, rows, count):
    return _over_tiles(body, tile, weights, rows, count), (weights, rows, count)


def _backward(body, tile, saved, cotangent):
    # The barrier keeps XLA from merging the recomputation with the forward loop, which would fuse across the region.
    weights, rows, count = jax.lax.optimization_barrier(saved)
    weight_leaves, weight_tree = jax.tree.flatten(weights)
    row_leaves, row_tree = jax.tree.flatten(rows)
    float_weights, float_rows = [is_float(x) for x in weight_leaves], [is_float(x) for x in row_leaves]

    def apply(some_weights, some_rows, part):
        return body(
            weight_tree.unflatten(_merge(float_weights, some_weights, weight_leaves)),
            row_tree.unflatten(_merge(float_rows, some_rows, part)),
        )

    def step(i, gradients):
        total, of_rows = gradients
        cut = lambda x: jax.lax.dynamic_slice_in_dim(x, i * tile, tile)
        part = [cut(x) for x in row_leaves]
        _, pullback = jax.vjp(
            lambda w, r: apply(w, r, part), _pick(float_weights, weight_leaves), _pick(float_rows, part)
        )
        more, of_part = pullback(jax.tree.map(cut, cotangent))
        put = lambda whole, x: jax.lax.dynamic_update_slice_in_dim(whole, x, i * tile, 0)
        return [t + g.astype(jnp.float32) for t, g in zip(total, more, strict=True)], [*map(put, of_rows, of_part)]

    zero = unknown_zero(jax.tree.leaves(cotangent)[0])
    zeros = lambda leaves, dtype: [jnp.full(x.shape, zero, dtype or x.dtype) for x in leaves]
    start = (zeros(_pick(float_weights, weight_leaves), jnp.float32), zeros(_pick(float_rows, row_leaves), None))
    total, of_rows = jax.lax.fori_loop(0, -(-count // tile), step, start)
    total = [t.astype(x.dtype) for t, x in zip(total, _pick(float_weights, weight_leaves), strict=True)]
    return (
        weight_tree.unflatten(_merge(float_weights, total, map(_no_gradient, weight_leaves))),
        row_tree.unflatten(_merge(float_rows, of_rows, map(_no_gradient, row_leaves))),
        _no_gradient(count),
    )


_over_tiles.defvjp(_forward, _backward)


def _no_gradient(x: Array) -> Any:
    """The cotangent that JAX wants for an integer input."""
    return np.zeros(x.shape, jax.dtypes.float0)


def _pick(chosen: list[bool], leaves: list) -> list:
    return [x for x, take in zip(leaves, chosen, strict=True) if take]


def _merge(chosen: list[bool], picked: Any, others: Any) -> list:
    picked = iter(picked)
    return [next(picked) if take else other for take, other in zip(chosen, others, strict=True)]
