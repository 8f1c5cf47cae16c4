"""What stays on the device between steps: the paged KV cache, the token history that steps read their inputs from, and
the token rules of the request in each slot.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int, UInt32

from jaxengine.base.pytree import pytree
from jaxengine.config import EngineConfig, ModelConfig
from jaxengine.device.sampling_arrays import token_rules
from jaxengine.device.step_inputs import TokenRules
from jaxengine.ops.kernels import Kernels
from jaxengine.ops.pools import PAGES
from jaxengine.ops.tiles import HISTORY_BLOCK
from jaxengine.sampling_params import SamplingParams
from pallas_kernels.numbers import ceil_to
from sharding.mesh import WHOLE


@pytree
class Cache:
    """Everything that steps or admissions change. Page 0 is scratch: rows that stand for no token write there."""

    keys: tuple[Array, ...]  # a layer: P pages, laid out by the kernels (ops/kernels.py)
    values: tuple[Array, ...]  # the same
    history: Int[Array, "slots max_len"]  # token ids of the sequence in each slot; whole blocks of HISTORY_BLOCK
    rules: TokenRules  # row i is that of the request in slot i, where it brings any


def abstract_slots(model_config: ModelConfig, engine_config: EngineConfig) -> Any:
    """Shapes and dtypes of (history, rules): a row for each slot, and one for the probe."""
    slots, length = engine_config.max_num_seqs + 1, ceil_to(engine_config.max_model_len, HISTORY_BLOCK)

    def rows(one: np.ndarray) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((slots, *one.shape[1:]), one.dtype)

    rules = jax.tree.map(rows, token_rules([SamplingParams()], model_config.padded_vocab_size))
    return jax.ShapeDtypeStruct((slots, length), np.int32), rules


def abstract(model_config: ModelConfig, engine_config: EngineConfig, kernels: Kernels) -> Any:
    """Shapes and dtypes of the cache, nothing allocated."""
    num_pages = engine_config.num_pages + engine_config.probe_pages
    keys, values = kernels.pools(model_config, num_pages, engine_config.page_size)
    layers = model_config.num_hidden_layers
    return Cache((keys,) * layers, (values,) * layers, *abstract_slots(model_config, engine_config))


_PAGES: Any = PAGES
_WHOLE: Any = WHOLE
SPECS: Any = Cache(_PAGES, _PAGES, _WHOLE, _WHOLE)  # how a cache lies on a mesh: each device has its heads of each page


def empty_cache(model_config: ModelConfig, engine_config: EngineConfig, kernels: Kernels, beside: Any) -> Cache:
    """An empty cache, on the kernels' mesh, or committed to the one device that holds the arrays `beside`.

    Steps return a committed cache, so JAX would compile the first step a second time for one that is not committed.
    """
    homes = {x.sharding for x in jax.tree.leaves(beside)}
    home = homes.pop() if len(homes) == 1 else None
    home = home if isinstance(home, jax.sharding.SingleDeviceSharding) else None
    home = kernels.whole or home

    def zeros(shape: jax.ShapeDtypeStruct) -> Array:
        return kernels.memory.zeros(shape.update(sharding=shape.sharding or home))

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
    """Copy whole pages, the first `count` of the pairs, in every layer: how samples part from a shared prompt.

    One loop for all layers, because nothing orders the copies of one after another.
    """

    def copy(i: Array, pool: Array) -> Array:
        page = jax.lax.dynamic_slice_in_dim(pool, sources[i], 1)
        return jax.lax.dynamic_update_slice_in_dim(pool, page, targets[i], axis=0)

    def step(i: Array, pools: Any) -> Any:
        return jax.tree.map(functools.partial(copy, i), pools)

    keys, values = jax.lax.fori_loop(0, count, step, (cache.keys, cache.values))
    return dataclasses.replace(cache, keys=keys, values=values)


@functools.partial(jax.jit, donate_argnames="cache")
def write_history(
    cache: Cache, slots: Int[Array, " A"], blocks: Int[Array, " A"], tokens: Int[Array, "A block"]
) -> Cache:
    """Put blocks of tokens into their slots, each as block `blocks[i]` of the slot's history.

    A slot after the last one is padding.
    """
    history = cache.history.reshape(cache.history.shape[0], -1, HISTORY_BLOCK)
    history = history.at[slots, blocks].set(tokens, mode="drop")
    return dataclasses.replace(cache, history=history.reshape(cache.history.shape))


@functools.partial(jax.jit, donate_argnames="cache")
def write_rules(cache: Cache, slots: Int[Array, " A"], rules: TokenRules) -> Cache:
    """Put one request's row of rules into each of its slots; a slot after the last one is padding."""

    def put(table: Array, row: Array) -> Array:
        return table.at[slots].set(row, mode="drop")

    return dataclasses.replace(cache, rules=jax.tree.map(put, cache.rules, rules))


@functools.partial(jax.jit, donate_argnames="cache")
def write_allowed(cache: Cache, slots: Int[Array, " A"], words: UInt32[Array, "A words"]) -> Cache:
    """Put what may be drawn next into the rules of these slots; a slot after the last one is padding."""
    allowed = cache.rules.allowed.at[slots].set(words, mode="drop")
    return dataclasses.replace(cache, rules=dataclasses.replace(cache.rules, allowed=allowed))
