"""Rows, weights and contexts of the tests of the chain's kernels, a GPU's and a TPU's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.packed_heads import Geometry, Projection
from pallas_kernels.paged_attention_inputs import PagedBlocks

RNG = np.random.default_rng(0)
random = functools.partial(RNG.normal, 0, 1)
ROWS = 130
BATCHES = (slice(0, 1), slice(7, 10), slice(0, 40), slice(60, 124))
PAGE, PAGES = 16, 12  # a context of 192: three splits
PAGE_WIDTH = 32
GEOMETRY = Geometry(queries=6, keys=2, width=24, leaves=2, eps=1e-6, rope_factor=1.0)
LENGTHS = (1, 30, 65, 150, 187)


def array(*shape: int, dtype=jnp.float32) -> jax.Array:
    return jnp.asarray(random(size=shape), dtype)


def bits(x) -> np.ndarray:
    return np.asarray(x, np.float32).view(np.uint32)


def silu(x):
    return x / (1 + np.exp(-x))


def f64(x) -> np.ndarray:
    return np.asarray(x, np.float64)


def heads_inputs(starts, counts, slots, sums) -> tuple[Projection, list[jax.Array], PagedBlocks]:
    """The projection of blocks of five contexts, pools of random earlier pages, where memory of no token is NaN, and
    the blocks."""
    num_pages = 1 + PAGES * len(LENGTHS)
    tables = jnp.arange(1, num_pages).reshape(len(LENGTHS), PAGES)
    rng = np.random.default_rng(1)
    pools = [rng.normal(size=(num_pages, GEOMETRY.keys, PAGE, PAGE_WIDTH)).astype(np.float32) for _ in range(2)]
    for slot, length in enumerate(LENGTHS):
        for position in range(length, PAGES * PAGE):
            for pool in pools:
                pool[tables[slot, position // PAGE], :, position % PAGE] = np.nan
    norms = [jnp.asarray(rng.normal(size=GEOMETRY.width), jnp.float32) for _ in range(2)]
    frequencies = jnp.asarray(1 / 1e4 ** (np.arange(GEOMETRY.width // 2) / (GEOMETRY.width // 2)), jnp.float32)
    projection = Projection(sums, jnp.ones(sums.shape[-1]), *norms, frequencies)
    blocks = PagedBlocks(tables, *(jnp.asarray(x, jnp.int32) for x in (slots, starts, counts, len(starts))))
    return projection, [jnp.asarray(pool) for pool in pools], blocks


def naive(starts, sums, keys, values) -> np.ndarray:
    """Attention of each context's last token in float64, from the packed projection and the pools as written."""
    g, out = GEOMETRY, []
    packed = f64(sums).sum(0) + 1
    rng = np.random.default_rng(1)
    for _ in range(2):
        rng.normal(size=keys.shape)
    q_norm = rng.normal(size=g.width).astype(np.float32)
    angles = 1 / 1e4 ** (np.arange(g.width // 2) / (g.width // 2))
    for slot, start in enumerate(starts):
        by_leaf = packed[slot].reshape(g.leaves, -1, g.width)
        q = by_leaf[:, : g.queries // g.leaves].reshape(-1, g.width)
        q = q / np.sqrt((q**2).mean(-1, keepdims=True) + g.eps) * f64(q_norm)
        a, b = np.split(q, 2, axis=-1)
        cos, sin = np.cos(start * angles), np.sin(start * angles)
        q = np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
        pages = slice(1 + slot * PAGES, 1 + (slot + 1) * PAGES)
        k, v = (
            f64(pool)[pages].swapaxes(0, 1).reshape(g.keys, -1, PAGE_WIDTH)[:, : start + 1, : g.width]
            for pool in (keys, values)
        )
        for head in range(g.queries):
            scores = k[head // (g.queries // g.keys)] @ q[head] / np.sqrt(g.width)
            p = np.exp(scores - scores.max())
            out.append(p / p.sum() @ v[head // (g.queries // g.keys)])
    return np.array(out).reshape(len(starts), -1)
