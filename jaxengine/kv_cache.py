"""The paged KV cache as a pytree on the device, and the token history that steps read their inputs from."""
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt32

from jaxengine.config import EngineConfig, ModelConfig
from jaxengine.pytree import pytree
from jaxengine.step_inputs import Blocks


@pytree
class Cache:
    """Everything that steps change. Page 0 belongs to nobody: rows that stand for no token write there."""

    keys: tuple[Array, ...]  # a layer: [P, K, h, p], transposed so that a score is a plain dot with the keys of a tile in a row
    values: tuple[Array, ...]  # a layer: [P, K, p, h]
    history: Int[Array, "slots max_len"]  # token ids of the sequence in each slot


def storage_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """16-bit floats are kept as uint16 (pallas_kernels/reference.py, load_pages, says why)."""
    return jnp.dtype(jnp.uint16) if jnp.dtype(dtype).itemsize == 2 else jnp.dtype(dtype)


def as_pages(k: Array, v: Array) -> tuple[Array, Array]:
    """Keys and values `[B, r, K, h]` as they lie in pages, `[B, K, h, r]` and `[B, K, r, h]`: the same bits, in the pool's dtype."""
    stored = storage_dtype(k.dtype)
    raw = lambda x: x if x.dtype == stored else jax.lax.bitcast_convert_type(x, stored)
    return raw(k.transpose(0, 2, 3, 1)), raw(v.transpose(0, 2, 1, 3))


def abstract(model: ModelConfig, engine: EngineConfig) -> Any:
    """Shapes and dtypes of the cache, nothing allocated."""
    dtype, heads, h = storage_dtype(jnp.dtype(model.dtype)), model.num_key_value_heads, model.head_dim
    pages = engine.num_pages + engine.probe_pages
    keys: Any = jax.ShapeDtypeStruct((pages, heads, h, engine.page_size), dtype)
    values: Any = jax.ShapeDtypeStruct((pages, heads, engine.page_size, h), dtype)
    history: Any = jax.ShapeDtypeStruct((engine.max_num_seqs + 1, engine.max_model_len), jnp.dtype(jnp.int32))
    layers = model.num_hidden_layers
    return Cache((keys,) * layers, (values,) * layers, history)


def allocate(model: ModelConfig, engine: EngineConfig) -> Cache:
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), abstract(model, engine))


def is_lost(cache: Cache) -> bool:
    """Whether a step took the arrays and gave none back, or gave such as only answer with its error. Waits for steps under way."""
    if any(x.is_deleted() for x in jax.tree.leaves(cache)):
        return True
    try:
        jax.block_until_ready(cache)
    except jax.errors.JaxRuntimeError:
        return True
    return False


def rebuild(cache: Cache, model: ModelConfig, engine: EngineConfig) -> Cache:
    """An empty cache in the place of a lost one, whose memory goes first: there is no room for two."""
    for array in jax.tree.leaves(cache):
        array.delete()
    return allocate(model, engine)


def token_sums(cache: Cache, pages: Int[Array, " A"]) -> UInt32[Array, "A p"]:
    """A checksum of each token's stored words in the given pages, over all layers: any single word that changes, changes it.

    Each word is multiplied by an odd number of its own, modulo 2**32. Garbage has the same sum with a chance of about 2**-32.
    """
    heads, h, page_size = cache.keys[0].shape[1:]
    words = np.arange(2 * len(cache.keys) * heads * h, dtype=np.uint32).reshape(-1, heads, h)
    total = jnp.zeros((pages.shape[0], page_size), jnp.uint32)
    for layer, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):
        for side, stored in enumerate((keys[pages].transpose(0, 3, 1, 2), values[pages].transpose(0, 2, 1, 3))):
            bits = jax.lax.bitcast_convert_type(stored, jnp.uint32) if stored.dtype.itemsize == 4 else stored.astype(jnp.uint32)
            total += (bits * (2 * words[2 * layer + side] + 1)).sum((2, 3), dtype=jnp.uint32)
    return total


def write(keys: Array, values: Array, k: Array, v: Array, tables: Int[Array, "B n"], blocks: Blocks) -> tuple[Array, Array]:
    """Put k and v `[B, r, K, h]` of each block into the page that its table names. Copies bits, so it needs no pinning.

    A block lies in one page: block starts are multiples of r and page sizes too. The rows behind a block's count are written as
    they are: nothing attends to them before their own token overwrites them.
    """
    page_size = values.shape[2]
    k, v = as_pages(k, v)
    pages = jnp.take_along_axis(tables, (blocks.starts // page_size)[:, None], axis=1)[:, 0]
    pages, offsets = jnp.where(blocks.counts > 0, pages, 0), blocks.starts % page_size

    def step(i, pool):
        one = lambda x: jax.lax.dynamic_slice_in_dim(x, i, 1)
        page, offset, zero = pages[i], offsets[i], jnp.int32(0)
        return (jax.lax.dynamic_update_slice(pool[0], one(k), (page, zero, zero, offset)),
                jax.lax.dynamic_update_slice(pool[1], one(v), (page, zero, offset, zero)))

    return jax.lax.fori_loop(0, blocks.num_blocks, step, (keys, values))


def copy_pages(cache: Cache, sources: Int[Array, " C"], targets: Int[Array, " C"], count: Int[Array, ""]) -> Cache:
    """Copy whole pages, the first `count` of the pairs, in every layer: how samples part from the prompt they shared."""

    def copy(pool):
        step = lambda i, pool: jax.lax.dynamic_update_slice_in_dim(
            pool, jax.lax.dynamic_slice_in_dim(pool, sources[i], 1), targets[i], axis=0)
        return jax.lax.fori_loop(0, count, step, pool)

    return dataclasses.replace(cache, keys=tuple(map(copy, cache.keys)), values=tuple(map(copy, cache.values)))
