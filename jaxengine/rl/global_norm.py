"""The norm of a whole gradient, with the same bits however the weights are cut over devices.

optax's own adds the squares of each array in the order that XLA takes, which follows the shape of what a device has; a
clip by it would scale a sharded run in another way than the same run on one device.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from pallas_kernels.numbers import power_of_two
from pallas_kernels.pinned_math import row_sum
from sharding.leaves import tree_sum


def global_norm(gradient: Any) -> Float[Array, ""]:
    """The square root of the sum of all squares, in float32."""
    squares = [_sum_of_squares(x) for x in jax.tree.leaves(gradient)]
    return jnp.sqrt(sum(squares, jnp.zeros((), jnp.float32)))


def clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """optax.clip_by_global_norm with `global_norm`: gradients that are longer than `limit` are scaled to it."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        norm = global_norm(updates)
        scale = jnp.where(norm > limit, limit / jnp.maximum(norm, limit), 1.0)
        return jax.tree.map(lambda x: (x * scale).astype(x.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _sum_of_squares(x: Float[Array, "..."]) -> Float[Array, ""]:
    """Rows first, then each leaf's rows, then the leaves: the first axis may be cut over devices, and no other."""
    x = x.astype(jnp.float32)
    if x.ndim < 2:
        return row_sum(jnp.broadcast_to(x * x, (2, *jnp.atleast_1d(x).shape)))[0]
    rows = row_sum(x * x)
    return _tree(_tree(rows.reshape(rows.shape[0], -1).T))


def _tree(x: Float[Array, "n ..."]) -> Float[Array, "..."]:
    """tree_sum over any number of members."""
    return tree_sum(jnp.pad(x, ((0, power_of_two(x.shape[0]) - x.shape[0]), *((0, 0),) * (x.ndim - 1))))
