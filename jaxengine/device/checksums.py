"""Checksums of what lies on the device: of the pages of the KV cache, and of the weights.

Sums of integers modulo 2**32, which are the same in any order, and so on any mesh.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt32

from jaxengine.device.kv_cache import Cache
from jaxengine.ops.kernels import Kernels

SPREAD = np.uint32(0x9E3779B1)  # 2**32 divided by the golden ratio, odd: Knuth, TAOCP 3, section 6.4
MIX = np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35)  # the multipliers of MurmurHash3's finaliser


@functools.partial(jax.jit, static_argnames="kernels")
def token_sums(cache: Cache, pages: Int[Array, " A"], *, kernels: Kernels) -> UInt32[Array, "A p"]:
    """A checksum of each token's stored words in the given pages, over all layers: any single word that changes,
    changes it.

    Each word is multiplied by an odd number of its own. Garbage has the same sum with a chance of about 2**-32.
    """
    stored: list[Array] = []  # a layer's keys, then its values
    for keys, values in zip(cache.keys, cache.values, strict=True):
        stored += kernels.attention.by_token(keys[pages], values[pages])
    heads, h = stored[0].shape[2:]
    words = np.arange(len(stored) * heads * h, dtype=np.uint32).reshape(-1, heads, h)
    total = jnp.zeros(stored[0].shape[:2], jnp.uint32)
    for own, x in zip(words, stored, strict=True):
        total += (_words(x) * (2 * own + 1)).sum((2, 3), dtype=jnp.uint32)
    return total


@jax.jit
def word_sums(x: Array) -> UInt32[Array, " 2"]:
    """Two checksums of an array's words, each word mixed with its place first: any single word that changes, changes
    both.

    Other words have the same sums with a chance of about 2**-64.
    """
    words = _words(x.reshape(-1, x.shape[-1]))
    row, column = (jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) for axis in (0, 1))
    mixed = (words ^ ((row * np.uint32(words.shape[1]) + column) * SPREAD)) * MIX[0]
    mixed = (mixed ^ (mixed >> 15)) * MIX[1]
    columns = (mixed ^ (mixed >> 13)).sum(0, dtype=jnp.uint32)
    odd = 2 * jnp.arange(columns.shape[0], dtype=jnp.uint32) + 1
    return jnp.stack([columns.sum(dtype=jnp.uint32), (columns * odd).sum(dtype=jnp.uint32)])


def _words(x: Array) -> UInt32[Array, "..."]:
    """The bits of each number."""
    return x.view(f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
