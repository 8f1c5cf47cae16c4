"""A layer's pages."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sharding.rules import spec_of

PAGES = spec_of((None, "heads"))  # how every pool lies on a mesh: its second axis is that of heads


class Pools(NamedTuple):
    """All pages of one layer, laid out as `Kernels.attention` has them: arrays, their shapes, or how they are split."""

    keys: Any
    values: Any


class PlainMemory:
    """As JAX has it (ops/kernels.Memory)."""

    def zeros(self, shape: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.zeros(shape.shape, shape.dtype, device=shape.sharding)

    def settle(self, weights: Any) -> None:
        pass


PLAIN_MEMORY = PlainMemory()
