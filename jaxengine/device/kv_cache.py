"""The paged KV cache as a pytree on the device, and the token history that steps read their inputs from."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt32

from jaxengine.base.pytree import pytree
from jaxengine.config import EngineConfig, ModelConfig
from jaxengine.ops.kernels import Kernels


@pytree
class Cache:
    """Everything that steps change. Page 0 belongs to nobody: rows that stand for no token write there."""

    keys: tuple[Array, ...]  # a layer: P pages as the kernels lay them out (ops/kernels.py)
    values: tuple[Array, ...]  # a layer: [P, K, p, h]
    history: Int[Array, "slots max_len"]  # token ids of the sequence in each slot


HISTORY = np.dtype(np.int32)  # of the token history


def history_shape(engine_config: EngineConfig) -> tuple[int, int]:
    """A row for each slot, and one for the probe."""
    return engine_config.max_num_seqs + 1, engine_config.max_model_len


def abstract(model_config: ModelConfig, engine_config: EngineConfig, kernels: Kernels) -> Any:
    """Shapes and dtypes of the cache, nothing allocated."""
    keys, values = kernels.pools(
        model_config, engine_config.num_pages + engine_config.probe_pages, engine_config.page_size
    )
    history: Any = jax.ShapeDtypeStruct(history_shape(engine_config), HISTORY)
    layers = model_config.num_hidden_layers
    return Cache((keys,) * layers, (values,) * layers, history)


def empty_cache(model_config: ModelConfig, engine_config: EngineConfig, kernels: Kernels, beside: Any) -> Cache:
    """An empty cache, committed to the one device where the arrays `beside` lie: that is how steps give it back, and JAX would compile
    the first step once more for a cache that is not."""
    homes = {x.sharding for x in jax.tree.leaves(beside)}
    one = len(homes) == 1 and isinstance(next(iter(homes)), jax.sharding.SingleDeviceSharding)
    home = homes.pop() if one else None
    return jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype, device=s.sharding or home), abstract(model_config, engine_config, kernels)
    )


def is_lost(cache: Cache) -> bool:
    """Whether a step took the arrays and gave none back, or gave such as only answer with its error. Waits for steps under way."""
    if any(x.is_deleted() for x in jax.tree.leaves(cache)):
        return True
    try:
        jax.block_until_ready(cache)
    except jax.errors.JaxRuntimeError:
        return True
    return False


def rebuild(cache: Cache, model_config: ModelConfig, engine_config: EngineConfig, kernels: Kernels) -> Cache:
    """An empty cache in the place of a lost one, whose memory goes first: there is no room for two."""
    for array in jax.tree.leaves(cache):
        array.delete()
    return empty_cache(model_config, engine_config, kernels, beside=cache)


def token_sums(cache: Cache, pages: Int[Array, " A"], *, kernels: Kernels) -> UInt32[Array, "A p"]:
    """A checksum of each token's stored words in the given pages, over all layers: any single word that changes, changes it.

    Each word is multiplied by an odd number of its own, modulo 2**32. Garbage has the same sum with a chance of about 2**-32.
    """
    heads, page_size, h = cache.values[0].shape[1:]
    words = np.arange(2 * len(cache.keys) * heads * h, dtype=np.uint32).reshape(-1, heads, h)
    total = jnp.zeros((pages.shape[0], page_size), jnp.uint32)
    for layer, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):
        for side, stored in enumerate(kernels.by_token(keys[pages], values[pages])):
            bits = stored.view(f"uint{8 * stored.dtype.itemsize}").astype(jnp.uint32)
            total += (bits * (2 * words[2 * layer + side] + 1)).sum((2, 3), dtype=jnp.uint32)
    return total


def copy_pages(cache: Cache, sources: Int[Array, " C"], targets: Int[Array, " C"], count: Int[Array, ""]) -> Cache:
    """Copy whole pages, the first `count` of the pairs, in every layer: how samples part from the prompt they shared."""

    def copy(pool):
        step = lambda i, pool: jax.lax.dynamic_update_slice_in_dim(
            pool, jax.lax.dynamic_slice_in_dim(pool, sources[i], 1), targets[i], axis=0
        )
        return jax.lax.fori_loop(0, count, step, pool)

    return dataclasses.replace(cache, keys=tuple(map(copy, cache.keys)), values=tuple(map(copy, cache.values)))
