"""Sums of arrays inside kernels, in the two orders that there are."""

import functools

import jax.numpy as jnp
from jaxtyping import Array


def in_order(parts: list[Array]) -> Array:
    """Their sum, one after the other."""
    return functools.reduce(jnp.add, parts)


def by_tree(parts: list[Array]) -> Array:
    """((p0 + p1) + (p2 + p3)) + …, of a power of two of them: as sharding/leaves.py adds leaves."""
    while len(parts) > 1:
        parts = [a + b for a, b in zip(parts[0::2], parts[1::2], strict=True)]
    return parts[0]
