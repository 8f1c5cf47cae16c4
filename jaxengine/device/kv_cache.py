"""The paged KV cache as a pytree on the device, and the token history that steps read their inputs from."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxengine.base.pytree import pytree
from jaxengine.config import EngineConfig, ModelConfig
from jaxengine.ops.kernels import Kernels


@pytree
class Cache:
    """Everything that steps change. Page 0 is scratch: rows that stand for no token write there."""

    keys: tuple[Array, ...]  # a layer: P pages, laid out by the kernels (ops/kernels.py)
    values: tuple[Array, ...]  # a layer: [P, K, p, h]
    history: Int[Array, "slots max_len"]  # token ids of the sequence in each slot


HISTORY = np.dtype(np.int32)  # of the token history


def history_shape(engine_config: EngineConfig) -> tuple[int, int]:
    """A row for each slot, and one for the probe."""
    return engine_config.max_num_seqs + 1, engine_config.max_model_len


def abstract(model_config: ModelConfig, engine_config: EngineConfig, kernels: Kernels) -> Any:
    """Shapes and dtypes of the cache, nothing allocated."""
    num_pages = engine_config.num_pages + engine_config.probe_pages
    keys, values = kernels.attention.pools(model_config, num_pages, engine_config.page_size)
    history: Any = jax.ShapeDtypeStruct(history_shape(engine_config), HISTORY)
    layers = model_config.num_hidden_layers
    return Cache((keys,) * layers, (values,) * layers, history)


def empty_cache(model_config: ModelConfig, engine_config: EngineConfig, kernels: Kernels, beside: Any) -> Cache:
    """An empty cache, committed to the one device that holds the arrays `beside`.

    Steps return a committed cache, so JAX would compile the first step a second time for one that is not committed.
    """
    homes = {x.sharding for x in jax.tree.leaves(beside)}
    home = homes.pop() if len(homes) == 1 else None
    home = home if isinstance(home, jax.sharding.SingleDeviceSharding) else None

    def zeros(shape: jax.ShapeDtypeStruct) -> Array:
        return jnp.zeros(shape.shape, shape.dtype, device=shape.sharding or home)

    return jax.tree.map(zeros, abstract(model_config, engine_config, kernels))


def is_lost(cache: Cache) -> bool:
    """Whether a step took the donated arrays and returned none, or returned arrays that only raise its error.

    Waits for steps under way.
    """
    if any(x.is_deleted() for x in jax.tree.leaves(cache)):
        return True
    try:
        jax.block_until_ready(cache)
    except jax.errors.JaxRuntimeError:
        return True
    return False


def rebuild(cache: Cache, model_config: ModelConfig, engine_config: EngineConfig, kernels: Kernels) -> Cache:
    """An empty cache in the place of a lost one.

    The lost one's memory is freed first, because there is no room for two.
    """
    delete(cache)
    return empty_cache(model_config, engine_config, kernels, beside=cache)


def delete(cache: Cache) -> None:
    """Free its memory now, whoever else refers to it."""
    for array in jax.tree.leaves(cache):
        array.delete()


def copy_pages(cache: Cache, sources: Int[Array, " C"], targets: Int[Array, " C"], count: Int[Array, ""]) -> Cache:
    """Copy whole pages, the first `count` of the pairs, in every layer: how samples part from a shared prompt."""

    def copy(pool: Array) -> Array:
        def step(i, pool):
            page = jax.lax.dynamic_slice_in_dim(pool, sources[i], 1)
            return jax.lax.dynamic_update_slice_in_dim(pool, page, targets[i], axis=0)

        return jax.lax.fori_loop(0, count, step, pool)

    return dataclasses.replace(cache, keys=tuple(map(copy, cache.keys)), values=tuple(map(copy, cache.values)))
