"""Rows shared out over the replicas of a mesh, which hold the same weights.

A replica runs its rows as if it were alone, and what it found is copied to all, so that no bit tells how many there
are.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxengine.ops.kernels import Kernels
from sharding.leaves import own_share
from sharding.mesh import WHOLE


def on_shares(kernels: Kernels, function: Callable, specs: Any, weights: Any, rows: Any) -> Any:
    """`function(kernels, weights, rows)`: arrays `[B, …]`, each row of which depends on the weights and on that row of
    the arrays `rows` `[B, …]` alone.

    `specs` say how the weights lie on a mesh. Where B is no multiple of the replicas, rows of zeros fill it up.
    Differentiable by reverse mode; then every replica runs all rows, because the weights' gradient is a sum over tokens
    in an order that is no sum of sums over rows (rl/micro_batches.py has one that is).
    """
    if kernels.replicas == 1:
        return function(kernels, weights, rows)
    shared = jax.custom_vjp(functools.partial(_shared, kernels, function, specs))
    shared.defvjp(
        functools.partial(jax.vjp, functools.partial(function, kernels)), lambda pull, cotangents: pull(cotangents)
    )
    return shared(weights, rows)


def _shared(kernels: Kernels, function: Callable, specs: Any, weights: Any, rows: Any) -> Any:
    count, replicas = jax.tree.leaves(rows)[0].shape[0], kernels.replicas

    def own(kernels: Kernels, weights: Any, rows: Any) -> Any:
        share = jax.tree.map(lambda x: own_share(x, "data", replicas), rows)
        return jax.tree.map(_from_all, function(kernels, weights, share))

    padded = jax.tree.map(functools.partial(_padded, -count % replicas), rows)
    # Given whole: were they cut over "data", XLA would cut what else reads them, and its sums, in the same way.
    found = kernels.on_each_replica(own, specs, WHOLE, outputs=WHOLE)(weights, padded)
    return jax.tree.map(lambda x: x[:count], found)


def _from_all(own: Array) -> Array:
    return jax.lax.all_gather(own, "data", tiled=True)


def _padded(more: int, x: Array) -> Array:
    return jnp.pad(x, ((0, more), *((0, 0),) * (x.ndim - 1)))
